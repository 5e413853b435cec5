"""Shares at every prefix of the run; batches that do not depend on who reads them or when."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fledge.data.interleave import Mixture, Schedule
from fledge.data.packing import BestFitRows, Documents, StreamRows
from fledge.train.steps import row_steps
from fledge.types import Batch

SEPARATOR = 0
InMemory = Callable[[Sequence[Sequence[int]]], Documents]


def schedule(shares: Sequence[float], rows: int) -> list[int]:
    made = Schedule(shares)
    return [made.row(number)[0] for number in range(rows)]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=8))
def test_shares_are_kept_at_every_prefix(weights: list[int]) -> None:
    """Within 1 - 1/(2k - 2) rows for k sources (Tijdeman 1980): no schedule promises less."""
    bound = Fraction(1, 2) if len(weights) <= 2 else 1 - Fraction(1, 2 * len(weights) - 2)
    given_rows = Counter[int]()
    for rows, source in enumerate(schedule(weights, 300), start=1):
        given_rows[source] += 1
        for other, weight in enumerate(weights):
            due = Fraction(rows * weight, sum(weights))
            assert abs(given_rows[other] - due) <= bound + Fraction(1, 10**6)


def test_greed_would_break_the_promise() -> None:
    """With these shares "always the one that is furthest behind" leaves one 1.09 rows behind."""
    weights = [21, 21, 1, 5, 5, 21]
    counts = np.cumsum(np.eye(len(weights))[schedule(weights, 1000)], axis=0)
    due = np.outer(np.arange(1, 1001), np.array(weights) / sum(weights))
    assert np.abs(counts - due).max() < 1


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), st.lists(st.integers(0, 3000), max_size=5))
def test_a_row_does_not_depend_on_what_was_asked_before(weights: list[float], asked: list[int]) -> None:
    straight = Schedule(weights)
    expected = [straight.row(number) for number in range(3001)]
    made = Schedule(weights)
    assert [made.row(number) for number in asked] == [expected[number] for number in asked]


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), st.integers(0, 2000))
def test_each_source_is_read_from_its_start(weights: list[float], rows: int) -> None:
    made = Schedule(weights)
    seen: dict[int, int] = {}
    for source, rank in (made.row(number) for number in range(rows)):
        assert rank == seen.get(source, 0)
        seen[source] = rank + 1
    assert made.counts(rows) == [seen.get(source, 0) for source in range(len(weights))]


@pytest.fixture(scope="session", params=["stream", "best-fit"])
def make(request: pytest.FixtureRequest, in_memory: InMemory) -> Callable[[], Mixture]:
    kind = {"stream": StreamRows, "best-fit": BestFitRows}[request.param]
    texts = [[[1, 2, 3], [4, 5], [6] * 20], [[11] * 9, [12, 13]], [[21]]]

    def mixture() -> Mixture:
        sources = [
            kind(in_memory(documents), np.arange(len(documents)), 7, SEPARATOR, [0, place])
            for place, documents in enumerate(texts)
        ]
        return Mixture(sources, [0.7, 0.2, 0.1], hidden=kind is BestFitRows)

    return mixture


def same(a: Batch, b: Batch) -> bool:
    """Whether two batches are equal in all their tensors."""
    segments = (a.segment_ids is None and b.segment_ids is None) or (
        a.segment_ids is not None and b.segment_ids is not None and torch.equal(a.segment_ids, b.segment_ids)
    )
    return segments and torch.equal(a.input_ids, b.input_ids) and torch.equal(a.loss_mask, b.loss_mask)


@given(order=st.permutations(range(0, 1500, 150)))
def test_a_run_can_be_resumed_anywhere(make: Callable[[], Mixture], order: list[int]) -> None:
    """Rows are the same read in any order, by a mixture that has read nothing else before."""
    straight = make()
    expected = {first: straight.rows(first, 3) for first in range(0, 1500, 150)}
    again = make()
    for first in order:
        assert same(again.rows(first, 3), expected[first])
    assert same(make().rows(order[0], 3), expected[order[0]])


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_read_slices_of_the_same_batch(make: Callable[[], Mixture], ranks: int) -> None:
    batch_rows = 8
    whole = make()
    own = [make() for _ in range(ranks)]
    for step in range(20):
        first, share = step * batch_rows, batch_rows // ranks
        parts = [mixture.rows(first + rank * share, share) for rank, mixture in enumerate(own)]
        assert torch.equal(
            torch.cat([part.input_ids for part in parts]), whole.rows(first, batch_rows).input_ids
        )


def test_steps_resumed_are_the_steps_uninterrupted(make: Callable[[], Mixture]) -> None:
    straight = row_steps(make().rows, 8, 3)(0, {}, None)
    batches = [next(straight).batches for _ in range(12)]
    for first in (1, 5, 11):
        resumed = next(row_steps(make().rows, 8, 3)(first, {}, None)).batches
        assert all(same(a, b) for a, b in zip(resumed, batches[first], strict=True))


def test_targets_are_counted_as_the_rows_have_them(make: Callable[[], Mixture]) -> None:
    """Recounted from the rows: which source a target is from is told by its id."""
    mixture = make()
    for rows in (0, 1, 37, 100):
        counted = [0, 0, 0]
        for number in range(rows):
            source, rank = mixture._schedule.row(number)
            counted[source] += int(mixture.sources[source].row(rank).targets[1:].sum())
            batch = mixture.rows(number, 1)
            assert int(batch.loss_mask[:, 1:].sum()) == int(
                mixture.sources[source].row(rank).targets[1:].sum()
            )
        assert mixture.targets(rows) == counted


def test_the_shares_of_tokens_follow_the_weights(make: Callable[[], Mixture]) -> None:
    mixture = make()
    rows = [source.targets(1000) for source in mixture.sources]
    targets = mixture.targets(100)
    assert [round(a / b * 1000) for a, b in zip(targets, rows, strict=True)] == pytest.approx(
        [70, 20, 10], abs=3
    )
