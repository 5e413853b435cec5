"""Prompts as a policy reads them: which are learned from, which are held out, and whose turn it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fledge.data.prompts import Prompt, read_prompts
from fledge.data.sources import held_out
from fledge.errors import UserError
from fledge.tokenizer.bpe import Tokenizer
from fledge.tokenizer.chat import encode_chat


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt and the ids that the policy reads before it answers."""

    prompt: Prompt
    ids: list[int]


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, plain: bool, most: int
) -> tuple[list[EncodedPrompt], list[str]]:
    """The prompts of at most `most` tokens, and where those stand that are longer.

    As chats, up to where the assistant's turn begins; `plain`: as texts to continue, each as the start of a
    document. Raises UserError with file and line for a broken message, or a plain prompt of several turns.
    """
    kept, overlong = [], []
    for prompt in prompts:
        if plain and (len(prompt.messages) > 1 or prompt.messages[0].get("role") != "user"):
            raise UserError(f"{prompt.where}: several turns; with --plain a prompt is one text to continue")
        try:
            if plain:
                ids = [tokenizer.start_id, *tokenizer.encode(str(prompt.messages[0].get("content") or ""))]
            else:
                ids = encode_chat(tokenizer, prompt.messages, prompt.tools, add_generation_prompt=True).ids
        except UserError as error:
            raise UserError(f"{prompt.where}: {error}") from None
        if len(ids) > most:
            overlong.append(prompt.where)
        else:
            kept.append(EncodedPrompt(prompt, ids))
    return kept, overlong


@dataclass(frozen=True)
class Prompts:
    """Prompts to learn from and held-out ones, and where those stand that leave no room for a completion."""

    train: list[EncodedPrompt]
    held: list[EncodedPrompt]
    overlong: list[str]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(prompt.ids) for prompt in [*self.train, *self.held])

    def __str__(self) -> str:
        places = ", ".join(self.overlong[:3]) + (", ..." if len(self.overlong) > 3 else "")
        named = f" ({places})" if places else ""
        return (
            f"{len(self.train):,} prompts to learn from, {len(self.held):,} held out; "
            f"{len(self.overlong):,} leave no room for a completion{named}"
        )

    def counts(self) -> dict[str, Any]:
        """For `summary.json`."""
        overlong = {"count": len(self.overlong), "first": self.overlong[:20]}
        return {"prompts": len(self.train), "held_out": len(self.held), "overlong_prompts": overlong}


def read_split(
    paths: Sequence[Path], tokenizer: Tokenizer, plain: bool, most: int, held_share: float
) -> Prompts:
    """The prompts of files; for `most` see `encode_prompts`. What is held out is decided by a hash of what a
    prompt says, so that none is on both sides; one at least is, and one at least is not. Raises UserError as
    `read_prompts` does, and if no prompt is short enough."""
    if not paths:
        raise UserError("--prompts: name at least one file")
    if not 0 <= held_share < 1:
        raise UserError(f"--validation-share {held_share}: must be at least 0 and below 1")
    found = [prompt for path in paths for prompt in read_prompts(path)]
    kept, overlong = encode_prompts(found, tokenizer, plain, most)
    if not kept:
        raise UserError(
            f"{paths[0]}: no prompt leaves room for a completion: none has at most {max(0, most):,} tokens; "
            "lower --max-tokens"
        )
    said = list(dict.fromkeys(map(_said, kept)))
    held = {text for text in said if held_out(text, held_share)}
    if held_share > 0 and not held:
        held = {said[-1]}
    if len(held) == len(said):
        held.discard(said[0])
    train = [prompt for prompt in kept if _said(prompt) not in held]
    return Prompts(train, [prompt for prompt in kept if _said(prompt) in held], overlong)


def _said(prompt: EncodedPrompt) -> str:
    """As `prompt_key` has it: what is held out of preferences is then held out of prompts."""
    return json.dumps([prompt.prompt.messages, prompt.prompt.tools], sort_keys=True)


def end_ids(tokenizer: Tokenizer, plain: bool) -> list[int]:
    """The ids that end a completion: of a turn and of a document; `plain`: of a document."""
    ends = [tokenizer.eos_id] if plain else [tokenizer.end_of_turn_id, tokenizer.eos_id]
    return list(dict.fromkeys(token_id for token_id in ends if token_id is not None))


def prompts_at(prompts: Sequence[EncodedPrompt], number: int, count: int, seed: int) -> list[EncodedPrompt]:
    """The `count` prompts of roll-out `number`: one epoch after the other, each in another order. A pure
    function, so that nothing needs saving to go on."""
    places = [divmod(i, len(prompts)) for i in range(number * count, (number + 1) * count)]
    orders = {epoch: np.random.default_rng([seed, 1, epoch]).permutation(len(prompts)) for epoch, _ in places}
    return [prompts[orders[epoch][i]] for epoch, i in places]
