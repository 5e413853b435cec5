"""The rows of one static cache as places that requests take and leave.

Taken rows come first: rows [0, used) decode together through a view of the cache, and a row that leaves
changes places with the last taken one. What a free row has read stays until another request needs the row,
so a prompt that begins like one that was read (another sample, a later turn) is read from there on only.

Shape suffixes: R rows, S slots, B rows at work, T tokens, C model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fledge.engine.language_model import LanguageModel

# A common prefix shorter than this costs less to read again than to copy.
MIN_SHARED_PREFIX_TOKENS = 32
# Rows are found by this many of their first ids: a prompt as long as that has one token left to read.
START_TOKENS = MIN_SHARED_PREFIX_TOKENS - 1
# Longer prompts pass through the model in pieces of this many tokens: it bounds memory.
PIECE_TOKENS = 2048


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two lists begin with in common."""
    low, high = 0, min(len(first), len(second))
    while low < high:  # halving, because comparing slices is much faster than comparing ids one by one
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class Slots:
    """A cache of `rows` sequences of up to `slots` tokens. All calls belong under `torch.inference_mode`."""

    def __init__(self, decoder: LanguageModel, rows: int, slots: int) -> None:
        self.decoder, self.rows, self.slots = decoder, rows, slots
        self.cache = decoder.new_cache(rows, slots)
        self.device = self.cache.lengths_B.device
        self.ids_RS = torch.zeros(rows, slots + 1, dtype=torch.int64, device=self.device)
        self.used = 0
        self._held: list[list[int]] = [[] for _ in range(rows)]  # the ids whose keys and values a row has
        self._begun: dict[tuple[int, ...], set[int]] = {}  # rows by the START_TOKENS ids that they begin with
        self._freed_at = [0] * rows
        self._clock = 0

    def shared(self, prompt: Sequence[int]) -> tuple[int, int]:
        """(tokens, row): the row that has read most of what a prompt begins with, or zeros where no row has
        read enough to matter. At least one token is left to read, for its scores."""
        length, found = 0, 0
        for row in sorted(self._begun.get(tuple(prompt[:START_TOKENS]), ())):
            held = self._held[row]
            # One id tells most rows apart: whole lists are compared only where this one may have more.
            if len(held) > length and held[length] == prompt[length]:
                common = common_prefix(prompt, held)
                if common > length:
                    length, found = common, row
            if length == len(prompt):
                break
        return min(length, len(prompt) - 1), found

    def take(self, prompt: Sequence[int], reuse: bool = True) -> int:
        """Give a prompt the row number `used`; returns how many of its tokens the row has read already."""
        length, source = self.shared(prompt) if reuse else (0, 0)
        if length < MIN_SHARED_PREFIX_TOKENS:
            length = 0
        freed_at = self._freed_at[self.used :]
        row = self.used + freed_at.index(min(freed_at))
        if length and source >= self.used and 2 * length >= len(self._held[source]):
            row = source  # little of what it holds is lost
        elif length and source != row:
            for t in self.cache.layers:
                t[row, :, :length] = t[source, :, :length]
        self._hold(row, list(prompt[:length]))
        self._swap(row, self.used)
        self.cache.lengths_B[self.used] = length
        self.ids_RS[self.used, : len(prompt)] = torch.tensor(prompt, device=self.device)
        self.used += 1
        return length

    def read(self, first: int, ids: list[list[int]]) -> Iterator[tuple[int, Tensor]]:
        """Read the rest of some prompts into the rows from `first` on, in pieces: yields the place of the
        piece's first token in the lists of `ids`, and the trunk's output (B, T, C). Read it to its end."""
        view = self.cache.rows(first, first + len(ids))
        for start in range(0, max(map(len, ids)), PIECE_TOKENS):
            piece = [row[start : start + PIECE_TOKENS] for row in ids]
            lengths_B = torch.tensor([len(row) for row in piece], device=self.device)
            longest = max(map(len, piece))
            # Padded with the row's own ids: one with a damaged embedding must not leave NaN in other rows.
            padded = [row + whole[:1] * (longest - len(row)) for row, whole in zip(piece, ids, strict=True)]
            yield start, self.decoder.extend(torch.tensor(padded, device=self.device), lengths_B, view)
        self.cache.lengths_B[first : first + len(ids)] = view.lengths_B
        for row, new in enumerate(ids, start=first):
            self._hold(row, self._held[row] + new)

    def step(self, ids: Sequence[int]) -> Tensor:
        """Read one more token in every taken row; scores (B, V) of the next."""
        view = self.cache.rows(0, self.used)
        logits_BV = self.decoder.step(torch.tensor(ids, device=self.device), view)
        self.cache.lengths_B[: self.used] = view.lengths_B
        for row, token_id in enumerate(ids):
            if len(self._held[row]) < START_TOKENS:
                self._hold(row, [*self._held[row], token_id])
            else:
                self._held[row].append(token_id)
        return logits_BV

    def cut(self, lengths: Sequence[int]) -> None:
        """Forget what the first rows have read beyond some lengths."""
        for row, length in enumerate(lengths):
            if length < START_TOKENS:
                self._hold(row, self._held[row][:length])
            else:
                del self._held[row][length:]
        self.cache.lengths_B[: len(lengths)] = torch.tensor(lengths, device=self.device)

    def held(self, row: int) -> list[int]:
        """The ids that a row has read."""
        return self._held[row]

    def note(self, rows: Sequence[int], positions: Sequence[int], ids: Sequence[int]) -> None:
        """Write down in `ids_RS` which ids rows have at some positions."""
        places = torch.tensor([[*rows], [*positions], [*ids]], dtype=torch.int64, device=self.device)
        self.ids_RS[places[0], places[1]] = places[2]

    def leave(self, row: int, keep: bool = True) -> None:
        """Free a row; the last taken row takes its place. `keep` False: its keys may hold NaN, wipe them."""
        if not keep:
            self._hold(row, [])
            for t in self.cache.layers:
                t[row] = 0.0
        self.used -= 1
        self._clock += 1
        self._freed_at[row] = self._clock
        self._swap(row, self.used)

    def clear(self) -> None:
        """Free all rows and forget what they have read."""
        for t in (*self.cache.layers, self.cache.lengths_B):
            t.zero_()
        self.used = 0
        self._held = [[] for _ in range(self.rows)]
        self._begun = {}

    def adopt(self, other: Slots) -> None:
        """Copy what the free rows of another cache of the same model have read, as far as it fits."""
        newest = sorted(range(other.used, other.rows), key=lambda row: -other._freed_at[row])
        for row, source in zip(range(self.rows), newest, strict=False):
            length = min(len(other._held[source]), self.slots)
            for t, old in zip(self.cache.layers, other.cache.layers, strict=True):
                t[row, :, :length] = old[source, :, :length]
            self._hold(row, other._held[source][:length])
            self._freed_at[row] = other._freed_at[source]
        self._clock = other._clock

    def _swap(self, one: int, other: int) -> None:
        if one == other:
            return
        length = max(len(self._held[one]), len(self._held[other]))
        for t in self.cache.layers:
            kept = t[one, :, :length].clone()
            t[one, :, :length] = t[other, :, :length]
            t[other, :, :length] = kept
        pair, swapped = [one, other], [other, one]
        self.cache.lengths_B[pair] = self.cache.lengths_B[swapped]
        self.ids_RS[pair] = self.ids_RS[swapped]
        held = self._held[one]
        self._hold(one, self._held[other])
        self._hold(other, held)
        freed_at = self._freed_at
        freed_at[one], freed_at[other] = freed_at[other], freed_at[one]

    def _hold(self, row: int, ids: list[int]) -> None:
        """Note what a row has read."""
        old, new = tuple(self._held[row][:START_TOKENS]), tuple(ids[:START_TOKENS])
        self._held[row] = ids
        if old == new:
            return
        if len(old) == START_TOKENS:
            self._begun[old].discard(row)
            if not self._begun[old]:
                del self._begun[old]
        if len(new) == START_TOKENS:
            self._begun.setdefault(new, set()).add(row)
