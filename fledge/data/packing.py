"""Documents and conversations as rows of T + 1 tokens; row r is the same whenever and wherever it is read.

A row has T targets: position t is predicted from those before it. Nothing needs saving to go on in the
middle, and nothing is replayed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from fledge.types import Batch

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class Documents(Protocol):
    """Tokenised documents, each beginning with the document separator."""

    @property
    def lengths(self) -> Ints:
        """Tokens of each document, the separator included."""

    def read(self, document: int, start: int, length: int) -> npt.NDArray[np.integer]:
        """At most `length` tokens of a document from its token `start` on."""


@dataclass(frozen=True)
class Row:
    """T + 1 ids; which are targets (never the first); which belong together (-1: padding)."""

    ids: Ints
    targets: Bools
    segments: Ints


class RowSource(Protocol):
    """An endless sequence of rows, epoch after epoch."""

    @property
    def tokens(self) -> int:
        """Tokens of an epoch; each is a target once, the first separator of all at the end of its epoch."""

    def row(self, number: int) -> Row:
        """Row `number` of the sequence."""

    def targets(self, rows: int) -> int:
        """How many targets the first `rows` rows have."""


@dataclass
class StreamRows:
    """The chosen documents end to end, each epoch shuffled anew, cut into rows wherever a row is full.

    Neighbouring rows overlap by one token, so each token is a target once. No row has padding.
    """

    documents: Documents
    chosen: Ints
    """The documents to read."""
    row_tokens: int
    separator: int
    seed: Sequence[int]
    isolate: bool = False
    """Whether documents of a row are hidden from each other."""

    def __post_init__(self) -> None:
        self._lengths = self.documents.lengths[self.chosen]
        self._tokens = int(self._lengths.sum())
        self._order = lru_cache(maxsize=2)(self._shuffle)

    @property
    def tokens(self) -> int:
        """Tokens of an epoch."""
        return self._tokens

    def row(self, number: int) -> Row:
        """Row `number` of the endless stream."""
        ids = self.window(number * self.row_tokens, self.row_tokens + 1)
        segments = np.cumsum(ids == self.separator) if self.isolate else np.zeros_like(ids)
        targets = np.ones(len(ids), dtype=np.bool_)
        targets[0] = False
        return Row(ids, targets, segments)

    def targets(self, rows: int) -> int:
        """Every row has `row_tokens` targets."""
        return rows * self.row_tokens

    def window(self, start: int, length: int) -> Ints:
        """`length` tokens from position `start` of the endless stream of epochs."""
        parts: list[npt.NDArray[np.integer]] = []
        while length:
            epoch, position = divmod(start, self._tokens)
            order, ends = self._order(epoch)
            index = int(np.searchsorted(ends, position, side="right"))
            within = position - int(ends[index] - self._lengths[order[index]])
            part = self.documents.read(int(self.chosen[order[index]]), within, length)
            parts.append(part)
            start, length = start + len(part), length - len(part)
        return np.concatenate(parts).astype(np.int64)

    def _shuffle(self, epoch: int) -> tuple[Ints, Ints]:
        order = np.random.default_rng([*self.seed, epoch]).permutation(len(self.chosen))
        return order, np.cumsum(self._lengths[order])


def best_fit(lengths: Sequence[int], capacity: int) -> tuple[list[int], int]:
    """The row of each piece, in turn put into the fullest open row that it fits in, and how many rows that
    takes. Packing of this kind cuts few documents and pads little (Ding et al. 2024, "Fewer truncations
    improve language modeling").
    """
    rows_with_room: list[list[int]] = [[] for _ in range(capacity)]
    rooms = 0  # bit r is set while a row has room for exactly r tokens
    row_of: list[int] = []
    count = 0
    for need in lengths:
        enough = rooms >> need
        if enough:
            room = need + (enough & -enough).bit_length() - 1
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms ^= 1 << room
        else:
            row, room, count = count, capacity, count + 1
        row_of.append(row)
        if room > need:
            rows_with_room[room - need].append(row)
            rooms |= 1 << (room - need)
    return row_of, count


class BestFitPlan:
    """Which pieces stand in which row: pieces in each epoch's random order by best fit, rows shuffled."""

    def __init__(self, lengths: Ints, capacity: int, seed: Sequence[int]) -> None:
        self._lengths, self._capacity, self._seed = lengths, capacity, list(seed)
        self._first_rows = [0]
        self._pack = lru_cache(maxsize=2)(self._pack_epoch)

    def epoch_rows(self, epoch: int) -> int:
        """How many rows an epoch takes."""
        return len(self._pack(epoch)[1]) - 1

    def row(self, number: int) -> Ints:
        """The pieces of a row, in their order in it."""
        epoch, row = self.locate(number)
        pieces, starts = self._pack(epoch)
        return pieces[starts[row] : starts[row + 1]]

    def locate(self, number: int) -> tuple[int, int]:
        """The epoch of a row, and its number in it."""
        while self._first_rows[-1] <= number:
            self._first_rows.append(self._first_rows[-1] + self.epoch_rows(len(self._first_rows) - 1))
        epoch = bisect_right(self._first_rows, number) - 1
        return epoch, number - self._first_rows[epoch]

    def before(self, epoch: int, row: int) -> Ints:
        """The pieces in the first `row` rows of an epoch."""
        pieces, starts = self._pack(epoch)
        return pieces[: starts[row]]

    def _pack_epoch(self, epoch: int) -> tuple[Ints, Ints]:
        order = np.random.default_rng([*self._seed, epoch]).permutation(len(self._lengths))
        row_of, count = best_fit(self._lengths[order].tolist(), self._capacity)
        place = np.argsort(np.random.default_rng([*self._seed, epoch, 1]).permutation(count))
        rows = place[np.asarray(row_of, dtype=np.int64)]
        by_row = np.argsort(rows, kind="stable")
        return order[by_row], np.searchsorted(rows[by_row], np.arange(count + 1))


class BestFitRows:
    """The chosen documents in rows by best fit: whole where they fit, else cut into full rows and a rest.

    Each piece begins with the token before its first target, and a document's last target is the separator
    behind it, so every token of an epoch is a target once, as in a stream.
    """

    def __init__(
        self,
        documents: Documents,
        chosen: Ints,
        row_tokens: int,
        separator: int,
        seed: Sequence[int],
        isolate: bool = False,
    ) -> None:
        self._documents, self._separator, self._isolate = documents, separator, isolate
        self._capacity = row_tokens + 1
        targets = documents.lengths[chosen]
        self.tokens = int(targets.sum())
        counts = -(-targets // row_tokens)
        self._document = np.repeat(chosen, counts)
        self._start = (np.arange(len(self._document)) - np.repeat(np.cumsum(counts) - counts, counts)) * (
            row_tokens
        )
        self._targets = np.minimum(row_tokens, np.repeat(targets, counts) - self._start)
        self._plan = BestFitPlan(self._targets + 1, self._capacity, seed)

    def row(self, number: int) -> Row:
        """Row `number` of the endless sequence of epochs."""
        ids = np.full(self._capacity, self._separator, dtype=np.int64)
        targets = np.zeros(self._capacity, dtype=np.bool_)
        segments = np.full(self._capacity, -1, dtype=np.int64)
        at = 0
        for segment, piece in enumerate(self._plan.row(number)):
            length = int(self._targets[piece]) + 1
            read = self._documents.read(int(self._document[piece]), int(self._start[piece]), length)
            ids[at : at + len(read)] = read  # the separator behind the document is not stored with it
            targets[at + 1 : at + length] = True
            segments[at : at + length] = segment if self._isolate else 0
            at += length
        return Row(ids, targets, segments)

    def targets(self, rows: int) -> int:
        """Targets of the first `rows` rows."""
        epoch, row = self._plan.locate(rows)
        return epoch * self.tokens + int(self._targets[self._plan.before(epoch, row)].sum())


@dataclass
class ConversationRows:
    """Conversations packed into rows of T + 1 tokens, whole, hidden from each other."""

    ids: list[list[int]]
    masks: list[list[bool]]
    row_tokens: int
    padding: int
    seed: int
    _plan: BestFitPlan = field(init=False, repr=False)

    def __post_init__(self) -> None:
        lengths = np.array([len(ids) for ids in self.ids], dtype=np.int64)
        self._plan = BestFitPlan(lengths, self.row_tokens + 1, [self.seed])

    def epoch_rows(self, epoch: int) -> int:
        """How many rows an epoch takes."""
        return self._plan.epoch_rows(epoch)

    def rows(self, first: int, count: int) -> Batch:
        """Rows `first` to `first + count` of the endless sequence of epochs."""
        length = self.row_tokens + 1
        input_ids = torch.full((count, length), self.padding, dtype=torch.int64)
        loss_mask = torch.zeros((count, length), dtype=torch.bool)
        segment_ids = torch.full((count, length), -1, dtype=torch.int64)
        for i in range(count):
            at = 0
            for segment, index in enumerate(self._plan.row(first + i).tolist()):
                end = at + len(self.ids[index])
                input_ids[i, at:end] = torch.tensor(self.ids[index])
                loss_mask[i, at:end] = torch.tensor(self.masks[index])
                loss_mask[i, at] = False  # nothing comes before it to predict it from
                segment_ids[i, at:end] = segment
                at = end
        return Batch(input_ids, loss_mask, segment_ids)
