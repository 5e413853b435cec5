"""Questions that wait for somebody else, several under way at once."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def as_they_come(
    ask: Callable[[T], R], asked: Iterable[T], parallel: int
) -> Generator[tuple[T, R | Exception], None, None]:
    """(what was asked, the answer or what `ask` raised), as they end, with so many under way at once.

    `asked` is gone through as there is room: where it ends early, what is under way is still answered, and
    what it raises is raised behind that. When this is closed, as by Ctrl-C, nothing more is begun, and what
    is under way is not waited for, since a connection may hang: its thread ends with the process at the
    latest, and so does the request.
    """
    left, lock, stopped = iter(asked), threading.Lock(), threading.Event()
    answers: queue.SimpleQueue[tuple[T, R | Exception] | None] = queue.SimpleQueue()
    broken: list[Exception] = []  # what `asked` raised

    def work() -> None:
        try:
            while not stopped.is_set():
                with lock:
                    one = next(left)
                try:
                    answers.put((one, ask(one)))
                except Exception as error:  # the caller decides what it means
                    answers.put((one, error))
        except StopIteration:
            pass
        except Exception as error:
            broken.append(error)
        finally:
            answers.put(None)

    for _ in range(parallel):
        threading.Thread(target=work, daemon=True).start()
    working = parallel
    try:
        while working:
            answer = answers.get()
            if answer is None:
                working -= 1
            else:
                yield answer
        if broken:
            raise broken[0]
    finally:
        stopped.set()
