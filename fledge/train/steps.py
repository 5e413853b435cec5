"""What a stage gives the training loop to learn from: steps of micro-batches, shared out among ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fledge.train.parallel import ALONE, Ranks
from fledge.types import Batch

Metrics = dict[str, float]


class MicroBatch(Protocol):
    """What the loop asks of a batch; `Batch` describes it. No tokens: nothing to learn from."""

    def to(self, device: torch.device) -> Any:
        """The same batch on a device."""
        ...

    def num_tokens(self) -> int:
        """How many tokens are read."""
        ...

    def denominators(self) -> dict[str, int]:
        """What losses are averaged over, `tokens` among it."""
        ...


@dataclass(frozen=True)
class Idle:
    """A micro-batch of another rank, gone through so that all take part in every pass; it does not count."""

    batch: MicroBatch

    def to(self, device: torch.device) -> Any:
        """The batch itself on a device."""
        return self.batch.to(device)

    def num_tokens(self) -> int:
        """None that count."""
        return 0

    def denominators(self) -> dict[str, int]:
        """None, by their names."""
        return dict.fromkeys(self.batch.denominators(), 0)


def own_batches(ranks: Ranks, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """This rank's of all micro-batches of a step. Those of one kind: each rank has as many, and in each round
    all compute the same way."""
    return [batches[i] if counts else Idle(batches[i]) for i, counts in ranks.turns(len(batches))]


@dataclass
class Step:
    """One optimizer step: all of its micro-batches (of this rank: see `own_batches`), whether a save may
    follow it, and what the generator wants handed back when it is resumed behind that save. `figures` are
    logged where nothing is learned."""

    batches: Sequence[MicroBatch]
    may_save: bool = True
    state: dict[str, Any] = field(default_factory=dict)
    figures: Metrics = field(default_factory=dict)


# (first step, saved state, metrics of the step before, if there was one) -> a generator of steps, which is
# sent the metrics of each of its own.
Steps = Callable[[int, dict[str, Any], Metrics | None], Generator[Step, Metrics | None, None]]


def row_steps(
    rows: Callable[[int, int], Batch], batch_rows: int, micro_rows: int, ranks: Ranks = ALONE
) -> Steps:
    """Steps of `batch_rows` rows from the endless sequence that `rows(first, count)` reads, `micro_rows` at
    once; a rank reads its own of them."""
    spans = _row_spans(batch_rows, micro_rows, ranks.count)

    def steps(
        first: int, _state: dict[str, Any], _metrics: Metrics | None
    ) -> Generator[Step, Metrics | None, None]:
        for step in itertools.count(first):
            start = step * batch_rows
            batches: list[MicroBatch] = []
            for i, counts in ranks.turns(len(spans)):
                batch = rows(start + spans[i].start, len(spans[i]))
                batches.append(batch if counts else Idle(batch))
            yield Step(batches)

    return steps


def _row_spans(rows: int, most: int, ranks: int) -> list[range]:
    """So many rows in parts of at most `most`; for several ranks in as equal parts as can be, so many that
    each rank has as many of them, while there are rows."""
    if ranks == 1:
        return [range(first, min(first + most, rows)) for first in range(0, rows, most)]
    count = min(rows, ranks * -(-rows // (ranks * most)))
    return [range(rows * i // count, rows * (i + 1) // count) for i in range(count)]


def on_device(batch: Any, device: torch.device) -> Any:
    """A batch on a device. To a GPU its tensors go through pinned memory, so that nothing waits for the copy:
    the host makes the next micro-batch while this one is computed."""
    if device.type != "cuda":
        return batch.to(device)
    if isinstance(batch, Idle):
        batch = batch.batch
    return _pinned_to(batch, device)


def _pinned_to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value if value.is_cuda else value.pin_memory().to(device, non_blocking=True)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{name: _pinned_to(one, device) for name, one in vars(value).items()})
    return value
