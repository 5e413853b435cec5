"""Resampled intervals, beside the formulas that hold where there are some."""

from __future__ import annotations

import math

import pytest

from fledge.evals.bootstrap import bootstrap


def test_is_about_the_normal_interval_where_that_holds() -> None:
    found = bootstrap([0.0] * 300 + [1.0] * 100, seed=0)
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert found.mean == 0.25 and found.n == 400
    assert found.low == pytest.approx(0.25 - half, abs=0.006)
    assert found.high == pytest.approx(0.25 + half, abs=0.006)


def test_keeps_the_sign_of_paired_differences() -> None:
    """Of 100 questions 30 went from wrong to right and 10 the other way: McNemar's statistic is 3.2 sigma."""
    found = bootstrap([1.0] * 30 + [-1.0] * 10 + [0.0] * 60, seed=0)
    assert found.mean == pytest.approx(0.2)
    assert 0 < found.low < 0.2 < found.high < 0.4


def test_values_that_never_differ_have_no_width() -> None:
    found = bootstrap([0.5] * 7, seed=3)
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)


def test_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    values = [0.1 * i * i for i in range(30)]
    assert bootstrap(values, 1) == bootstrap(values, 1)
    assert bootstrap(values, 1) != bootstrap(values, 2)


def test_nothing_has_no_mean() -> None:
    with pytest.raises(ValueError, match="no values"):
        bootstrap([], 0)
