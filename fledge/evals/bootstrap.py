"""Intervals by resampling, for what has no formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np


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
