"""Bits per byte against sums by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.evals.bits import bits_per_byte

SEPARATOR, SPECIAL = 0, 1


class StubScorer:
    """Gives each token a log-probability by its id alone, and notes what it read."""

    def __init__(self, nats_of: dict[int, float] | None = None, vocab_size: int = 10) -> None:
        self.nats_of, self.uniform = nats_of or {}, math.log(vocab_size)
        self.read: list[list[int]] = []

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        self.read += [list(sequence) for sequence in sequences]
        return [[-self.nats_of.get(token, self.uniform) for token in sequence[1:]] for sequence in sequences]


def test_a_uniform_model_needs_log2_v_bits_a_token() -> None:
    """8 tokens of 3 bits for 12 bytes; separators are read but not counted."""
    figure = bits_per_byte(
        StubScorer(vocab_size=8), [[2, 3, 4], [5, 6, 7, 8, 9]], 12, SEPARATOR, {SEPARATOR}, 4
    )
    assert figure == pytest.approx(8 * 3 / 12)


def test_special_tokens_are_left_out() -> None:
    scorer = StubScorer({2: math.log(2), 3: math.log(16), SPECIAL: 1000.0})
    figure = bits_per_byte(scorer, [[2, SPECIAL, 3, SPECIAL]], 5, SEPARATOR, {SEPARATOR, SPECIAL}, 100)
    assert figure == pytest.approx((1 + 4) / 5)


@given(st.lists(st.lists(st.integers(2, 9), max_size=30), max_size=5), st.integers(1, 12))
def test_every_token_is_scored_once_behind_its_neighbour(documents: list[list[int]], window: int) -> None:
    scorer = StubScorer({token: float(token) for token in range(10)})
    figure = bits_per_byte(scorer, documents, 7, SEPARATOR, {SEPARATOR, SPECIAL}, window)
    pairs = [pair for ids in scorer.read for pair in itertools.pairwise(ids)]
    expected = [pair for ids in documents for pair in zip([SEPARATOR, *ids], ids, strict=False)]
    assert pairs == expected
    assert all(len(ids) <= window + 1 for ids in scorer.read)
    assert figure == pytest.approx(sum(map(sum, documents)) / (7 * math.log(2)))


def test_nothing_costs_nothing() -> None:
    assert bits_per_byte(StubScorer(), [], 0, SEPARATOR, set(), 4) == 0.0
    assert bits_per_byte(StubScorer(), [[]], 0, SEPARATOR, set(), 4) == 0.0
