"""Votes and the best of k without luck: against counting all choices one by one."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.evals.facts import wilson_interval
from fledge.evals.samples import (
    Sampled,
    accuracy_curves,
    mean_with_interval,
    pass_at_k,
    sizes,
    vote_at_k,
)

Ballots = list[tuple[str | None, bool]]
# Votes in which an answer is right or wrong whoever gives it; None: no answer, which is wrong.
BALLOTS = st.lists(st.sampled_from("abcd") | st.none(), min_size=1, max_size=7)


def right_of(votes: Sequence[str | None], good: str) -> list[bool]:
    return [vote is not None and vote in good for vote in votes]


def sampled(votes: Sequence[str | None], good: str, rewards: Sequence[float] | None = None) -> Sampled:
    tokens = tuple(range(1, len(votes) + 1))
    return Sampled(
        tuple(right_of(votes, good)), tuple(votes), tokens, None if rewards is None else tuple(rewards)
    )


def by_lot(votes: Sequence[str | None], good: str) -> float:
    """The vote, written again: the answers that lead, one of them by lot."""
    counts = Counter(vote for vote in votes if vote is not None)
    leaders = [vote for vote, count in counts.items() if count == max(counts.values())]
    return sum(vote in good for vote in leaders) / len(leaders) if leaders else 0.0


@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_the_share_of_choices_with_a_right_one(n: int, data: st.DataObject) -> None:
    right = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    k = data.draw(st.integers(1, n))
    choices = list(itertools.combinations(right, k))
    assert pass_at_k(n, sum(right), k) == pytest.approx(sum(map(any, choices)) / len(choices))


def vote_value(votes: list[str | None], right: list[bool]) -> float:
    """The vote over all answers, of which there is one choice."""
    one = Sampled(tuple(right), tuple(votes), (1,) * len(votes))
    return vote_at_k(one, len(votes), np.random.default_rng(0))


@pytest.mark.parametrize("k", [0, 4])
def test_what_cannot_be_told(k: int) -> None:
    with pytest.raises(ValueError, match="cannot be told from 3"):
        pass_at_k(3, 1, k)


@given(BALLOTS, st.sampled_from(["", "a", "ab", "bd"]))
def test_a_vote(votes: list[str | None], good: str) -> None:
    assert vote_value(votes, right_of(votes, good)) == pytest.approx(by_lot(votes, good))


@given(BALLOTS, st.sampled_from(["a", "ab", "bd"]), st.randoms())
def test_a_tie_does_not_look_at_the_truth(votes: list[str | None], good: str, random: object) -> None:
    """Were right wrong and wrong right, the same answer would be chosen; and the order says nothing."""
    right = right_of(votes, good)
    wrong = [vote is not None and not one for vote, one in zip(votes, right, strict=True)]
    chosen = vote_value(votes, right) + vote_value(votes, wrong)
    assert chosen == pytest.approx(1.0 if any(votes) else 0.0)
    assert vote_value(votes[::-1], right[::-1]) == pytest.approx(vote_value(votes, right))


@given(BALLOTS, st.data())
def test_votes_of_k_are_the_mean_over_all_choices(votes: list[str | None], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(votes)))
    found = vote_at_k(sampled(votes, "ab"), k, np.random.default_rng(0))
    choices = list(itertools.combinations(votes, k))
    assert found == pytest.approx(sum(by_lot(choice, "ab") for choice in choices) / len(choices))


def test_drawn_choices_are_near_all_of_them() -> None:
    """924 choices of 6 of 12, of which 200 are drawn: within four standard errors."""
    votes = list("aaaabbbccdde")
    exact = [by_lot(choice, "a") for choice in itertools.combinations(votes, 6)]
    assert len(exact) == comb(12, 6) > 200
    found = vote_at_k(sampled(votes, "a"), 6, np.random.default_rng(0))
    assert abs(found - np.mean(exact)) < 4 * np.std(exact) / np.sqrt(200)
    assert found == vote_at_k(sampled(votes, "a"), 6, np.random.default_rng(0))


PROBLEMS = st.lists(
    st.tuples(
        st.lists(st.sampled_from("abc") | st.none(), min_size=6, max_size=6),
        st.permutations([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]),
    ),
    min_size=1,
    max_size=5,
)


@given(PROBLEMS)
def test_curves(problems: list[tuple[list[str | None], list[float]]]) -> None:
    """One answer is one answer however it is chosen; the verifier chooses best, and more the better the
    more there are; a reward model that knows what is right is a verifier."""
    asked = [sampled(votes, "a", rewards) for votes, rewards in problems]
    curves = accuracy_curves(asked, seed=0)
    right = [sum(one.right) for one in asked]
    assert [point["k"] for point in curves["vote"]] == [1, 2, 4, 6]
    for points in curves.values():
        assert points[0]["mean"] == pytest.approx(sum(right) / (6 * len(asked)))
        assert [point["tokens"] for point in points] == [3.5, 7.0, 14.0, 21.0]
        assert all(point["low"] - 1e-9 <= point["mean"] <= point["high"] + 1e-9 for point in points)
    best = [point["mean"] for point in curves["verifier"]]
    assert best == sorted(best)
    assert best[-1] == pytest.approx(sum(map(bool, right)) / len(asked))
    for way in ("vote", "reward_model"):
        assert all(b >= point["mean"] - 1e-9 for b, point in zip(best, curves[way], strict=True))
    knowing = [sampled(votes, "a", [float(r) for r in right_of(votes, "a")]) for votes, _ in problems]
    assert [point["mean"] for point in accuracy_curves(knowing, 0)["reward_model"]] == pytest.approx(best)


def test_curves_by_hand() -> None:
    """The most frequent answer is wrong and a right one is among two of three: votes fall, pass@k rises."""
    curves = accuracy_curves([sampled("aab", "b", [0.0, 2.0, 1.0])], seed=0)
    assert [point["mean"] for point in curves["vote"]] == pytest.approx([1 / 3, (0 + 1 / 2 + 1 / 2) / 3, 0])
    assert [point["mean"] for point in curves["verifier"]] == pytest.approx([1 / 3, 2 / 3, 1])
    assert [point["mean"] for point in curves["reward_model"]] == pytest.approx([1 / 3, 1 / 3, 0])


def test_curves_need_the_same_number_of_answers() -> None:
    with pytest.raises(ValueError, match=r"not \[1, 2\]"):
        accuracy_curves([sampled("a", "a"), sampled("ab", "a")], 0)
    assert "reward_model" not in accuracy_curves([sampled("ab", "a"), sampled("ab", "a", [1.0, 2.0])], 0)


def test_intervals() -> None:
    whole = mean_with_interval([1.0, 1.0, 0.0, 1.0], 0)
    assert (whole["low"], whole["high"]) == wilson_interval(3, 4) and whole["interval"] == "wilson"
    assert mean_with_interval([1.0] * 20, 0)["low"] < 0.9, "twenty of twenty are not certainty"
    shares = mean_with_interval([0.5, 1.0, 0.25, 0.75], 0)
    assert shares["interval"] == "bootstrap" and shares["low"] < shares["mean"] == 0.625 < shares["high"]


def test_sizes() -> None:
    assert [sizes(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]
