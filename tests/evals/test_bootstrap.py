"""Resampled intervals, beside the formulas that hold where there are some."""

from __future__ import annotations

import math
from dataclasses import astuple
from statistics import NormalDist

import numpy as np
import pytest

from fledge.evals.bootstrap import bootstrap, together


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


def test_one_column_alone_has_the_normal_interval() -> None:
    values = np.array([0.0] * 300 + [1.0] * 100)
    (found,) = together(values[:, None], seed=0)
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert (found.mean, found.n) == (0.25, 400)
    assert found.low == pytest.approx(0.25 - half, abs=0.004)
    assert found.high == pytest.approx(0.25 + half, abs=0.004)


def test_intervals_of_many_independent_columns_are_as_wide_as_sidak_has_it() -> None:
    """Of 10 independent means all are within z standard errors in 95% for a z of 0.95^(1/10): 2.80."""
    columns = np.random.default_rng(0).normal(size=(800, 10))
    z = NormalDist().inv_cdf((1 + 0.95 ** (1 / 10)) / 2)
    errors = columns.std(0) / math.sqrt(800)
    for found, mean, error in zip(together(columns, 1), columns.mean(0), errors, strict=True):
        assert found.mean == pytest.approx(mean)
        assert found.high - found.mean == pytest.approx(z * error, rel=0.04)
        assert found.mean - found.low == pytest.approx(z * error, rel=0.04)


def test_a_column_that_never_differs_has_no_width_and_widens_nothing() -> None:
    values = np.random.default_rng(0).normal(size=(200, 1))
    alone, beside = together(values, 0), together(np.hstack([values, np.ones((200, 1))]), 0)
    assert astuple(beside[0]) == pytest.approx(astuple(alone[0]))
    assert (beside[1].low, beside[1].mean, beside[1].high) == (1, 1, 1)
    with pytest.raises(ValueError, match="no values"):
        together(np.zeros((0, 2)), 0)
