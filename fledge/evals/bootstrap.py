"""Intervals by resampling, for what has no formula."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Mean:
    """A mean with its 95% interval; `n` is what was resampled."""

    mean: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float]:
        """For summary files."""
        return asdict(self)


def bootstrap(values: Sequence[float], seed: int, resamples: int = 10_000) -> Mean:
    """The mean of `values` with its percentile interval (Efron 1979) over `resamples` draws of as many.

    Give differences over the same questions for a paired one. Equal values are drawn together, by a
    multinomial over the different ones: the same law, and little work where there are few. Raises ValueError
    for no values.
    """
    if not values:
        raise ValueError("no values to resample")
    different, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    n = len(values)
    random = np.random.default_rng(seed)
    means = [
        random.multinomial(n, counts / n, size=part) @ different / n
        for part in [1000] * (resamples // 1000) + [resamples % 1000]
    ]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return Mean(float(different @ counts / n), float(low), float(high), n)


def together(columns: NDArray[np.float64], seed: int, resamples: int = 10_000) -> list[Mean]:
    """The means of columns (of the same questions, a row each) with 95% intervals that hold for all of them
    at once, so that the one with the largest mean may be picked afterwards.

    Whole rows are resampled, and the intervals are as wide as the largest deviation of any column, in units
    of its standard error, is in 95% of the resamples (Westfall & Young 1993; White 2000). Raises ValueError
    for no rows.
    """
    n = len(columns)
    if not n:
        raise ValueError("no values to resample")
    random = np.random.default_rng(seed)
    means, errors = columns.mean(0), columns.std(0) / math.sqrt(n)
    drawn = [
        random.multinomial(n, np.full(n, 1 / n), size=part) @ columns / n
        for part in [1000] * (resamples // 1000) + [resamples % 1000]
    ]
    scale = np.where(errors > 0, errors, 1.0)  # a column of equal values deviates by nothing
    largest = (np.abs(np.concatenate(drawn) - means) / scale).max(1)
    half = float(np.quantile(largest, 0.95)) * errors
    return [Mean(float(m), float(m - h), float(m + h), n) for m, h in zip(means, half, strict=True)]
