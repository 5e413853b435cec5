"""Figures as a reader wants them, and text that HTML can hold."""

from __future__ import annotations

import pytest

from fledge.report.page import duration, printable, rough


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (42.4, "42 s"),
        (60, "1 min"),
        (563.8, "9 min 24 s"),
        (3600, "1 h"),
        (7325, "2 h 2 min 5 s"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_rough_and_printable() -> None:
    assert (rough(5_607_680), rough(331_742)) == ("5.6 million", "331,742")
    assert printable("a\tb\n\x00\ud800") == "a\tb\n\\x00\\ud800"
    assert printable(None) is None
