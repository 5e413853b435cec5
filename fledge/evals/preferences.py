"""How good a reward model is: figures over held-out pairs, each a row with its two rewards.

A row (`PairRow`) is one labeler's judgement of two completions. Shares come with Wilson's interval.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fledge.data.comparisons import Comparison
from fledge.evals.facts import Share
from fledge.types import Message

CALIBRATION_BINS = 5
GAP_PARTS = 4


@dataclass(frozen=True)
class PairRow:
    """Two completions of a prompt, the better one by a labeler's judgement first."""

    prompt: str
    better: str
    worse: str
    reward_better: float
    reward_worse: float
    tokens_better: int
    tokens_worse: int
    ranks_apart: int = 1
    kinds: tuple[str, str] | None = None
    votes: int = 1
    """How many judgements there are of these two."""
    agreeing: int = 1
    """How many of them say the same."""
    simulated: bool = False
    blind_better: float | None = None
    """Rewards of the control that reads no prompt,"""
    blind_worse: float | None = None
    shuffled_better: float | None = None
    """and of the one that learned from shuffled labels."""
    shuffled_worse: float | None = None

    @property
    def gap(self) -> float:
        """Reward of the better minus that of the worse: above 0 where the model agrees."""
        return self.reward_better - self.reward_worse

    def as_dict(self) -> dict[str, Any]:
        """For `pairs.jsonl`."""
        return asdict(self)


Outcome = Callable[[PairRow], float | None]


def by_reward(row: PairRow) -> float | None:
    """How far the reward model is for the labeler's choice."""
    return row.gap


def by_blind_reward(row: PairRow) -> float | None:
    """The same of the control that reads no prompt."""
    if row.blind_better is None or row.blind_worse is None:
        return None
    return row.blind_better - row.blind_worse


def by_shuffled_reward(row: PairRow) -> float | None:
    """The same of the control that learned from shuffled labels."""
    if row.shuffled_better is None or row.shuffled_worse is None:
        return None
    return row.shuffled_better - row.shuffled_worse


def accuracy(rows: Iterable[PairRow], outcome: Outcome = by_reward) -> Share | None:
    """The share of pairs that were judged as the labeler did (equal rewards are wrong); None without any."""
    gaps = [gap for row in rows if (gap := outcome(row)) is not None]
    return Share(sum(gap > 0 for gap in gaps), len(gaps)) if gaps else None


def examine(rows: Sequence[PairRow]) -> dict[str, Any]:
    """All figures of a reward model over held-out pairs, for `summary.json`."""
    return {
        "accuracy": _dict(accuracy(rows)),
        "shuffled": _dict(accuracy(rows, by_shuffled_reward)),
        "blind": _dict(accuracy(rows, by_blind_reward)),
        "by_gap": by_gap(rows),
        "by_ranks_apart": _groups(rows, lambda row: str(row.ranks_apart)),
        "by_agreement": _groups(rows, _agreement),
        "by_kinds": by_kinds(rows),
        "calibration": calibration(rows),
        "length": length(rows),
    }


def _dict(share: Share | None) -> dict[str, Any] | None:
    return None if share is None else share.as_dict()


def _groups(rows: Sequence[PairRow], name: Callable[[PairRow], str | None]) -> dict[str, Any]:
    parts: dict[str, list[PairRow]] = {}
    for row in rows:
        if (key := name(row)) is not None:
            parts.setdefault(key, []).append(row)
    return {key: _dict(accuracy(part)) for key, part in sorted(parts.items())}


def _agreement(row: PairRow) -> str | None:
    """Where several judged a pair: whether they all said the same, and on which side this judgement was."""
    if row.votes < 2:
        return None
    if row.agreeing == row.votes:
        return "all agree"
    return "with the majority" if 2 * row.agreeing > row.votes else "half or fewer agree"


def by_kinds(rows: Sequence[PairRow]) -> dict[str, Any]:
    """For each two kinds, the one that is better more often first: the accuracies of the model and of the
    control that reads no prompt, and whether the model's interval is above the control's."""
    parts: dict[tuple[str, ...], list[PairRow]] = {}
    for row in rows:
        if row.kinds is not None:
            parts.setdefault(tuple(sorted(row.kinds)), []).append(row)
    found = {}
    for _, part in sorted(parts.items()):
        own, blind = accuracy(part), accuracy(part, by_blind_reward)
        assert own is not None
        beats = None if blind is None else own.interval[0] > blind.interval[1]
        ((first, second), _) = Counter(row.kinds for row in part if row.kinds).most_common(1)[0]
        figures = {"accuracy": own.as_dict(), "blind": _dict(blind), "beats_blind": beats}
        found[f"{first} against {second}"] = figures
    return found


def by_gap(rows: Sequence[PairRow]) -> list[dict[str, Any]]:
    """Accuracy in quarters of the pairs by the size of the reward gap, the smallest gaps first."""
    ordered = sorted(rows, key=lambda row: abs(row.gap))
    parts = [ordered[i * len(rows) // GAP_PARTS : (i + 1) * len(rows) // GAP_PARTS] for i in range(GAP_PARTS)]
    return [
        {"low_gap": abs(part[0].gap), "high_gap": abs(part[-1].gap), **(_dict(accuracy(part)) or {})}
        for part in parts
        if part
    ]


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x) without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def calibration(rows: Sequence[PairRow]) -> dict[str, Any]:
    """How often the model's favourite is the labeler's, by how sure the model is (sigmoid of the gap, 0.5 to
    1, in equal bins), and the expected calibration error: the mean distance of both, weighted by pairs
    (Naeini et al. 2015; Guo et al. 2017)."""
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(CALIBRATION_BINS)]
    for row in rows:
        sure = sigmoid(abs(row.gap))
        place = min(CALIBRATION_BINS - 1, int((sure - 0.5) * 2 * CALIBRATION_BINS))
        bins[place].append((sure, row.gap > 0))
    found, error = [], 0.0
    for part in bins:
        if part:
            share = Share(sum(right for _, right in part), len(part))
            sure = sum(sure for sure, _ in part) / len(part)
            found.append({"confidence": sure, **share.as_dict()})
            error += abs(sure - share.rate) * len(part) / len(rows)
    return {"bins": found, "expected_error": error if rows else None}


def length(rows: Sequence[PairRow]) -> dict[str, Any]:
    """What length explains.

    `correlation`: Spearman's between reward and tokens over the different completions. `longer_better`: the
    share of labelers' choices that are the longer one; `rule`: what a rule gets that knows only which is
    longer. `controlled`: the mean of the accuracies where the better one is longer and where it is shorter,
    so that a model which reads only length gets 50% (interval by Newcombe 1998). `warning`: the rule is no
    worse than the model, or the controlled accuracy could be 50%.
    """
    texts = {
        key: value
        for row in rows
        for key, value in (
            ((row.prompt, row.better), (row.reward_better, row.tokens_better)),
            ((row.prompt, row.worse), (row.reward_worse, row.tokens_worse)),
        )
    }
    unequal = [row for row in rows if row.tokens_better != row.tokens_worse]
    longer = [row for row in unequal if row.tokens_better > row.tokens_worse]
    shorter = [row for row in unequal if row.tokens_better < row.tokens_worse]
    wins = Share(len(longer), len(unequal))
    rule = Share(max(len(longer), len(shorter)), len(unequal))
    controlled = _mean_share(accuracy(longer), accuracy(shorter))
    own = accuracy(unequal)
    explained = own is not None and own.rate <= rule.rate
    warning = explained or (controlled is not None and controlled["low"] <= 0.5)
    return {
        "correlation": spearman(*map(list, zip(*texts.values(), strict=True))) if texts else None,
        "longer_better": wins.as_dict(),
        "rule": rule.as_dict(),
        "longer": _dict(accuracy(longer)),
        "shorter": _dict(accuracy(shorter)),
        "controlled": controlled,
        "warning": warning,
    }


def _mean_share(a: Share | None, b: Share | None) -> dict[str, float] | None:
    if a is None or b is None:
        return None
    mean = (a.rate + b.rate) / 2
    (low_a, high_a), (low_b, high_b) = a.interval, b.interval
    low = mean - math.hypot(a.rate - low_a, b.rate - low_b) / 2
    high = mean + math.hypot(high_a - a.rate, high_b - b.rate) / 2
    return {"rate": mean, "low": low, "high": high}


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties by mean ranks; None where one of both is constant."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return float(np.corrcoef(_mean_ranks(x), _mean_ranks(y))[0, 1])


def _mean_ranks(values: Sequence[float]) -> list[float]:
    _, places, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return [float(rank) for rank in (ends - (counts - 1) / 2)[places]]


def agreement(prompts: Iterable[Comparison]) -> Share | None:
    """How often two labelers who judged the same two completions chose the same one: the ceiling of what a
    model can reach. None if no two completions were judged twice."""
    agree = total = 0
    for prompt in prompts:
        votes = Counter((pair.better, pair.worse) for pair in prompt.pairs)
        for i, j in {(min(places), max(places)) for places in votes}:
            a, b = votes[i, j], votes[j, i]
            agree += math.comb(a, 2) + math.comb(b, 2)
            total += math.comb(a + b, 2)
    return Share(agree, total) if total else None


def pair_rows(
    prompts: Sequence[Comparison],
    rewards: Sequence[float],
    shuffled: Sequence[float] | None = None,
    blind: Sequence[float] | None = None,
) -> list[PairRow]:
    """A row for each pair; the rewards are of all completions of all prompts, one behind the other, by the
    model and by its controls."""
    rows: list[PairRow] = []
    first = 0
    for prompt in prompts:
        votes = Counter((pair.better, pair.worse) for pair in prompt.pairs)
        texts = [_text(turns) for turns in prompt.completions]
        for pair in prompt.pairs:
            a, b = pair.better, pair.worse
            row = PairRow(
                prompt=_text(prompt.prompt),
                better=texts[a],
                worse=texts[b],
                reward_better=rewards[first + a],
                reward_worse=rewards[first + b],
                tokens_better=sum(prompt.masks[a]),
                tokens_worse=sum(prompt.masks[b]),
                ranks_apart=pair.ranks_apart,
                kinds=pair.kinds,
                votes=votes[a, b] + votes[b, a],
                agreeing=votes[a, b],
                simulated=pair.simulated,
                shuffled_better=None if shuffled is None else shuffled[first + a],
                shuffled_worse=None if shuffled is None else shuffled[first + b],
                blind_better=None if blind is None else blind[first + a],
                blind_worse=None if blind is None else blind[first + b],
            )
            rows.append(row)
        first += len(prompt.ids)
    return rows


def _text(turns: Sequence[Message]) -> str:
    """Turns as a reader wants them: who speaks is said where there are several."""
    texts = [turn.get("content") or json.dumps(turn.get("tool_calls"), ensure_ascii=False) for turn in turns]
    if len(turns) == 1:
        return texts[0]
    return "\n\n".join(f"{turn['role']}: {text}" for turn, text in zip(turns, texts, strict=True))
