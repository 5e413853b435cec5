"""The one thread that models compute in, in turns.

OpenMP gives every thread that computes helpers of its own, and they wait busily for its next operation only
while a process has no more of them than cores: with a second such thread they sleep and are woken for every
operation, which takes a third of a small model's step. So all models share one, and the thread that loads
them uses no helpers (`alone`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch


class TakesTurns(Protocol):
    """Who computes."""

    def work(self) -> bool:
        """Do a little for those who wait; whether anything is left to do. Called again in the midst of it
        where it calls `Turns.step`. Raises nothing."""
        ...

    @property
    def ended(self) -> bool:
        """Whether it wants no more turns."""
        ...


class Turns:
    """Gives all that were added their turns, until they have ended."""

    def __init__(self, threads: int | None = None) -> None:
        """`threads`: how many cores an operation may use (None: as PyTorch has it)."""
        self._threads = threads
        self._all: list[TakesTurns] = []
        self._lock = threading.Lock()  # around who is there, and whether the thread is
        self._wake = threading.Event()

    def add(self, one: TakesTurns) -> None:
        """From now on it has turns."""
        with self._lock:
            self._all.append(one)
            if len(self._all) == 1:
                threading.Thread(target=self._work, name="models", daemon=True).start()
        self._wake.set()

    def wake(self) -> None:
        """There is something to do; from any thread."""
        self._wake.set()

    def step(self) -> None:
        """A turn for all, in the midst of one that takes long."""
        for one in list(self._all):
            one.work()

    def _work(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        while True:
            busy = False
            for one in list(self._all):
                busy = one.work() or busy
            with self._lock:
                self._all = [one for one in self._all if not one.ended]
                if not self._all:
                    return
            if not busy:
                self._wake.wait()
                self._wake.clear()


@contextmanager
def alone() -> Iterator[int]:
    """This thread computes without helpers meanwhile; gives how many threads there were for an operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)
