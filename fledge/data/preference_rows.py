"""Preferences as rows of ids for losses of log-probabilities: what is left out is named by file and line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fledge.data.comparisons import Comparison, compare, encode_completion
from fledge.data.preferences import Judgement, Ranking, Turns, prompt_key, read_judgements, read_rankings
from fledge.errors import UserError
from fledge.tokenizer.bpe import Tokenizer
from fledge.types import pad_rows

EMPTY, OVERLONG = "empty completions", "completions beyond the context with their prompt"
SAME, UNDECIDED = "pairs of the same text", "prompts without a pair"


@dataclass(frozen=True)
class Preferences:
    """What there is to learn from, by prompt, and what was left out."""

    prompts: list[Comparison]
    labels: dict[str, list[bool]]
    """Of unpaired judgements: for each prompt's key, whether each completion is good."""
    left_out: dict[str, list[str]] = field(default_factory=lambda: {EMPTY: [], OVERLONG: [], SAME: []})
    """What, and the places in the files, one for each."""

    def left_out_text(self) -> str:
        """All of it in words, with the first places."""
        parts = []
        for what, places in self.left_out.items():
            named = f" ({', '.join(places[:3])}{', ...' if len(places) > 3 else ''})" if places else ""
            parts.append(f"{len(places):,} {what}{named}")
        return ", ".join(parts)

    @property
    def num_pairs(self) -> int:
        """Comparisons of two completions."""
        return sum(len(prompt.pairs) for prompt in self.prompts)

    def counts(self) -> dict[str, Any]:
        """For `summary.json`."""
        return {
            "pairs": self.num_pairs,
            "completions": sum(len(prompt.ids) for prompt in self.prompts),
            "left_out": {
                what: {"count": len(places), "first": places[:20]} for what, places in self.left_out.items()
            },
        }

    def __str__(self) -> str:
        good, judged = (sum(map(count, self.labels.values())) for count in (sum, len))
        what = (
            f"{good:,} good and {judged - good:,} bad completions" if judged else f"{self.num_pairs:,} pairs"
        )
        return f"{what}; left out: {self.left_out_text()}"


def read_pairs(files: Iterable[Path], tokenizer: Tokenizer, max_tokens: int) -> Preferences:
    """Pairs and rankings, these as all their pairs. Raises UserError with file and line."""
    found = Preferences([], {})
    found.left_out[UNDECIDED] = []
    groups: dict[str, list[Ranking]] = {}
    for path in files:
        for ranking in read_rankings(path):
            empty = [_is_empty(completion) for completion in ranking.completions]
            found.left_out[EMPTY] += [ranking.where] * sum(empty)
            groups.setdefault(prompt_key(ranking), []).append(_without(ranking, empty))
    for group in groups.values():
        part = compare(group, tokenizer, max_tokens)
        found.prompts.extend(part.prompts)
        counts = ((OVERLONG, part.overlong), (SAME, part.same), (UNDECIDED, part.undecided))
        for what, count in counts:
            found.left_out[what] += [group[0].where] * count
    return found


def read_judged(files: Iterable[Path], tokenizer: Tokenizer, max_tokens: int) -> Preferences:
    """Unpaired judgements, those of the same prompt together. Raises UserError with file and line."""
    found = Preferences([], {})
    del found.left_out[SAME]
    by_key: dict[str, Comparison] = {}
    for path in files:
        for judgement in read_judgements(path):
            if _is_empty(judgement.completion):
                found.left_out[EMPTY].append(judgement.where)
            elif not _add(judgement, tokenizer, max_tokens, by_key, found.labels):
                found.left_out[OVERLONG].append(judgement.where)
    found.prompts.extend(by_key.values())
    return found


def _add(
    judgement: Judgement,
    tokenizer: Tokenizer,
    max_tokens: int,
    by_key: dict[str, Comparison],
    labels: dict[str, list[bool]],
) -> bool:
    """Whether it was short enough to be added."""
    try:
        chat = encode_completion(tokenizer, judgement.prompt, judgement.completion, judgement.tools)
    except UserError as error:
        raise UserError(f"{judgement.where}: {error}") from None
    if len(chat.ids) > max_tokens:
        return False
    key = prompt_key(judgement)
    prompt = by_key.setdefault(key, Comparison(key, judgement.prompt, [], [], [], []))
    prompt.completions.append(judgement.completion)
    prompt.ids.append(chat.ids)
    prompt.masks.append(chat.mask)
    labels.setdefault(key, []).append(judgement.label)
    return True


def _is_empty(completion: Turns) -> bool:
    """Whether the assistant says nothing and calls nothing."""
    spoken = [turn for turn in completion if turn["role"] == "assistant"]
    return not any((turn.get("content") or "").strip() or turn.get("tool_calls") for turn in spoken)


def _without(ranking: Ranking, empty: Sequence[bool]) -> Ranking:
    if not any(empty):
        return ranking
    kept = [i for i, is_empty in enumerate(empty) if not is_empty]
    kinds = [ranking.kinds[i] for i in kept] if ranking.kinds else None
    completions, ranks = [ranking.completions[i] for i in kept], [ranking.ranks[i] for i in kept]
    return replace(ranking, completions=completions, ranks=ranks, kinds=kinds, order=None)


def strangers(prompts: Sequence[Comparison], seed: int, max_tokens: int) -> dict[str, Comparison]:
    """By key, each prompt with as many completions of other prompts as it has itself, cut at `max_tokens`.

    Every completion appears once. Prompts are put in a random order and completions moved on by as many
    places as the largest prompt has: none meets its own prompt, unless that has more than half of them.
    """
    order = [prompts[i] for i in np.random.default_rng([seed, 0, 2]).permutation(len(prompts))]
    rows = [(prompt, i) for prompt in order for i in range(len(prompt.ids))]
    shift = max((len(prompt.ids) for prompt in prompts), default=0)
    found = {prompt.key: Comparison(prompt.key, prompt.prompt, [], [], [], []) for prompt in order}
    for place, (prompt, i) in enumerate(rows):
        other, j = rows[(place + shift) % len(rows)]
        begin, rest = prompt.masks[i].index(True), other.masks[j].index(True)
        stranger = found[prompt.key]
        stranger.ids.append((prompt.ids[i][:begin] + other.ids[j][rest:])[:max_tokens])
        stranger.masks.append(([False] * begin + other.masks[j][rest:])[:max_tokens])
    return found


# As tensors. Shape suffixes: B rows (completions), T tokens, P pairs.


@dataclass
class PairBatch:
    """Whole prompts: a right-padded row for each completion, and which rows are pairs."""

    input_ids: Tensor
    """(B, T)."""
    loss_mask: Tensor
    """(B, T): the completion's tokens, its end among them."""
    ref_logps: Tensor | None
    """(B): log-probabilities under the reference; None for losses without one."""
    better: Tensor
    """(P): rows."""
    worse: Tensor
    weight: Tensor
    """(P): the pairs of a prompt share 1, so that every prompt counts alike."""
    prompts: int

    def to(self, device: torch.device) -> PairBatch:
        """The same batch on a device."""
        return replace(self, **_moved(self, device))

    def num_tokens(self) -> int:
        """How many tokens are read; padding is none."""
        return _num_tokens(self.loss_mask)

    def denominators(self) -> dict[str, int]:
        """What losses are averaged over, known before any forward pass."""
        return {"tokens": int(self.loss_mask[:, 1:].sum()), "prompts": self.prompts}


@dataclass
class JudgedBatch:
    """Completions that were judged one by one."""

    input_ids: Tensor
    loss_mask: Tensor
    ref_logps: Tensor
    good: Tensor
    """(B)."""
    kl: float
    """An estimate of KL(pi || pi_0) before this step, the same for all of its micro-batches."""
    step_good: int
    """Good completions in the whole step."""
    step_bad: int

    def to(self, device: torch.device) -> JudgedBatch:
        """The same batch on a device."""
        return replace(self, **_moved(self, device))

    def num_tokens(self) -> int:
        """How many tokens are read; padding is none."""
        return _num_tokens(self.loss_mask)

    def denominators(self) -> dict[str, int]:
        """What losses are averaged over, known before any forward pass."""
        return {"tokens": int(self.loss_mask[:, 1:].sum()), "completions": len(self.good)}


def _num_tokens(loss_mask_BT: Tensor) -> int:
    """Every row ends with a token of the completion."""
    place_T = torch.arange(1, loss_mask_BT.shape[1] + 1, device=loss_mask_BT.device)
    return int((loss_mask_BT * place_T).amax(1).sum())


def _moved(batch: PairBatch | JudgedBatch, device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) for name, value in vars(batch).items() if isinstance(value, Tensor)}


def rows_of(prompts: Sequence[Comparison]) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, T) of all completions, right-padded with id 0."""
    ids = [row for prompt in prompts for row in prompt.ids]
    masks = [[int(on) for on in mask] for prompt in prompts for mask in prompt.masks]
    return pad_rows(ids, 0), pad_rows(masks, 0).bool()


Logps = Mapping[str, Sequence[float]]
"""By a prompt's key, the log-probabilities of its completions under the reference."""


def pair_batch(prompts: Sequence[Comparison], reference: Logps | None) -> PairBatch:
    """Prompts with their pairs as one batch."""
    input_ids, loss_mask = rows_of(prompts)
    better: list[int] = []
    worse: list[int] = []
    weight: list[float] = []
    row = 0
    for prompt in prompts:
        better += [row + pair.better for pair in prompt.pairs]
        worse += [row + pair.worse for pair in prompt.pairs]
        weight += [1 / len(prompt.pairs)] * len(prompt.pairs)
        row += len(prompt.ids)
    return PairBatch(
        input_ids=input_ids,
        loss_mask=loss_mask,
        ref_logps=None if reference is None else _logps(prompts, reference),
        better=torch.tensor(better),
        worse=torch.tensor(worse),
        weight=torch.tensor(weight),
        prompts=len(prompts),
    )


def judged_batches(
    parts: Sequence[Sequence[Comparison]], labels: Mapping[str, list[bool]], reference: Logps, kl: float
) -> list[JudgedBatch]:
    """The micro-batches of one step."""
    good = [[label for prompt in part for label in labels[prompt.key]] for part in parts]
    step_good, total = sum(map(sum, good)), sum(map(len, good))
    return [
        JudgedBatch(
            *rows_of(part), _logps(part, reference), torch.tensor(is_good), kl, step_good, total - step_good
        )
        for part, is_good in zip(parts, good, strict=True)
    ]


def _logps(prompts: Sequence[Comparison], reference: Logps) -> Tensor:
    return torch.tensor([logp for prompt in prompts for logp in reference[prompt.key]])
