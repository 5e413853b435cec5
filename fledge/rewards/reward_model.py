"""Rewards of a trained reward model, for rows of ids and for conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fledge.data.comparisons import encode_completion
from fledge.device import autocast
from fledge.errors import UserError
from fledge.files import read_json
from fledge.model.checkpoint import load_reward_model, save_model
from fledge.model.heads import RewardModel
from fledge.model.lora import LoRA, save_adapter
from fledge.tokenizer.bpe import Tokenizer
from fledge.types import Message, pad_rows


@torch.no_grad()
def score_rows(
    model: RewardModel,
    rows: Sequence[Sequence[int]],
    compute_dtype: torch.dtype = torch.float32,
    max_tokens: int = 16_384,
) -> list[float]:
    """The raw reward of each row, read at its last token; rows of similar length share a batch of at most
    `max_tokens`, padding included."""
    device = model.score.weight.device
    rewards = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    while order:
        count = 1
        while count < len(order) and (count + 1) * len(rows[order[count]]) <= max_tokens:
            count += 1
        part, order = order[:count], order[count:]
        ids = pad_rows([rows[i] for i in part], 0).to(device)
        last = torch.tensor([len(rows[i]) - 1 for i in part], device=device)
        with autocast(device, compute_dtype):
            found = model(ids, last)
        for i, reward in zip(part, found.tolist(), strict=True):
            rewards[i] = reward
    return rewards


@dataclass(frozen=True)
class Judge:
    """A reward model with its tokenizer and the offset that puts reference answers at 0."""

    model: RewardModel
    tokenizer: Tokenizer
    offset: float
    compute_dtype: torch.dtype = torch.float32

    @property
    def max_tokens(self) -> int:
        """The longest row it can read."""
        return self.model.config.max_position_embeddings

    def score_ids(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Rewards of rows of ids: prompt and completion, to the token that ends it. Raises UserError for a
        row that is longer than the model's context."""
        longest = max(map(len, rows), default=0)
        if longest > self.max_tokens:
            raise UserError(
                f"a conversation has {longest} tokens, the reward model reads {self.max_tokens}; shorten it"
            )
        return [reward + self.offset for reward in score_rows(self.model, rows, self.compute_dtype)]

    def encode(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None) -> list[int]:
        """The ids of a conversation to the end of its last turn, which must be the assistant's."""
        if not messages or messages[-1].get("role") != "assistant":
            raise UserError("the last message is not the assistant's; a reward is for what it says")
        return encode_completion(self.tokenizer, list(messages[:-1]), [messages[-1]], tools).ids

    def score(self, conversations: Sequence[Sequence[Message]]) -> list[float]:
        """Rewards of the last turn of conversations."""
        return self.score_ids([self.encode(messages) for messages in conversations])


def load_judge(
    directory: Path, device: torch.device | None = None, compute_dtype: torch.dtype = torch.float32
) -> Judge:
    """The reward model of a directory; one of others has offset 0.

    Raises UserError for a directory that is none, or whose tokenizer has ids the model lacks.
    """
    model = load_reward_model(directory).to(device or torch.device("cpu"))
    tokenizer = Tokenizer.load(directory)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, the model only "
            f"{model.config.vocab_size}; the files are of different models"
        )
    return Judge(model.eval().requires_grad_(False), tokenizer, offset_of(directory), compute_dtype)


def pad_id_of(tokenizer: Tokenizer) -> int | None:
    """An id that no completion ends with: transformers reads a score at the last token that is not it."""
    others = sorted(tokenizer.control_ids - {tokenizer.end_of_turn_id})
    return tokenizer.eos_id if tokenizer.eos_id in others else others[0] if others else None


def offset_of(directory: Path) -> float:
    """What is added to raw scores, from `lineage.json`; 0 where there is none."""
    path = directory / "lineage.json"
    value = read_json(path).get("reward_offset", 0.0) if path.exists() else 0.0
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{path}: reward_offset is {value!r}; it must be a number")
    return float(value)


def save_reward_model(
    directory: Path,
    tokens: int,
    *,
    model: RewardModel,
    tokenizer: Tokenizer,
    origin: dict[str, Any],
    base: Path,
    lora: LoRA | None = None,
    offset: float = 0.0,
) -> None:
    """Write a whole model directory into an existing folder, or only the adapter beside `base`; `origin` is
    the lineage but for the tokens that were read and the offset."""
    origin = {**origin, "tokens": tokens, "reward_offset": offset}
    if lora is not None:
        save_adapter(directory, model, lora, base, tokenizer, origin)
        return
    ends = [token_id for token_id in (tokenizer.end_of_turn_id, tokenizer.eos_id) if token_id is not None]
    save_model(directory, model, tokenizer, origin, list(dict.fromkeys(ends)), pad_id=pad_id_of(tokenizer))
