"""Preferences as token ids: for each prompt its completions, once each, and the pairs that were compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fledge.data.preferences import Ranking, Turns, ordered_pairs, prompt_key
from fledge.data.sources import held_out
from fledge.errors import UserError
from fledge.tokenizer.bpe import Tokenizer
from fledge.tokenizer.chat import EncodedChat, encode_chat
from fledge.types import pad_rows


@dataclass(frozen=True)
class Pair:
    """Two completions of a prompt, by their numbers, and what is known about the comparison."""

    better: int
    worse: int
    margin: float = 0.0
    ranks_apart: int = 1
    kinds: tuple[str, str] | None = None
    """Of the better and of the worse."""
    labeler: str | None = None
    simulated: bool = False


@dataclass(frozen=True)
class Comparison:
    """All that was said about one prompt: it is kept together in batches and splits."""

    key: str
    prompt: Turns
    completions: list[Turns]
    ids: list[list[int]]
    """Prompt and completion, to the token that ends the completion's last turn."""
    masks: list[list[bool]]
    """True where the assistant wrote the token, after the prompt."""
    pairs: list[Pair]

    @property
    def num_tokens(self) -> int:
        """Of all rows, padding left out."""
        return sum(map(len, self.ids))


@dataclass(frozen=True)
class Comparisons:
    """What there is to learn from, and what was left out."""

    prompts: list[Comparison]
    overlong: int
    """Completions that are too long with their prompt."""
    undecided: int
    """Prompts without a pair: all ranks tied, or too few completions left."""
    same: int
    """Pairs of completions with the same tokens."""

    @property
    def num_pairs(self) -> int:
        """Comparisons of two completions by one labeler."""
        return sum(len(prompt.pairs) for prompt in self.prompts)

    def counts(self) -> dict[str, int]:
        """For `summary.json`."""
        counts = {"overlong": self.overlong, "undecided": self.undecided, "same": self.same}
        return {"pairs": self.num_pairs, **counts}

    def __str__(self) -> str:
        return (
            f"{self.num_pairs:,} pairs; left out: {self.undecided:,} prompts without a pair, "
            f"{self.overlong:,} completions that are too long, {self.same:,} pairs of the same text"
        )


def encode_completion(
    tokenizer: Tokenizer, prompt: Turns, completion: Turns, tools: Sequence[dict[str, Any]] | None = None
) -> EncodedChat:
    """Ids of prompt and completion, to the token that ends the last turn; the mask leaves the prompt out.

    Raises UserError for a broken message, or if the chat template does not mark the assistant's turns.
    """
    asked = encode_chat(tokenizer, prompt, tools, add_generation_prompt=True).ids
    chat = encode_chat(tokenizer, [*prompt, *completion], tools)
    differs = (i for i, (a, b) in enumerate(zip(asked, chat.ids, strict=False)) if a != b)
    start = next(differs, min(len(asked), len(chat.ids)))
    mask = [on and i >= start for i, on in enumerate(chat.mask)]
    if not any(mask):
        raise UserError(
            "the chat template does not mark what the assistant writes; a model made by `fledge sft` has one "
            "that does"
        )
    end = len(mask) - mask[::-1].index(True)
    return EncodedChat(chat.ids[:end], mask[:end])


def compare(rankings: Iterable[Ranking], tokenizer: Tokenizer, max_tokens: int) -> Comparisons:
    """The rankings by prompt, in the order in which prompts first appear, encoded.

    Rankings of the same prompt (by several labelers) share their completions, so that each goes through the
    model once. Raises UserError with file and line for a broken message.
    """
    by_prompt: dict[str, list[Ranking]] = {}
    for ranking in rankings:
        by_prompt.setdefault(prompt_key(ranking), []).append(ranking)
    prompts = []
    overlong = undecided = same = 0
    for key, group in by_prompt.items():
        comparison, dropped, alike = _comparison(key, group, tokenizer, max_tokens)
        overlong, same = overlong + dropped, same + alike
        if comparison.pairs:
            prompts.append(comparison)
        else:
            undecided += 1
    return Comparisons(prompts, overlong, undecided, same)


def _comparison(
    key: str, rankings: list[Ranking], tokenizer: Tokenizer, max_tokens: int
) -> tuple[Comparison, int, int]:
    """A prompt's comparison, and how many completions were too long, and pairs of the same tokens."""
    numbers: dict[tuple[int, ...], int] = {}
    found = Comparison(key, rankings[0].prompt, [], [], [], [])
    overlong = same = 0
    for ranking in rankings:
        places: list[int | None] = []
        for completion in ranking.completions:
            try:
                chat = encode_completion(tokenizer, ranking.prompt, completion, ranking.tools)
            except UserError as error:
                raise UserError(f"{ranking.where}: {error}") from None
            if len(chat.ids) > max_tokens:
                overlong += 1
                places.append(None)
                continue
            number = numbers.setdefault(tuple(chat.ids), len(numbers))
            if number == len(found.ids):
                found.ids.append(chat.ids)
                found.masks.append(chat.mask)
                found.completions.append(completion)
            places.append(number)
        for i, j in ordered_pairs(ranking.ranks):
            better, worse = places[i], places[j]
            if better is None or worse is None:
                continue
            if better == worse:
                same += 1
                continue
            found.pairs.append(
                Pair(
                    better,
                    worse,
                    ranking.margin,
                    ranking.ranks[j] - ranking.ranks[i],
                    (ranking.kinds[i], ranking.kinds[j]) if ranking.kinds else None,
                    ranking.labeler,
                    ranking.simulated,
                )
            )
    return found, overlong, same


def split_by_prompt(prompts: Sequence[Comparison], share: float) -> tuple[list[Comparison], list[Comparison]]:
    """Training and held-out prompts, decided by each prompt's text: none is in both, whatever the file.

    If the share of so few prompts is none, one is held out; if it is all of them, one is trained on.
    """
    is_held = [held_out(prompt.key, share) for prompt in prompts]
    if share > 0 and not any(is_held) and len(prompts) > 1:
        is_held[-1] = True
    if all(is_held) and is_held:
        is_held[0] = False
    train = [prompt for prompt, held in zip(prompts, is_held, strict=True) if not held]
    return train, [prompt for prompt, held in zip(prompts, is_held, strict=True) if held]


def best_rows(prompts: Sequence[Comparison]) -> list[list[int]]:
    """The ids of completions that were never the worse one; of a prompt without such, the better ones."""
    rows = []
    for prompt in prompts:
        better, worse = ({getattr(pair, side) for pair in prompt.pairs} for side in ("better", "worse"))
        rows += [prompt.ids[i] for i in sorted(better - worse or better)]
    return rows


# Controls: what remains when something is taken away.


def shuffled_labels(prompts: Sequence[Comparison], seed: int) -> list[Comparison]:
    """The same with every second prompt's ranks turned around, drawn at random: labels that say nothing.

    Half of the prompts with the same kinds of pairs are turned, so that no kind wins by the luck of the draw.
    """
    rng = np.random.default_rng([seed, 1])
    shuffled = list(prompts)
    turned: Counter[tuple[tuple[str, str] | None, ...]] = Counter()
    for i in rng.permutation(len(prompts)):
        pairs = prompts[i].pairs
        kinds = tuple(sorted(pair.kinds or ("", "") for pair in pairs))
        turned[kinds] += 1
        if turned[kinds] % 2:
            pairs = [replace(pair, better=pair.worse, worse=pair.better) for pair in pairs]
            shuffled[i] = replace(prompts[i], pairs=pairs)
    return shuffled


def without_prompt(prompts: Sequence[Comparison], tokenizer: Tokenizer) -> list[Comparison]:
    """The same completions, each as the answer to an empty turn: what can be told without the prompt."""
    empty: Turns = [{"role": "user", "content": ""}]
    return [
        replace(
            prompt, ids=[encode_completion(tokenizer, empty, answer).ids for answer in prompt.completions]
        )
        for prompt in prompts
    ]


# As tensors. Shape suffixes: B rows (completions), T tokens, P pairs.


@dataclass
class ComparisonBatch:
    """Whole comparisons: a right-padded row for each completion, and which rows are pairs."""

    input_ids: Tensor
    """(B, T)."""
    last: Tensor
    """(B): the place of each row's last token, where its reward is read."""
    better: Tensor
    """(P): rows."""
    worse: Tensor
    margin: Tensor
    """(P), in units of the reward."""
    weight: Tensor
    """(P): 1 / the number of pairs of that prompt, so that every prompt counts alike."""
    prompts: int

    def to(self, device: torch.device) -> ComparisonBatch:
        """The same batch on a device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if name != "prompts"}
        return ComparisonBatch(**tensors, prompts=self.prompts)

    def num_tokens(self) -> int:
        """How many tokens are read; padding is none."""
        return int((self.last + 1).sum())

    def denominators(self) -> dict[str, int]:
        """What losses are averaged over, known before any forward pass."""
        return {"tokens": self.num_tokens(), "prompts": self.prompts, "pairs": len(self.better)}


def batch_of(prompts: Sequence[Comparison]) -> ComparisonBatch:
    """Comparisons as one batch. Padding is id 0: nothing reads it."""
    rows: list[list[int]] = []
    better: list[int] = []
    worse: list[int] = []
    margins: list[float] = []
    weights: list[float] = []
    for prompt in prompts:
        better += [len(rows) + pair.better for pair in prompt.pairs]
        worse += [len(rows) + pair.worse for pair in prompt.pairs]
        margins += [pair.margin for pair in prompt.pairs]
        weights += [1 / len(prompt.pairs)] * len(prompt.pairs)
        rows += prompt.ids
    return ComparisonBatch(
        input_ids=pad_rows(rows, 0),
        last=torch.tensor([len(row) - 1 for row in rows]),
        better=torch.tensor(better),
        worse=torch.tensor(worse),
        margin=torch.tensor(margins),
        weight=torch.tensor(weights),
        prompts=len(prompts),
    )


def in_batches(prompts: Sequence[Comparison], max_tokens: int) -> Iterator[list[Comparison]]:
    """Prompts of similar length in batches of at most `max_tokens`, padding included; a prompt is never cut,
    so one that is larger has a batch of its own."""
    part: list[Comparison] = []
    rows = 0
    for prompt in sorted(prompts, key=lambda prompt: max(map(len, prompt.ids))):
        rows += len(prompt.ids)
        if part and rows * max(map(len, prompt.ids)) > max_tokens:
            yield part
            part, rows = [], len(prompt.ids)
        part.append(prompt)
    if part:
        yield part
