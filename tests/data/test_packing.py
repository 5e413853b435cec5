"""Batches: shares at every prefix, every token once an epoch, the same rows in any order of reading."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fledge.data.packing import ConversationRows, Mixture, TokenSource, interleave
from fledge.types import Batch

SEPARATOR = 0

# Which source a row comes from.


@given(st.lists(st.integers(1, 100), min_size=1, max_size=8))
def test_shares_are_kept_at_every_prefix(weights: list[int]) -> None:
    """Within 1 - 1/(2k - 2) rows for k sources (Tijdeman 1980): no schedule promises less."""
    schedule = interleave(weights, 300).tolist()
    bound = Fraction(1, 2) if len(weights) <= 2 else 1 - Fraction(1, 2 * len(weights) - 2)
    given_rows = Counter[int]()
    for rows, source in enumerate(schedule, start=1):
        given_rows[source] += 1
        for other, weight in enumerate(weights):
            assert abs(given_rows[other] - Fraction(rows * weight, sum(weights))) <= bound + Fraction(
                1, 10**6
            )


def test_greed_would_break_the_promise() -> None:
    """With these shares "always the one that is furthest behind" leaves one 1.09 rows behind."""
    weights = [21, 21, 1, 5, 5, 21]
    counts = np.cumsum(np.eye(len(weights))[interleave(weights, 1000)], axis=0)
    due = np.outer(np.arange(1, 1001), np.array(weights) / sum(weights))
    assert np.abs(counts - due).max() < 1


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), st.integers(0, 200), st.integers(0, 200))
def test_a_longer_schedule_begins_with_the_shorter(weights: list[float], short: int, more: int) -> None:
    assert interleave(weights, short + more)[:short].tolist() == interleave(weights, short).tolist()


def test_one_source_gets_every_row() -> None:
    assert interleave([0.3], 5).tolist() == [0] * 5


# Tokens of one source.

documents_of_ids = st.lists(st.lists(st.integers(1, 9), max_size=12), min_size=1, max_size=10)


def cut_into_documents(stream: list[int]) -> Counter[tuple[int, ...]]:
    """What lies between separators; a stream that starts at a separator."""
    assert stream[0] == SEPARATOR
    cut: list[list[int]] = []
    for token in stream:
        if token == SEPARATOR:
            cut.append([])
        else:
            cut[-1].append(token)
    return Counter(map(tuple, cut))


@given(documents_of_ids, st.integers(0, 3), st.integers(1, 40))
def test_each_epoch_holds_every_document_once(documents: list[list[int]], seed: int, length: int) -> None:
    source = TokenSource.from_documents("x", documents, SEPARATOR, seed)
    size = len(source)
    assert size == sum(len(document) + 1 for document in documents)
    for epoch in range(3):
        windows = [
            source.window(epoch * size + start, min(length, size - start)).tolist()
            for start in range(0, size, length)
        ]
        stream = [token for window in windows for token in window]
        assert cut_into_documents(stream) == Counter(map(tuple, documents))


def test_epochs_are_shuffled_anew_and_by_the_seed() -> None:
    documents = [[i] * 3 for i in range(1, 60)]
    epochs = set()
    for seed in (0, 1):
        source = TokenSource.from_documents("x", documents, SEPARATOR, seed)
        for epoch in range(3):
            epochs.add(tuple(source.window(epoch * len(source), len(source))))
    assert len(epochs) == 6


@given(documents_of_ids, st.lists(st.tuples(st.integers(0, 300), st.integers(1, 50)), max_size=12))
def test_a_window_does_not_depend_on_what_was_read_before(
    documents: list[list[int]], windows: list[tuple[int, int]]
) -> None:
    source = TokenSource.from_documents("x", documents, SEPARATOR, 0)
    stream = TokenSource.from_documents("x", documents, SEPARATOR, 0).window(0, 400).tolist()
    for start, length in windows:
        assert source.window(start, length).tolist() == stream[start : start + length]


# Rows of a mixture.


def mixture(row_tokens: int = 7, isolate: bool = False) -> Mixture:
    sources = [
        TokenSource.from_documents("a", [[1, 2, 3], [4, 5], [6] * 20], SEPARATOR, 0),
        TokenSource.from_documents("b", [[11] * 9, [12, 13]], SEPARATOR, 1),
        TokenSource.from_documents("c", [[21]], SEPARATOR, 2),
    ]
    return Mixture(sources, [0.7, 0.2, 0.1], row_tokens, SEPARATOR, isolate)


def same(a: Batch, b: Batch) -> bool:
    """Whether two batches are equal in all their tensors."""
    segments = (a.segment_ids is None and b.segment_ids is None) or (
        a.segment_ids is not None and b.segment_ids is not None and torch.equal(a.segment_ids, b.segment_ids)
    )
    return segments and torch.equal(a.input_ids, b.input_ids) and torch.equal(a.loss_mask, b.loss_mask)


@given(st.permutations(range(0, 1500, 150)), st.booleans())
def test_rows_are_the_same_in_any_order(order: list[int], isolate: bool) -> None:
    shuffled, straight = mixture(isolate=isolate), mixture(isolate=isolate)
    expected = {first: straight.rows(first, 3) for first in range(0, 1500, 150)}
    for first in order:
        assert same(shuffled.rows(first, 3), expected[first])
        single = [shuffled.rows(row, 1).input_ids for row in range(first, first + 3)]
        assert torch.equal(torch.cat(single), expected[first].input_ids)


def test_each_token_of_an_epoch_is_a_target_once() -> None:
    """Neighbouring rows overlap by one token, which is a target in the first and context in the second."""
    made = mixture(row_tokens=3)
    rows = made.rows(0, 400).input_ids.tolist()
    for number, source in enumerate(made.sources):
        own = [
            row
            for row, chosen in zip(rows, interleave(made.shares, 400).tolist(), strict=True)
            if chosen == number
        ]
        targets = [token for row in own for token in row[1:]]
        assert targets == source.window(1, len(targets)).tolist()
        assert all(a[-1] == b[0] for a, b in itertools.pairwise(own))


def test_what_was_seen_is_counted() -> None:
    made = mixture(row_tokens=7)
    seen = made.seen(100)
    assert sum(seen) == 700
    assert seen == [7 * 70, 7 * 20, 7 * 10]


def test_documents_are_hidden_from_each_other_only_when_asked() -> None:
    assert mixture().rows(0, 2).segment_ids is None
    batch = mixture(row_tokens=31, isolate=True).rows(0, 8)
    assert batch.segment_ids is not None
    for ids, segments in zip(batch.input_ids.tolist(), batch.segment_ids.tolist(), strict=True):
        for t in range(1, len(ids)):  # a segment begins at each separator and nowhere else
            assert (segments[t] != segments[t - 1]) == (ids[t] == SEPARATOR)
    assert batch.loss_mask.all()


# Rows of conversations.


def conversation_rows(lengths: list[int], row_tokens: int, seed: int = 0) -> ConversationRows:
    """Conversation i has the ids i + 1 only; every token claims to be a target."""
    ids = [[i + 1] * length for i, length in enumerate(lengths)]
    return ConversationRows(ids, [[True] * length for length in lengths], row_tokens, 0, seed)


@given(st.lists(st.integers(2, 16), min_size=1, max_size=40), st.integers(0, 3))
def test_each_conversation_is_whole_and_once_in_an_epoch(lengths: list[int], seed: int) -> None:
    rows = conversation_rows(lengths, row_tokens=15, seed=seed)
    first = 0
    for epoch in range(3):
        count = rows.epoch_rows(epoch)
        batch = rows.rows(first, count)
        first += count
        assert batch.segment_ids is not None
        found: Counter[tuple[int, int]] = Counter()
        for ids, mask, segments in zip(
            batch.input_ids.tolist(), batch.loss_mask.tolist(), batch.segment_ids.tolist(), strict=True
        ):
            assert len(ids) == 16
            for segment in sorted(set(segments) - {-1}):
                places = [t for t in range(16) if segments[t] == segment]
                assert places == list(range(places[0], places[-1] + 1))
                assert len({ids[t] for t in places}) == 1
                found[ids[places[0]], len(places)] += 1
                # What comes before the first token is another conversation.
                assert [mask[t] for t in places] == [False] + [True] * (len(places) - 1)
            padding = [t for t in range(16) if segments[t] == -1]
            assert padding == list(range(16 - len(padding), 16))
            assert all(ids[t] == 0 and not mask[t] for t in padding)
        assert found == Counter({(i + 1, length): 1 for i, length in enumerate(lengths)})


@given(st.lists(st.integers(2, 16), min_size=1, max_size=30), st.permutations(range(12)))
def test_conversation_rows_are_the_same_in_any_order(lengths: list[int], order: list[int]) -> None:
    shuffled, straight = conversation_rows(lengths, 15), conversation_rows(lengths, 15)
    expected = [straight.rows(row, 2) for row in range(12)]
    for row in order:
        assert same(shuffled.rows(row, 2), expected[row])


@pytest.mark.parametrize("seed", range(3))
def test_little_room_is_wasted(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(20, 200, 2000).tolist()
    rows = conversation_rows(lengths, row_tokens=511, seed=seed)
    needed = sum(lengths) / 512
    assert needed <= rows.epoch_rows(0) <= 1.05 * needed


@given(st.lists(st.integers(2, 16), min_size=1, max_size=60))
def test_no_two_rows_could_have_been_one_by_halves(lengths: list[int]) -> None:
    """Best fit opens a row only for what fits nowhere: at most one row is half empty or more."""
    rows = conversation_rows(lengths, row_tokens=15)
    batch = rows.rows(0, rows.epoch_rows(0))
    assert batch.segment_ids is not None
    used = (batch.segment_ids >= 0).sum(dim=1)
    assert int((used <= 8).sum()) <= 1


def test_epochs_of_conversations_differ() -> None:
    rows = conversation_rows([5] * 30, row_tokens=15)
    count = rows.epoch_rows(0)
    assert not torch.equal(rows.rows(0, count).input_ids, rows.rows(count, count).input_ids)
    other = conversation_rows([5] * 30, row_tokens=15, seed=1)
    assert not torch.equal(rows.rows(0, count).input_ids, other.rows(0, count).input_ids)
