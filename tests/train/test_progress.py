"""The line a user watches."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fledge.train.progress import TrainingProgress, clock, say


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (59.4, "0:59"),
        (59.6, "1:00"),
        (3599, "59:59"),
        (3600, "1:00:00"),
        (90_061, "25:01:01"),
        (-3, "0:00"),
    ],
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def lines(quiet_seconds: float, steps: int, total: int | None) -> list[str]:
    file = io.StringIO()
    with TrainingProgress("sft", Console(file=file, width=40), quiet_seconds) as bar:
        for step in range(1, steps + 1):
            bar.show(step, total, None if step == 1 else 1.23456, 2345.6, None if total is None else 61.0)
    return file.getvalue().splitlines()


def test_without_a_terminal_a_line_now_and_then_and_one_at_the_end() -> None:
    assert lines(3600, 2000, 2000) == ["sft  step 2,000/2,000  loss 1.235  2,346 tokens/s  1:01 left"]
    assert lines(3600, 9, 10) == []


def test_what_is_not_known_yet_is_not_made_up() -> None:
    assert lines(0, 1, None) == ["sft  step 1/?  loss -  2,346 tokens/s  measuring"]


def test_on_a_terminal_a_bar() -> None:
    file = io.StringIO()
    with TrainingProgress("sft", Console(file=file, force_terminal=True, width=100)) as bar:
        bar.show(1, None, 2.0, 10.0, None)
        bar.show(5, 5, 1.5, 10.0, 0.0)
        bar.note("a [note]")
    shown = file.getvalue()
    assert "a [note]" in shown
    assert "loss 1.500" in shown
    assert "100%" in shown


def test_a_path_is_printed_as_it_is() -> None:
    file = io.StringIO()
    path = "/long/" * 20 + "[red]/1234"
    say(Console(file=file, width=40), path)
    assert file.getvalue() == path + "\n"
