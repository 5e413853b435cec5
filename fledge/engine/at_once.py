"""Questions that wait for somebody else, several under way at once."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def as_they_come(
    ask: Callable[[T], R], asked: Sequence[T], parallel: int
) -> Generator[tuple[int, R | Exception], None, None]:
    """(place, answer or what `ask` raised) of all that is asked, as they end, with so many under way at once.

    When it is closed, as by Ctrl-C, nothing more is begun. What is under way is not waited for, since a
    connection may hang: its thread ends with the process at the latest, and so does the request.
    """
    left, lock, stopped = enumerate(asked), threading.Lock(), threading.Event()
    answers: queue.SimpleQueue[tuple[int, R | Exception]] = queue.SimpleQueue()

    def work() -> None:
        while not stopped.is_set():
            with lock:
                taken = next(left, None)
            if taken is None:
                return
            place, one = taken
            try:
                answers.put((place, ask(one)))
            except Exception as error:  # the caller decides what it means
                answers.put((place, error))

    for _ in range(min(parallel, len(asked))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in asked:
            yield answers.get()
    finally:
        stopped.set()
