"""Several questions under way at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from fledge.engine.at_once import as_they_come


def test_all_are_answered_as_they_end() -> None:
    """The first one ends when all others have."""
    others = threading.Semaphore(0)

    def ask(number: int) -> int:
        if number == 0:
            for _ in range(9):
                assert others.acquire(timeout=10)
        else:
            others.release()
        if number == 5:
            raise ValueError("five")
        return number * number

    answers = list(as_they_come(ask, range(10), 3))
    assert answers[-1] == (0, 0)
    (error,) = (answer for place, answer in answers if place == 5)
    assert isinstance(error, ValueError)
    found = {place: answer for place, answer in answers if place != 5}
    assert found == {i: i * i for i in range(10) if i != 5}
    assert list(as_they_come(ask, [], 3)) == []


def test_closing_it_waits_for_nothing() -> None:
    begun: list[int] = []
    hanging = threading.Event()

    def ask(number: int) -> None:
        begun.append(number)
        if number:
            hanging.wait(60)

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), closing(as_they_come(ask, range(100), 4)) as answers:
        assert next(answers) == (0, None)
        raise KeyboardInterrupt
    assert len(begun) <= 5 and not hanging.is_set()
    hanging.set()
    for thread in threading.enumerate():
        if thread.daemon and thread.name.endswith("(work)"):
            thread.join(10)
    assert len(begun) <= 8 and threading.active_count() <= before


def test_what_is_under_way_is_answered_when_the_questions_end() -> None:
    """Three are under way when the first one says that it was the last."""
    together, ended = threading.Barrier(3), threading.Event()

    def questions() -> Iterator[int]:
        for number in range(100):
            if ended.is_set():
                return
            yield number

    def ask(number: int) -> int:
        together.wait(10)
        ended.set()
        return number

    assert sorted(as_they_come(ask, questions(), 3)) == [(0, 0), (1, 1), (2, 2)]


def test_what_the_questions_raise_comes_behind_the_answers_under_way() -> None:
    def asked() -> Iterator[int]:
        yield from (1, 2)
        raise ValueError("no third")

    answers = []
    with pytest.raises(ValueError, match="no third"):
        for one, answer in as_they_come(lambda one: 10 * one, asked(), 4):
            answers.append((one, answer))
    assert sorted(answers) == [(1, 10), (2, 20)]
