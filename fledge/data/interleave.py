"""Several sources as one sequence of rows that keeps their shares from the first row on.

The global batch is a pure function of (seed, step): rows are numbered over the whole run, and whoever needs
some of them (a rank, a resumed run) reads those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fledge.data.packing import RowSource
from fledge.types import Batch

# How many rows are planned ahead: enough to do it rarely, few enough that nobody notices (5 us a row).
BLOCK_ROWS = 2**14


class Schedule:
    """Which source each row comes from: at every prefix each of k sources is within 1 - 1/(2k - 2) rows of
    its share (Tijdeman 1980, "The chairman assignment problem").

    Of the sources far enough behind their share, the row goes to the one that could wait the shortest.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        self._weights = np.asarray(shares, dtype=np.float64) / np.sum(shares)
        self._given = np.zeros(len(shares), dtype=np.int64)
        self._sources = np.empty(0, dtype=np.int32)
        self._ranks = np.empty(0, dtype=np.int64)

    def row(self, number: int) -> tuple[int, int]:
        """The source of a row, and which of that source's rows it is."""
        if len(self._weights) == 1:
            return 0, number
        self._extend(number + 1)
        return int(self._sources[number]), int(self._ranks[number])

    def counts(self, rows: int) -> list[int]:
        """How many of the first `rows` rows each source has."""
        if len(self._weights) == 1:
            return [rows]
        self._extend(rows)
        counts = np.bincount(self._sources[:rows], minlength=len(self._weights))
        return [int(count) for count in counts]

    def _extend(self, rows: int) -> None:
        done = len(self._sources)
        if rows <= done:
            return
        more = max(rows - done, min(done, BLOCK_ROWS), 1024)
        sources, ranks = np.empty(more, dtype=np.int32), np.empty(more, dtype=np.int64)
        slack = 1 / max(2, 2 * len(self._weights) - 2)
        for i in range(more):
            behind = self._weights * (done + i + 1) - self._given
            patience = np.where(behind >= slack - 1e-9, (1 - slack - behind) / self._weights, np.inf)
            source = int(np.argmin(patience))
            sources[i], ranks[i] = source, self._given[source]
            self._given[source] += 1
        self._sources = np.concatenate([self._sources, sources])
        self._ranks = np.concatenate([self._ranks, ranks])


@dataclass
class Mixture:
    """Rows of T + 1 tokens drawn from several sources by their shares."""

    sources: Sequence[RowSource]
    shares: Sequence[float]
    hidden: bool = True
    """Whether rows hide parts from each other or have padding, so that batches need segment ids."""
    _schedule: Schedule = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._schedule = Schedule(self.shares)

    def rows(self, first: int, count: int) -> Batch:
        """Rows `first` to `first + count` of the run, whatever was read before."""
        rows = []
        for number in range(first, first + count):
            source, rank = self._schedule.row(number)
            rows.append(self.sources[source].row(rank))

        def stack(arrays: Sequence[npt.NDArray[Any]]) -> torch.Tensor:
            return torch.from_numpy(np.stack(arrays))

        segments = stack([row.segments for row in rows]) if self.hidden else None
        return Batch(stack([row.ids for row in rows]), stack([row.targets for row in rows]), segments)

    def targets(self, rows: int) -> list[int]:
        """How many targets of each source the first `rows` rows have."""
        counts = self._schedule.counts(rows)
        return [source.targets(count) for source, count in zip(self.sources, counts, strict=True)]
