"""Drafts for speculative decoding: the text itself (prompt look-up), and a smaller model.

Shape suffixes: B rows, T proposals of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.engine.generation import Generation
from fledge.engine.language_model import LanguageModel
from fledge.engine.processors import draw
from fledge.engine.reading import read_rows
from fledge.engine.sampling import Sampler, uniform
from fledge.engine.slots import MIN_SHARED_PREFIX_TOKENS, Slots, common_prefix
from fledge.errors import UserError

# A text is looked up by this many of its last ids, the most first.
LOOKUP_TOKENS = (3, 2)


class Proposal(NamedTuple):
    """Ids that may come next, and what each was drawn from (T, V); None: they were not drawn."""

    ids: list[int]
    probabilities_TV: Tensor | None = None


class Draft(Protocol):
    """Guesses how completions go on."""

    def propose(self, running: Sequence[Generation], most: Sequence[int]) -> list[Proposal]:
        """For each completion at most so many ids. When sampling they are drawn (`uniform`, purpose `draft`)
        or depend on nothing but the ids so far."""
        ...


# Makes a draft for (rows, slots) of a scheduler's cache.
NewDraft = Callable[[int, int], Draft]


class LookupDraft:
    """What followed the last time that the text's last ids stood in it (Saxena 2023, "Prompt lookup
    decoding"); a repetition goes on repeating."""

    def __init__(self) -> None:
        self._seen: WeakKeyDictionary[Generation, _Places] = WeakKeyDictionary()

    def propose(self, running: Sequence[Generation], most: Sequence[int]) -> list[Proposal]:
        """See `Draft`."""
        return [
            Proposal(self._find(g, count) if count > 0 else [])
            for g, count in zip(running, most, strict=True)
        ]

    def _find(self, generation: Generation, count: int) -> list[int]:
        places = self._seen.setdefault(generation, _Places())
        ids = generation.row.ids
        start = places.look_up(ids)
        found: list[int] = []
        while start is not None and len(found) < count:
            place = start + len(found)
            found.append(ids[place] if place < len(ids) else found[place - len(ids)])
        return found


class _Places:
    """Where in a growing list of ids the runs of a few ids end."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, ...], int] = {}
        self._known = 0

    def look_up(self, ids: list[int]) -> int | None:
        """The place behind the last time, before its end, that the list has the ids it ends with."""
        for end in range(self._known, len(ids)):
            for length in LOOKUP_TOKENS:
                if end >= length:
                    self._places[tuple(ids[end - length : end])] = end
        self._known = len(ids)
        runs = (self._places.get(tuple(ids[-length:])) for length in LOOKUP_TOKENS if len(ids) > length)
        return next((place for place in runs if place is not None), None)


class ModelDraft:
    """What a smaller model writes, at the request's temperature and cuts; penalties, bans and constraints
    only show in what is kept. A text that is longer than its context gets no proposals."""

    def __init__(self, decoder: LanguageModel, vocab_size: int, rows: int, slots: int) -> None:
        """`vocab_size` is that of the model it writes for."""
        self._vocab_size = vocab_size
        self._slots = Slots(decoder, rows, min(slots, decoder.config.max_position_embeddings))
        self._readers: list[Generation] = []  # number i has row i
        self._sampler: Sampler | None = None

    def propose(self, running: Sequence[Generation], most: Sequence[int]) -> list[Proposal]:
        """See `Draft`. Raises UserError for a draft model whose scores are NaN."""
        room = self._slots.slots
        wanted = {
            generation: count
            for generation, count in zip(running, most, strict=True)
            if count > 0 and len(generation.row.ids) + count <= room
        }
        if not wanted:
            return [Proposal([])] * len(running)
        self._seat(wanted)
        counts = [wanted[reader] for reader in self._readers]
        made = dict(zip(self._readers, self._write(counts), strict=True))
        return [made.get(generation, Proposal([])) for generation in running]

    def _seat(self, wanted: Collection[Generation]) -> None:
        """Give exactly these completions rows. Long texts that are new here are read, but for the last id;
        one after the other, so that samples of one prompt share it."""
        for i in reversed(range(len(self._readers))):
            if self._readers[i] not in wanted:
                self._slots.leave(i)
                last = self._readers.pop()
                if i < len(self._readers):
                    self._readers[i] = last
                self._sampler = None
        seated = set(self._readers)
        for generation in wanted:
            if generation not in seated:
                ids = generation.row.ids
                rest = ids[self._slots.take(ids) : -1]
                if len(rest) >= MIN_SHARED_PREFIX_TOKENS:
                    read_rows(self._slots, len(self._readers), [rest], {}, {})
                self._readers.append(generation)
                self._sampler = None

    def _write(self, counts: list[int]) -> list[Proposal]:
        """So many tokens for each reader."""
        rows = [reader.row for reader in self._readers]
        if self._sampler is None:
            self._sampler = Sampler(rows, self._slots.device)
        known = [
            min(common_prefix(self._slots.held(i), row.ids), len(row.ids) - 1) for i, row in enumerate(rows)
        ]
        self._slots.cut(known)
        unread = [row.ids[length:] for row, length in zip(rows, known, strict=True)]
        logits_BV, _ = read_rows(self._slots, 0, unread, {}, {})
        ids: list[list[int]] = [[] for _ in rows]
        probabilities: list[Tensor] = []
        for i in range(max(counts)):
            if i:
                logits_BV = self._slots.step([made[-1] for made in ids])
            new, p_BV = self._choose(logits_BV[:, : self._vocab_size], i)
            probabilities += [] if p_BV is None else [p_BV]
            for made, token_id in zip(ids, new, strict=True):
                made.append(token_id)
        p_BTV = torch.stack(probabilities, dim=1) if probabilities else None
        return [
            Proposal(made[:count], None if p_BTV is None or row.params.temperature == 0 else p_BTV[b, :count])
            for b, (row, made, count) in enumerate(zip(rows, ids, counts, strict=True))
        ]

    def _choose(self, logits_BV: Tensor, ahead: int) -> tuple[list[int], Tensor | None]:
        """An id for each row, `ahead` places behind its last, and the probabilities that it was drawn from;
        None if none was drawn."""
        assert self._sampler is not None
        if not bool(logits_BV.logsumexp(-1).isfinite().all()):
            raise UserError(
                "the draft model gives no finite scores (NaN or infinity); its weights are damaged"
            )
        best_B = logits_BV.argmax(-1)
        if self._sampler.all_greedy:
            return best_B.tolist(), None
        warped_BV = self._sampler.warp(logits_BV)
        draws = [
            uniform(r.params.seed, r.number, r.sample, r.made + ahead, "draft") for r in self._sampler.rows
        ]
        uniform_B = torch.tensor(draws, dtype=torch.float64, device=logits_BV.device)
        ids_B = torch.where(self._sampler.greedy_B, best_B, draw(warped_BV, uniform_B))
        p_BV = warped_BV.softmax(-1)
        return ids_B.tolist(), F.pad(p_BV, (0, self._vocab_size - p_BV.shape[1]))
