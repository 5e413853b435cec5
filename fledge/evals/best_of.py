"""Best-of-n on a task whose right answers are known: does more of the reward mean more of what was meant?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fledge.evals.bootstrap import Mean, together
from fledge.rewards.best_of import kl_bound


@dataclass(frozen=True)
class BestOf:
    """Means over prompts of the best of n: by the reward that chose it, and by the gold score."""

    n: int
    kl: float
    reward: float
    gold: float


def best_of_weights(total: int, n: int) -> list[float]:
    """The probability that the i-th highest of `total` rewards is the best of `n` drawn without replacement:
    C(total - 1 - i, n - 1) / C(total, n) (Nakano et al. 2021, "WebGPT", appendix I). Raises ValueError for an
    `n` that is not from 1 to `total`."""
    if not 1 <= n <= total:
        raise ValueError(f"the best of {n} cannot be told from {total}")
    return [math.comb(total - 1 - i, n - 1) / math.comb(total, n) for i in range(total)]


def best_of_means(
    rewards: Sequence[Sequence[float]], values: Sequence[Sequence[float]], n: int
) -> NDArray[np.float64]:
    """For each prompt what the best of n of its answers by `rewards` is worth in `values`, on average over
    all draws of n; of equal rewards the first counts as higher. Values may be the rewards themselves."""
    means = []
    for own, worth in zip(rewards, values, strict=True):
        order = np.argsort(-np.asarray(own), kind="stable")
        means.append(float(np.asarray(best_of_weights(len(own), n)) @ np.asarray(worth)[order]))
    return np.asarray(means)


def best_of_curve(
    rewards: Sequence[Sequence[float]], golds: Sequence[Sequence[float]], ns: Sequence[int]
) -> list[BestOf]:
    """For each n the mean over prompts of what the best of n answers is worth, without drawing any: over all
    draws of n of a prompt's answers. `kl` is `kl_bound`."""
    return [
        BestOf(
            n,
            kl_bound(n),
            float(best_of_means(rewards, rewards, n).mean()),
            float(best_of_means(rewards, golds, n).mean()),
        )
        for n in ns
    ]


@dataclass(frozen=True)
class Peak:
    """Where the gold score is highest, and what lies around it."""

    n: int
    share: float
    """The share of resamples of the questions in which it is highest there."""
    gain: Mean
    """From a single answer to the peak."""
    fall: Mean
    """From the peak to the largest n."""


def peak_of(golds: Mapping[int, NDArray[np.float64]], seed: int, resamples: int = 10_000) -> Peak:
    """The peak of the gold score, by n in rising order, of the same questions.

    The peak is picked after looking, so the intervals hold for every n at once (see `together`): a curve
    that only wavers has its peak somewhere, and falls from there, by chance alone.
    """
    ns = list(golds)
    columns = np.stack([golds[n] for n in ns], axis=1)
    place = int(columns.mean(0).argmax())
    gains = together(columns - columns[:, :1], seed, resamples)
    falls = together(columns[:, -1:] - columns, seed, resamples)
    random, n = np.random.default_rng(seed), len(columns)
    drawn = random.multinomial(n, np.full(n, 1 / n), size=resamples) @ columns
    share = float((drawn.argmax(1) == place).mean())
    return Peak(ns[place], share, gains[place], falls[place])
