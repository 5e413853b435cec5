"""Time into accuracy: what several answers to a problem are worth, by the rule that chooses one of them.

All figures for k of n answers are means over draws of k without replacement, so that what is compared is
chance no more than it must be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fledge.evals.best_of import best_of_means
from fledge.evals.bootstrap import bootstrap
from fledge.evals.facts import Share

# Votes are held among all choices of k answers, or where there are more, among so many drawn ones.
DRAWS = 200


@dataclass(frozen=True)
class Sampled:
    """The answers to one problem, in the order in which they were sampled."""

    right: tuple[bool, ...]
    votes: tuple[str | None, ...]
    """What a vote counts of each; None: it gives no answer."""
    tokens: tuple[int, ...]
    rewards: tuple[float, ...] | None = None
    """Of a reward model."""


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that at least one of k answers is right, of n of which `right` are: 1 - C(n - right, k) /
    C(n, k), unbiased (Chen et al. 2021, eq. 1). Raises ValueError unless 1 <= k <= n."""
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be told from {n}")
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def vote_at_k(one: Sampled, k: int, random: np.random.Generator) -> float:
    """The chance that the answer with the most votes is right (self-consistency, Wang et al. 2023), as a mean
    over choices of k of a problem's answers: all, or `DRAWS` drawn ones. A tie is decided by lot: nobody asks
    which of the answers is right. 0 if none gives an answer."""
    n = len(one.right)
    kinds = {vote: number for number, vote in enumerate(dict.fromkeys(v for v in one.votes if v is not None))}
    codes_N = np.array([len(kinds) if vote is None else kinds[vote] for vote in one.votes])
    if math.comb(n, k) <= DRAWS:
        places = np.array(list(combinations(range(n), k)))
    else:
        places = random.random((DRAWS, n)).argsort(1)[:, :k]
    right_N = np.array(one.right, dtype=np.float64)
    return float(_votes(codes_N[places], right_N[places], len(kinds)).mean())


def _votes(codes_DK: NDArray[Any], right_DK: NDArray[Any], kinds: int) -> NDArray[np.float64]:
    """The outcomes of D elections of K votes, each a number below `kinds`, or `kinds` for none."""
    is_for = codes_DK[:, None, :] == np.arange(kinds)[None, :, None]  # (D, kinds, K)
    counts = is_for.sum(2)
    worth = (is_for * right_DK[:, None, :]).sum(2) / np.maximum(counts, 1)
    leads = (counts == counts.max(1, keepdims=True, initial=0)) & (counts > 0)
    shares: NDArray[np.float64] = (leads * worth).sum(1) / np.maximum(leads.sum(1), 1)
    return shares


def sizes(n: int) -> list[int]:
    """1, 2, 4, ... and n."""
    return [*(2**i for i in range(n.bit_length()) if 2**i < n), n]


def mean_with_interval(values: Sequence[float], seed: int) -> dict[str, Any]:
    """`mean`, `low`, `high`, `n` of problems' values and the name of the 95% `interval`: Wilson's where each
    problem is right or wrong, the bootstrap over problems where some have a share."""
    if set(values) <= {0.0, 1.0}:
        share = Share(round(sum(values)), len(values))
        low, high = share.interval
        return {"mean": share.rate, "low": low, "high": high, "n": share.n, "interval": "wilson"}
    return {**bootstrap(values, seed).as_dict(), "interval": "bootstrap"}


def accuracy_curves(problems: Sequence[Sampled], seed: int) -> dict[str, list[dict[str, Any]]]:
    """For each way to choose, a point for every size k: the share of problems answered right, as of
    `mean_with_interval`, with `k` and the mean `tokens` of k answers.

    `verifier`: the best by the verifier itself, so right if any is (pass@k). `vote`: the most frequent one.
    `reward_model`, where there are rewards: the one that it likes most. With k = 1 all are the same: the mean
    over single answers. Raises ValueError without problems, or unless all have as many answers.
    """
    counts = {len(one.right) for one in problems}
    if len(counts) != 1:
        raise ValueError(f"problems must have the same number of answers, not {sorted(counts)}")
    n, random = counts.pop(), np.random.default_rng(seed)
    tokens = sum(sum(one.tokens) for one in problems) / (n * len(problems))
    ways: dict[str, Callable[[int], Sequence[float]]] = {
        "verifier": lambda k: [pass_at_k(n, sum(one.right), k) for one in problems],
        "vote": lambda k: [vote_at_k(one, k, random) for one in problems],
    }
    rewards = [one.rewards for one in problems if one.rewards is not None]
    if len(rewards) == len(problems):
        worth = [[float(right) for right in one.right] for one in problems]
        ways["reward_model"] = lambda k: best_of_means(rewards, worth, k).tolist()
    return {
        way: [{"k": k, "tokens": k * tokens, **mean_with_interval(values_at(k), seed)} for k in sizes(n)]
        for way, values_at in ways.items()
    }
