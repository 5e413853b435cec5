"""A reward model's examination: figures counted by hand."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from fledge.data.comparisons import Comparison, Pair
from fledge.evals.facts import Share
from fledge.evals.preferences import (
    PairRow,
    accuracy,
    agreement,
    by_gap,
    by_kinds,
    by_shuffled_reward,
    calibration,
    examine,
    length,
    pair_rows,
    spearman,
)


def row(gap: float, **more: Any) -> PairRow:
    fields = {"prompt": "p", "better": "b", "worse": "w", "tokens_better": 5, "tokens_worse": 5, **more}
    return PairRow(reward_better=gap, reward_worse=0.0, **fields)


def test_equal_rewards_are_wrong() -> None:
    assert accuracy([row(1.0), row(0.0), row(-1.0), row(0.1)]) == Share(2, 4)
    assert accuracy([]) is None
    assert accuracy([row(1.0)], by_shuffled_reward) is None, "the control was not made"


def test_calibration_of_a_model_that_is_right_as_often_as_it_says() -> None:
    """9 of 10 right at a gap of ln 9; half right at a gap of 0."""
    sure = [row(math.log(9))] * 9 + [row(-math.log(9))]
    found = calibration([*sure, row(1e-9), row(-1e-9)])
    assert [(b["confidence"], b["rate"], b["n"]) for b in found["bins"]] == [
        (pytest.approx(0.5), 0.5, 2),
        (pytest.approx(0.9), 0.9, 10),
    ]
    assert found["expected_error"] == pytest.approx(0.0, abs=1e-6)
    boasting = calibration([row(50.0), row(-50.0)])
    assert boasting["expected_error"] == pytest.approx(0.5)


def test_a_model_of_length_is_found_out() -> None:
    """It is right where the longer one is better, wrong elsewhere, and 80% of the better ones are longer."""
    rng = random.Random(0)
    rows = []
    for i in range(200):
        tokens = (20, 10) if i % 5 else (10, 20)
        noise = rng.random()
        rows.append(
            row(tokens[0] - tokens[1] + noise, tokens_better=tokens[0], tokens_worse=tokens[1], prompt=str(i))
        )
    found = length(rows)
    assert accuracy(rows) == Share(160, 200)
    assert found["rule"]["rate"] == 0.8
    assert found["controlled"]["rate"] == 0.5
    assert found["warning"]


def test_a_model_that_ignores_length_is_not_warned_about() -> None:
    rows = [row(1.0, tokens_better=20 if i % 5 else 5, tokens_worse=10, prompt=str(i)) for i in range(100)]
    found = length(rows)
    assert found["rule"]["rate"] == 0.8
    assert found["controlled"]["rate"] == 1.0
    assert not found["warning"]


def test_length_of_the_different_completions() -> None:
    """A completion that is in several pairs counts once."""
    rows = [
        row(3.0, better="a", worse="b", tokens_better=1, tokens_worse=2),
        row(3.0, better="a", worse="b", tokens_better=1, tokens_worse=2),
        PairRow("p", "a", "c", 3.0, -1.0, 1, 3),
    ]
    assert length(rows)["correlation"] == pytest.approx(-1.0)
    assert length([])["correlation"] is None


def test_spearman() -> None:
    assert spearman([1, 2, 3, 4], [10, 100, 1000, 10_000]) == pytest.approx(1.0)
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5 / sqrt(4.5 * 5).
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman([1, 1], [1, 2]) is None


def test_quarters_by_gap() -> None:
    rows = [row(gap) for gap in (0.1, -0.2, 1.0, -1.1, 2.0, 2.1, 3.0, 3.1)]
    assert [(part["low_gap"], part["high_gap"], part["rate"]) for part in by_gap(rows)] == [
        (0.1, 0.2, 0.5), (1.0, 1.1, 0.5), (2.0, 2.1, 1.0), (3.0, 3.1, 1.0),
    ]  # fmt: skip


def test_kinds_and_the_control_without_prompt() -> None:
    """Labels that were turned around by noise count in the same row, named by the usual order."""
    good = [row(1.0, kinds=("right", "wrong"), blind_better=-1.0, blind_worse=0.0)] * 30
    turned = [row(-1.0, kinds=("wrong", "right"), blind_better=-1.0, blind_worse=0.0)] * 2
    found = by_kinds([*good, *turned, row(1.0)])
    assert list(found) == ["right against wrong"]
    assert found["right against wrong"]["accuracy"]["successes"] == 30
    assert found["right against wrong"]["blind"]["successes"] == 0
    assert found["right against wrong"]["beats_blind"] is True
    assert by_kinds(good[:1])["right against wrong"]["beats_blind"] is False, "one pair proves nothing"


def comparison(pairs: list[Pair], count: int) -> Comparison:
    turns: Any = [{"role": "assistant", "content": "x"}]
    prompt: Any = [{"role": "user", "content": "p"}]
    return Comparison("k", prompt, [turns] * count, [[1]] * count, [[True]] * count, pairs)


def test_agreement_of_labelers() -> None:
    """Three labelers, two to one: one of their three pairs agrees. Two labelers who agree: one of one."""
    three = comparison([Pair(0, 1), Pair(0, 1), Pair(1, 0)], 2)
    two = comparison([Pair(0, 1), Pair(0, 1), Pair(0, 2)], 3)
    assert agreement([three, two]) == Share(2, 4)
    assert agreement([comparison([Pair(0, 1)], 2)]) is None


def test_rows_know_how_many_judged_them() -> None:
    rows = pair_rows([comparison([Pair(0, 1), Pair(0, 1), Pair(1, 0)], 2)], [2.0, 1.0], blind=[0.0, 3.0])
    assert [(r.gap, r.votes, r.agreeing, r.blind_better, r.shuffled_better) for r in rows] == [
        (1.0, 3, 2, 0.0, None), (1.0, 3, 2, 0.0, None), (-1.0, 3, 1, 3.0, None),
    ]  # fmt: skip
    assert {name: share["rate"] for name, share in examine(rows)["by_agreement"].items()} == {
        "with the majority": 1.0, "half or fewer agree": 0.0,
    }  # fmt: skip


def test_nothing_to_examine() -> None:
    assert examine([])["accuracy"] is None
