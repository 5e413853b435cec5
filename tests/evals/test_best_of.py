"""Best-of-n without drawing: what the formula says is what counting all draws says."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.evals.best_of import best_of_curve, best_of_means, best_of_weights, peak_of


@given(st.integers(1, 20), st.data())
def test_weights_are_a_distribution_that_falls(total: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, total))
    weights = best_of_weights(total, n)
    assert math.isclose(sum(weights), 1.0)
    assert weights == sorted(weights, reverse=True)
    assert weights[0] == pytest.approx(n / total)  # the best of all is in the draw with probability n / total
    assert sum(weight > 0 for weight in weights) == total - n + 1


@given(
    st.lists(st.floats(-5, 5), min_size=1, max_size=7, unique=True), st.data()
)  # different rewards: no draw has two best
def test_is_the_mean_over_all_subsets(rewards: list[float], data: st.DataObject) -> None:
    golds = data.draw(st.lists(st.floats(-1, 1), min_size=len(rewards), max_size=len(rewards)))
    n = data.draw(st.integers(1, len(rewards)))
    best = [max(places, key=lambda i: rewards[i]) for places in combinations(range(len(rewards)), n)]
    (point,) = best_of_curve([rewards], [golds], [n])
    assert point.reward == pytest.approx(np.mean([rewards[i] for i in best]), abs=1e-9)
    assert point.gold == pytest.approx(np.mean([golds[i] for i in best]), abs=1e-9)


def test_by_hand() -> None:
    """Answers worth 1, 0, -1 with rewards 2, 1, 3: of two, the third is best in 2 of 3 draws."""
    curve = best_of_curve([[2.0, 1.0, 3.0]], [[1.0, 0.0, -1.0]], [1, 2, 3])
    assert [point.n for point in curve] == [1, 2, 3]
    assert [point.reward for point in curve] == pytest.approx([2, 8 / 3, 3])
    assert [point.gold for point in curve] == pytest.approx([0, -1 / 3, -1])
    assert [point.kl for point in curve] == pytest.approx([0, math.log(2) - 1 / 2, math.log(3) - 2 / 3])


def test_a_curve_is_the_mean_over_prompts() -> None:
    rewards, golds = [[1.0, 2.0], [5.0, 3.0]], [[0.0, 1.0], [-1.0, 1.0]]
    assert best_of_means(rewards, golds, 2).tolist() == [1.0, -1.0]
    (point,) = best_of_curve(rewards, golds, [2])
    assert (point.reward, point.gold) == (3.5, 0.0)


def test_a_reward_that_is_the_gold_score_never_falls() -> None:
    random = np.random.default_rng(0)
    golds = random.choice([-1.0, 0.0, 1.0], size=(50, 16)).tolist()
    curve = best_of_curve(golds, golds, [1, 2, 4, 8, 16])
    assert all(a.gold <= b.gold for a, b in pairwise(curve))
    assert curve[-1].gold == pytest.approx(np.mean([max(row) for row in golds]))


@pytest.mark.parametrize("n", [0, 4])
def test_more_than_there_are_cannot_be_told(n: int) -> None:
    with pytest.raises(ValueError, match="cannot be told"):
        best_of_weights(3, n)


def test_a_curve_that_only_wavers_seldom_turns_down() -> None:
    """Five values of the same law: the highest one is clearly above the last in about 2.5% of all tries (at
    most 13 of 200, 3.6 standard deviations), and more often if the peak were taken as given."""
    random = np.random.default_rng(0)
    ns = (1, 2, 4, 8, 16)
    found = as_given = 0
    for values in random.normal(size=(200, 120, 5)):
        peak = peak_of(dict(zip(ns, values.T, strict=True)), 0, 400)
        found += peak.fall.high < 0
        fall = values[:, 4] - values[:, ns.index(peak.n)]
        as_given += bool(fall.mean() < -1.96 * fall.std() / math.sqrt(120))
    assert 0 < found <= 13 and as_given >= 2 * found


def test_a_curve_that_rises_and_falls_has_its_peak_there() -> None:
    random = np.random.default_rng(1)
    heights = {1: 0.0, 2: 0.5, 4: 0.9, 8: 0.4, 16: -0.2}
    found = peak_of({n: height + random.normal(size=300) for n, height in heights.items()}, 0)
    assert found.n == 4 and found.share > 0.95
    assert found.gain.low < 0.9 < found.gain.high and found.gain.low > 0.5
    assert found.fall.low < -1.1 < found.fall.high < -0.7


def test_a_peak_at_the_end_falls_by_nothing() -> None:
    found = peak_of({1: np.zeros(9), 2: np.ones(9)}, 0)
    assert (found.n, found.share, found.gain.mean) == (2, 1.0, 1.0)
    assert (found.fall.low, found.fall.mean, found.fall.high) == (0, 0, 0)
