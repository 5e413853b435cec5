"""Training by several processes ("ranks"), which torchrun starts: who is who, what they tell each other, and
how they end together.

One process alone is rank 0 of 1: nothing here then touches `torch.distributed`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from fledge.device import pick_device
from fledge.errors import UserError

Item = TypeVar("Item")

# How long ranks wait for each other: the first may tokenise a corpus meanwhile. Dead ones are not waited for.
PATIENCE = timedelta(hours=24)
INTERRUPTED = 130


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many. Values are told as JSON; all ranks must call a method at once."""

    rank: int = 0
    count: int = 1
    neighbours: int = 1
    """Ranks on this machine."""

    @property
    def leads(self) -> bool:
        """Whether this one prints, and writes the files that all share."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """What each rank says, by rank."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        said = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        dist.all_gather(sizes, torch.tensor([len(said)]))
        longest = max(int(size) for size in sizes)
        padded = torch.nn.functional.pad(said, (0, longest - len(said)))
        texts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.count)]
        dist.all_gather(texts, padded)
        return [
            json.loads(text[: int(size)].numpy().tobytes()) for text, size in zip(texts, sizes, strict=True)
        ]

    def share(self, value: Any = None) -> Any:
        """What the first rank says; what the others pass is left unread."""
        if self.count == 1:
            return value
        return self.gather(value if self.leads else None)[0]

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Sum each of these CPU tensors over the ranks, in place."""
        if self.count > 1:
            import torch.distributed as dist

            for tensor in tensors:
                dist.all_reduce(tensor)

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.add([torch.zeros(1)])

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """A block that the first rank runs before the others do, as they find what it made."""
        if not self.leads:
            self.barrier()
        yield
        if self.leads:
            self.barrier()

    def span(self, length: int) -> range:
        """Which of so many items are this rank's: as equal parts as can be, in order."""
        return range(length * self.rank // self.count, length * (self.rank + 1) // self.count)

    def turns(self, length: int) -> list[tuple[int, bool]]:
        """Which of so many micro-batches this rank computes, one in each round, and whether it counts: in the
        last round some ranks go through one that is another's, as all must take part in each pass."""
        rounds = -(-length // self.count)
        mine = range(self.rank, rounds * self.count, self.count)
        return [(min(i, length - 1), i < length) for i in mine]

    def even(self, parts: Sequence[list[Item]]) -> list[list[Item]]:
        """The same parts of a batch in order, cut into as many that each rank has as many of them: the
        largest are halved, while any has two items."""
        found = list(parts)
        wanted = -(-len(found) // self.count) * self.count
        while 0 < len(found) < wanted:
            place = max(range(len(found)), key=lambda i: (len(found[i]), -i))
            half = len(found[place]) // 2
            if not half:
                break
            found[place : place + 1] = [found[place][:half], found[place][half:]]
        return found

    def spread(self, work: Callable[[Sequence[Item], int], Any], items: Sequence[Item]) -> list[Any]:
        """`work(part, number of its first item)` on each rank's part of the items; all results (lists of
        JSON values), in order. Raises UserError on all ranks if one of them does."""
        if self.count == 1:
            return list(work(items, 0))
        mine = self.span(len(items))
        made: list[Any] = []
        problem = None
        try:
            made = list(work(items[mine.start : mine.stop], mine.start)) if mine else []
        except UserError as error:
            problem = str(error)
        answers = self.gather({"made": made, "problem": problem})
        for answer in answers:
            if answer["problem"] is not None:
                raise UserError(answer["problem"])
        return [one for answer in answers for one in answer["made"]]


ALONE = Ranks()


@contextmanager
def joined(device: str = "auto", environment: Mapping[str, str] = os.environ) -> Iterator[Ranks]:
    """A block for one training, in which the ranks that torchrun started know each other; alone: `Ranks()`.

    An error ends all of them. The first rank that has one shows it; what follows from it on others is not
    shown, and they exit with a code of their own.
    """
    count = int(environment.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks()
        return
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    store, rank, _ = next(iter(rendezvous("env://", timeout=PATIENCE)))
    number = store.add(f"fledge/joined/{rank}", 1)  # each training of a process has keys of its own
    store = dist.PrefixStore(str(number), store)  # type: ignore[attr-defined]
    try:
        kind = pick_device(device)
        if kind.type == "cuda":  # each process of a machine has a GPU of its own
            torch.cuda.set_device(int(environment.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl" if kind.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENCE)
        ranks = Ranks(rank, count, int(environment.get("LOCAL_WORLD_SIZE", "1")))
        yield ranks
        ranks.barrier()  # one that is gone early can take the others down with it
        dist.destroy_process_group()
    except KeyboardInterrupt:
        if rank == 0:
            raise
        _leave(INTERRUPTED)
    except Exception as error:
        first = store.add("fledge/failed", 1) == 1
        if not first:
            _leave(2)
        if _is_lost_rank(error):
            raise UserError(
                "another rank ended without a word; what torchrun says below tells which and how. The same "
                "command goes on from the last checkpoint"
            ) from error
        raise


def _is_lost_rank(error: Exception) -> bool:
    """Whether an error only says that another process does not answer."""
    import torch.distributed as dist

    words = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe")
    is_told = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    return is_told or isinstance(error, dist.DistError)


def _leave(code: int) -> NoReturn:
    """End a rank that has nothing to say, without waiting for others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
