"""Batches as a pure function of (seed, step): nothing to save, nothing to replay when a run is resumed.

Shape suffixes: B rows, T tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from fledge.types import Batch

Ints = npt.NDArray[np.int64]


def interleave(shares: Sequence[float], rows: int) -> Ints:
    """Which source each row comes from: at every prefix each of k sources is within 1 - 1/(2k - 2) rows of
    its share (Tijdeman 1980, "The chairman assignment problem").

    Of the sources far enough behind their share, the row goes to the one that could wait the shortest.
    """
    weights = np.asarray(shares, dtype=np.float64) / np.sum(shares)
    given = np.zeros(len(weights))
    slack = 1 / max(2, 2 * len(weights) - 2)
    schedule = np.empty(rows, dtype=np.int64)
    for row in range(rows):
        behind = weights * (row + 1) - given
        patience = np.where(behind >= slack - 1e-9, (1 - slack - behind) / weights, np.inf)
        source = int(np.argmin(patience))
        given[source] += 1
        schedule[row] = source
    return schedule


@dataclass
class TokenSource:
    """The tokenised documents of one source, end to end, each beginning with the document separator."""

    name: str
    tokens: npt.NDArray[np.int32]
    starts: Ints
    """First token of each document, and the total length at the end."""
    seed: int
    _orders: dict[int, tuple[Ints, Ints]] = field(default_factory=dict, repr=False)

    @classmethod
    def from_documents(
        cls, name: str, documents: Sequence[Sequence[int]], separator: int, seed: int
    ) -> TokenSource:
        """Put the separator before every document and join them."""
        lengths = [len(document) + 1 for document in documents]
        tokens = np.empty(sum(lengths), dtype=np.int32)
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        for document, start in zip(documents, starts, strict=False):
            tokens[start] = separator
            tokens[start + 1 : start + 1 + len(document)] = document
        return cls(name, tokens, starts, seed)

    def __len__(self) -> int:
        return len(self.tokens)

    def window(self, start: int, length: int) -> Ints:
        """`length` tokens from position `start` of the endless stream of epochs, each epoch shuffled anew."""
        parts: list[npt.NDArray[np.int32]] = []
        while length:
            epoch, position = divmod(start, len(self))
            order, ends = self._order(epoch)
            index = int(np.searchsorted(ends, position, side="right"))
            document = int(order[index])
            offset = position - int(ends[index] - (self.starts[document + 1] - self.starts[document]))
            begin = int(self.starts[document]) + offset
            part = self.tokens[begin : min(begin + length, int(self.starts[document + 1]))]
            parts.append(part)
            start, length = start + len(part), length - len(part)
        return np.concatenate(parts).astype(np.int64)

    def _order(self, epoch: int) -> tuple[Ints, Ints]:
        if epoch not in self._orders:
            if len(self._orders) > 2:
                self._orders.clear()
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.starts) - 1)
            self._orders[epoch] = (order, np.cumsum(np.diff(self.starts)[order]))
        return self._orders[epoch]


@dataclass
class Mixture:
    """Rows of T + 1 tokens drawn from several sources by their shares."""

    sources: list[TokenSource]
    shares: list[float]
    row_tokens: int
    """T: how many targets a row has. Neighbouring windows overlap by one token, so each is a target once."""
    separator: int
    isolate: bool = False
    """Whether documents of a row are hidden from each other."""
    _schedule: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64), repr=False)
    _ranks: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64), repr=False)

    def rows(self, first: int, count: int) -> Batch:
        """Rows `first` to `first + count` of the run, whatever was read before."""
        self._extend(first + count)
        T = self.row_tokens
        chosen = [(int(self._schedule[r]), int(self._ranks[r])) for r in range(first, first + count)]
        ids = np.stack([self.sources[source].window(rank * T, T + 1) for source, rank in chosen])
        input_ids = torch.from_numpy(ids)
        segments = (input_ids == self.separator).cumsum(dim=1) if self.isolate else None
        return Batch(input_ids, torch.ones_like(input_ids, dtype=torch.bool), segments)

    def seen(self, rows: int) -> list[int]:
        """Tokens of each source among the first `rows` rows."""
        self._extend(rows)
        counts = np.bincount(self._schedule[:rows], minlength=len(self.sources))
        return [int(count) * self.row_tokens for count in counts]

    def _extend(self, rows: int) -> None:
        if rows <= len(self._schedule):
            return
        rows = max(rows, 2 * len(self._schedule), 1024)
        self._schedule = interleave(self.shares, rows)
        self._ranks = np.empty(rows, dtype=np.int64)
        for source in range(len(self.sources)):
            where = np.flatnonzero(self._schedule == source)
            self._ranks[where] = np.arange(len(where))


@dataclass
class ConversationRows:
    """Conversations packed into rows of T + 1 tokens, whole, hidden from each other."""

    ids: list[list[int]]
    masks: list[list[bool]]
    row_tokens: int
    padding: int
    seed: int
    _first_rows: list[int] = field(default_factory=lambda: [0], repr=False)

    def __post_init__(self) -> None:
        self._pack = lru_cache(maxsize=3)(self._pack_epoch)

    def epoch_rows(self, epoch: int) -> int:
        """How many rows an epoch takes."""
        return len(self._pack(epoch))

    def rows(self, first: int, count: int) -> Batch:
        """Rows `first` to `first + count` of the endless sequence of epochs."""
        rows = [self._row(r) for r in range(first, first + count)]
        length = self.row_tokens + 1
        input_ids = torch.full((count, length), self.padding, dtype=torch.int64)
        loss_mask = torch.zeros((count, length), dtype=torch.bool)
        segment_ids = torch.full((count, length), -1, dtype=torch.int64)
        for i, row in enumerate(rows):
            at = 0
            for segment, index in enumerate(row):
                end = at + len(self.ids[index])
                input_ids[i, at:end] = torch.tensor(self.ids[index])
                loss_mask[i, at:end] = torch.tensor(self.masks[index])
                loss_mask[i, at] = False  # nothing comes before it to predict it from
                segment_ids[i, at:end] = segment
                at = end
        return Batch(input_ids, loss_mask, segment_ids)

    def _row(self, row: int) -> list[int]:
        while self._first_rows[-1] <= row:
            self._first_rows.append(self._first_rows[-1] + self.epoch_rows(len(self._first_rows) - 1))
        epoch = bisect_right(self._first_rows, row) - 1
        return self._pack(epoch)[row - self._first_rows[epoch]]

    def _pack_epoch(self, epoch: int) -> list[list[int]]:
        """Best fit in the epoch's random order: each conversation goes to the fullest open row it fits in."""
        capacity = self.row_tokens + 1
        rows: list[list[int]] = []
        open_rows: dict[int, list[int]] = {}  # free tokens -> rows with exactly that much room
        for index in np.random.default_rng([self.seed, epoch]).permutation(len(self.ids)).tolist():
            need = len(self.ids[index])
            room = min((free for free in open_rows if free >= need), default=None)
            if room is None:
                row, room = len(rows), capacity
                rows.append([])
            else:
                row = open_rows[room].pop()
                if not open_rows[room]:
                    del open_rows[room]
            rows[row].append(index)
            if room > need:
                open_rows.setdefault(room - need, []).append(row)
        order = np.random.default_rng([self.seed, epoch, 1]).permutation(len(rows))
        return [rows[r] for r in order]
