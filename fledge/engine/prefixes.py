"""The prefixes of exact search: those that were expanded, those that are open, and reading them.

Memory is bounded. An open prefix is three numbers, and only as many are kept as expansions are left: no
other could be reached. Of an expanded prefix the keys and values of its last token are kept in a pool, as far
as that goes; what the pool does not hold is computed again.

Shape suffixes: B prefixes read together, T tokens, M heads of keys and values, D head size, C model width,
V vocabulary, N open prefixes. Arrays of NumPy are fp64 unless they hold numbers of prefixes or ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fledge.engine.engine import Engine
from fledge.engine.reading import read_rows
from fledge.engine.sampling import broken_scores
from fledge.engine.search import copy_rows
from fledge.types import pad_rows

# Prefixes that pass through the model together.
PREFIXES_A_PASS = 16
# What the pool of keys and values may take.
POOL_BYTES = 2**30


@dataclass
class Prefixes:
    """Those that were expanded, by number: the last id, its log-probability, the prefix before it (-1: the
    prompt), the number of tokens and of the pool's place (-1: none)."""

    ids: list[int] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)

    def path(self, number: int) -> list[int]:
        """The numbers of a prefix's beginnings, the shortest first."""
        found = []
        while number >= 0:
            found.append(number)
            number = self.parents[number]
        return found[::-1]


@dataclass
class OpenPrefixes:
    """Prefixes that were not expanded: bounds (their log-probabilities), expanded prefixes before them and
    last ids, all (N,); `dropped` is the best bound of those that were not kept, `floor` the least that is
    worth keeping."""

    bounds_N: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    parents_N: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    ids_N: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    dropped: float = -math.inf
    floor: float = -math.inf

    def tidy(self, least: float, most: int) -> None:
        """Sort, best first; keep no more than `most`, and none that is not above `least`."""
        order_N = np.argsort(-self.bounds_N, kind="stable")
        bounds_N = self.bounds_N[order_N]
        count = int(np.searchsorted(-bounds_N, -least, side="left"))
        if count > most:
            self.dropped = max(self.dropped, float(bounds_N[most]))
            self.floor = float(bounds_N[most - 1]) if most else math.inf
            count = most
        self._keep(order_N[:count])

    def take(self, count: int) -> list[tuple[float, int, int]]:
        """The best ones, which are no longer open, when they are sorted."""
        parts = (self.bounds_N, self.parents_N, self.ids_N)
        bounds, parents, ids = (part[:count].tolist() for part in parts)
        self._keep(np.arange(min(count, len(self.bounds_N)), len(self.bounds_N)))
        return [*zip(bounds, parents, ids, strict=True)]

    def add(self, bounds_BV: Tensor, parents: list[int], least: float) -> None:
        """Open what follows after expanded prefixes with each id, where it is above `least`."""
        bounds_N = bounds_BV.flatten()
        bounds_N = torch.where(bounds_N > least, bounds_N, -math.inf)
        is_kept_N = bounds_N > self.floor
        self.dropped = max(self.dropped, float(bounds_N.masked_fill(is_kept_N, -math.inf).max()))
        places_N = is_kept_N.nonzero()[:, 0]
        parents_N = torch.tensor(parents, device=places_N.device)[places_N // bounds_BV.shape[1]]
        new = (bounds_N[places_N], parents_N, places_N % bounds_BV.shape[1])
        bounds, before, ids = (values_N.cpu().numpy() for values_N in new)
        self.bounds_N = np.concatenate([self.bounds_N, bounds])
        self.parents_N = np.concatenate([self.parents_N, before])
        self.ids_N = np.concatenate([self.ids_N, ids])

    def _keep(self, places_N: NDArray[np.int64]) -> None:
        self.bounds_N = self.bounds_N[places_N]
        self.parents_N, self.ids_N = self.parents_N[places_N], self.ids_N[places_N]

    @property
    def bound(self) -> float:
        """The best bound of all, kept or not."""
        return max(self.dropped, float(self.bounds_N.max(initial=-math.inf)))


class PrefixReader:
    """Scores behind prefixes of a prompt's continuations."""

    def __init__(self, engine: Engine, prompt: list[int], room: int, expansions: int) -> None:
        """For up to `expansions` prefixes of up to `room` ids."""
        self.prefixes, self.prompt_tokens = Prefixes(), len(prompt)
        self.slots = engine.new_scheduler(PREFIXES_A_PASS, len(prompt) + room).slots
        self.rows, self.cache = self.slots.rows, self.slots.cache
        self.slots.take(prompt, reuse=False)
        logits_BV, _ = read_rows(self.slots, 0, [prompt], {}, {})
        self.first_BV = _logps(logits_BV)
        copy_rows(self.cache, [0] * self.rows, len(prompt))
        shapes = [(t.shape[1], t.shape[3]) for t in self.cache.layers]
        token_bytes = sum(math.prod(shape) * self.cache.layers[0].itemsize for shape in shapes)
        self.places = min(expansions, POOL_BYTES // token_bytes)
        self._pool = [
            t.new_empty(self.places, *shape) for t, shape in zip(self.cache.layers, shapes, strict=True)
        ]
        self._used = 0

    def read(self, taken: Sequence[tuple[float, int, int]]) -> tuple[list[int], Tensor]:
        """Expand (log-probability, prefix before, last id): their numbers, and the log-probabilities (B, V)
        of what follows."""
        numbers = [self._new(*prefix) for prefix in taken]
        paths = [self.prefixes.path(number) for number in numbers]
        held = [self._fill(row, path) for row, path in enumerate(paths)]
        rests = [[self.prefixes.ids[n] for n in path[h:]] for path, h in zip(paths, held, strict=True)]
        view = self.cache.rows(0, len(taken))
        view.lengths_B = torch.tensor(held, device=self.slots.device) + self.prompt_tokens
        lengths_B = torch.tensor([len(rest) for rest in rests], device=self.slots.device)
        hidden_BTC = self.slots.decoder.extend(pad_rows(rests, 0).to(self.slots.device), lengths_B, view)
        last_BC = hidden_BTC[torch.arange(len(taken), device=self.slots.device), lengths_B - 1]
        for row, path in enumerate(paths):
            self._keep(row, path)
        return numbers, _logps(self.slots.decoder.logits(last_BC))

    def _new(self, total: float, parent: int, token_id: int) -> int:
        prefixes = self.prefixes
        prefixes.totals.append(total)
        prefixes.parents.append(parent)
        prefixes.ids.append(token_id)
        prefixes.places.append(-1)
        return len(prefixes.ids) - 1

    def _fill(self, row: int, path: list[int]) -> int:
        """Copy what the pool has of a prefix's beginning into a row; the number of tokens."""
        places = [self.prefixes.places[number] for number in path]
        held = places.index(-1)
        places_T = torch.tensor(places[:held], dtype=torch.int64, device=self.slots.device)
        for t, pool in zip(self.cache.layers, self._pool, strict=True):
            t[row, :, self.prompt_tokens : self.prompt_tokens + held] = pool[places_T].transpose(0, 1)
        return held

    def _keep(self, row: int, path: list[int]) -> None:
        """Put the keys and values of a prefix's last token into the pool, while there is room."""
        if self._used == self.places:
            return
        for t, pool in zip(self.cache.layers, self._pool, strict=True):
            pool[self._used] = t[row, :, self.prompt_tokens + len(path) - 1]
        self.prefixes.places[path[-1]] = self._used
        self._used += 1


def _logps(logits_BV: Tensor) -> Tensor:
    """Log-probabilities (fp32). Raises UserError for scores that are NaN."""
    if not bool(logits_BV.logsumexp(-1).isfinite().all()):
        raise broken_scores()
    return logits_BV.log_softmax(-1)
