"""Best-of-n without drawing: what the formula says is what counting all draws says."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.evals.best_of import best_of_curve, best_of_means, best_of_weights


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
