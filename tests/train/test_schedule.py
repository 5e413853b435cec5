"""The learning rate at the borders of its three parts."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.train.schedule import warmup_stable_decay


@pytest.mark.parametrize(
    ("step", "fraction"),
    [
        (0, 0.1),
        (1, 0.2),
        (8, 0.9),
        (9, 1.0),
        (10, 1.0),
        (60, 1.0),
        (61, 39 / 40),
        (80, 0.5),
        (99, 1 / 40),
        (100, 0.0),
    ],
)
def test_borders(step: int, fraction: float) -> None:
    """100 steps, 10 of them warmup and 40 decay: the last step still learns, the one after it would not."""
    assert warmup_stable_decay(step, 100, 10, 0.4) == pytest.approx(fraction)


def test_no_end_no_decay() -> None:
    assert warmup_stable_decay(10**9, None, 10, 0.4) == 1.0
    assert warmup_stable_decay(4, None, 10, 0.4) == 0.5


def test_no_warmup() -> None:
    assert warmup_stable_decay(0, 100, 0, 0.4) == 1.0


def test_no_decay() -> None:
    assert warmup_stable_decay(99, 100, 0, 0.0) == 1.0


@given(st.integers(1, 500), st.integers(0, 600), st.floats(0, 1))
def test_every_step_learns_and_none_too_fast(total: int, warmup: int, decay_share: float) -> None:
    fractions = [warmup_stable_decay(step, total, warmup, decay_share) for step in range(total)]
    assert all(0 < fraction <= 1 for fraction in fractions)
    rises = [b > a for a, b in itertools.pairwise(fractions)]
    falls = [b < a for a, b in itertools.pairwise(fractions)]
    assert True not in rises[falls.index(True) :] if True in falls else True  # up once, down once
