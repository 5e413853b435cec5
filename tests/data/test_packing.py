"""Packing: every token of an epoch a target once, the same rows in any order of reading."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fledge.data.packing import (
    BestFitRows,
    ConversationRows,
    Documents,
    Row,
    RowSource,
    StreamRows,
    best_fit,
)
from fledge.types import Batch

SEPARATOR = 0
InMemory = Callable[[Sequence[Sequence[int]]], Documents]

documents_of_ids = st.lists(st.lists(st.integers(1, 9), max_size=12), min_size=1, max_size=10)


def distinct(lengths: Sequence[int]) -> list[list[int]]:
    """Documents of these lengths in which every token has an id of its own."""
    ids = itertools.count(1)
    return [[next(ids) for _ in range(length)] for length in lengths]


def stream(documents: Documents, row_tokens: int = 7, seed: int = 0, isolate: bool = False) -> StreamRows:
    chosen = np.arange(len(documents.lengths))
    return StreamRows(documents, chosen, row_tokens, SEPARATOR, [seed], isolate)


def whole(documents: Documents, row_tokens: int = 7, seed: int = 0, isolate: bool = False) -> BestFitRows:
    chosen = np.arange(len(documents.lengths))
    return BestFitRows(documents, chosen, row_tokens, SEPARATOR, [seed], isolate)


def same(a: Row, b: Row) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("ids", "targets", "segments"))


# Both packings.

KINDS = pytest.mark.parametrize("kind", [stream, whole])
Kind = Callable[..., RowSource]


@KINDS
@given(
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=12),
    row_tokens=st.integers(1, 16),
    seed=st.integers(0, 3),
)
def test_every_token_of_an_epoch_is_a_target_once(
    kind: Kind, lengths: list[int], row_tokens: int, seed: int, in_memory: InMemory
) -> None:
    """Counted from the rows: separators too, one for each document."""
    rows = kind(in_memory(distinct(lengths)), row_tokens, seed)
    assert rows.tokens == sum(lengths) + len(lengths)
    for epochs in (1, 3):
        number, seen, wanted = 0, Counter[int](), epochs * rows.tokens
        while rows.targets(number) < wanted:
            row = rows.row(number)
            targets = row.ids[row.targets].tolist()
            number += 1
            over = rows.targets(number) - wanted  # a stream's row may run into the next epoch
            seen.update(targets[: len(targets) - max(0, over)])
        assert seen.pop(SEPARATOR) == epochs * len(lengths)
        assert seen == dict.fromkeys(range(1, sum(lengths) + 1), epochs)


@KINDS
@given(
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=12),
    order=st.permutations(range(12)),
    isolate=st.booleans(),
)
def test_a_row_does_not_depend_on_what_was_read_before(
    kind: Kind, lengths: list[int], order: list[int], isolate: bool, in_memory: InMemory
) -> None:
    documents = in_memory(distinct(lengths))
    straight = kind(documents, isolate=isolate)
    expected = [straight.row(number) for number in range(12)]
    shuffled = kind(documents, isolate=isolate)
    for number in order:
        assert same(shuffled.row(number), expected[number])


@KINDS
def test_epochs_are_shuffled_anew_and_by_the_seed(kind: Kind, in_memory: InMemory) -> None:
    documents = in_memory([[i] * 7 for i in range(1, 60)])  # rows of 8, so that an epoch has 59 of them
    orders = set()
    for seed in (0, 1):
        rows = kind(documents, 8, seed)
        for epoch in range(3):
            orders.add(tuple(int(rows.row(epoch * 59 + i).ids[1]) for i in range(59)))
    assert len(orders) == 6


@KINDS
@given(lengths=st.lists(st.integers(1, 25), min_size=1, max_size=12))
def test_a_target_follows_what_precedes_it_in_its_document(
    kind: Kind, lengths: list[int], in_memory: InMemory
) -> None:
    rows = kind(in_memory(distinct(lengths)), 9, isolate=True)
    first = {document[0] for document in distinct(lengths)}
    last = {document[-1] for document in distinct(lengths)}
    for number in range(10):
        row = rows.row(number)
        for t in np.flatnonzero(row.targets).tolist():
            before, token = int(row.ids[t - 1]), int(row.ids[t]) if t else -1
            if t == 0:
                raise AssertionError("nothing comes before the first token of a row")
            if token == SEPARATOR:
                assert before in last
            elif before == SEPARATOR:
                assert token in first
            else:
                assert token == before + 1


@KINDS
def test_only_chosen_documents_are_read(kind: Kind, in_memory: InMemory) -> None:
    documents = in_memory([[1] * 5, [2] * 5, [3] * 5])
    made = type(kind(documents))(documents, np.array([0, 2]), 6, SEPARATOR, [0], False)
    assert {token for number in range(6) for token in made.row(number).ids.tolist()} == {SEPARATOR, 1, 3}
    assert made.tokens == 12


# A stream.


def cut_into_documents(tokens: list[int]) -> Counter[tuple[int, ...]]:
    """What lies between separators; the tokens start at one."""
    assert tokens[0] == SEPARATOR
    cut: list[list[int]] = []
    for token in tokens:
        if token == SEPARATOR:
            cut.append([])
        else:
            cut[-1].append(token)
    return Counter(map(tuple, cut))


@given(documents=documents_of_ids, seed=st.integers(0, 3), length=st.integers(1, 40))
def test_each_epoch_holds_every_document_once(
    in_memory: InMemory, documents: list[list[int]], seed: int, length: int
) -> None:
    source = stream(in_memory(documents), seed=seed)
    size = source.tokens
    assert size == sum(len(document) + 1 for document in documents)
    for epoch in range(3):
        windows = [
            source.window(epoch * size + start, min(length, size - start)).tolist()
            for start in range(0, size, length)
        ]
        joined = [token for window in windows for token in window]
        assert cut_into_documents(joined) == Counter(map(tuple, documents))


@given(documents=documents_of_ids, row_tokens=st.integers(1, 40))
def test_neighbouring_rows_overlap_by_one_token(
    in_memory: InMemory, documents: list[list[int]], row_tokens: int
) -> None:
    """It is a target in the first row and context in the second."""
    source = stream(in_memory(documents), row_tokens)
    rows = [source.row(number) for number in range(6)]
    targets = [token for row in rows for token in row.ids[1:].tolist()]
    assert targets == source.window(1, len(targets)).tolist()
    assert all(a.ids[-1] == b.ids[0] for a, b in itertools.pairwise(rows))
    assert all(row.targets[1:].all() for row in rows)


def test_documents_are_hidden_from_each_other_only_when_asked(in_memory: InMemory) -> None:
    documents = in_memory([[1, 2, 3], [4, 5], [6] * 20])
    assert not stream(documents, 31).row(0).segments.any()
    for number in range(8):
        row = stream(documents, 31, isolate=True).row(number)
        starts = np.diff(row.segments) != 0  # a segment begins at each separator and nowhere else
        assert np.array_equal(starts, row.ids[1:] == SEPARATOR)


# Best fit.


@given(st.lists(st.integers(1, 16), min_size=1, max_size=60))
def test_pieces_fit_and_no_two_rows_are_half_empty(lengths: list[int]) -> None:
    """Best fit opens a row only for what fits nowhere: at most one row is half empty or more."""
    row_of, count = best_fit(lengths, 16)
    used = np.bincount(row_of, weights=lengths, minlength=count)
    assert len(used) == count
    assert 0 < used.min() <= used.max() <= 16
    assert int((used <= 8).sum()) <= 1


@given(st.lists(st.integers(1, 16), min_size=1, max_size=60))
def test_each_piece_goes_to_the_fullest_row_it_fits_in(lengths: list[int]) -> None:
    used: list[int] = []
    for length, row in zip(lengths, best_fit(lengths, 16)[0], strict=True):
        fits = [u for u in used if u + length <= 16]
        if row == len(used):
            assert not fits
            used.append(0)
        else:
            assert used[row] == max(fits)
        used[row] += length


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20), isolate=st.booleans())
def test_documents_that_fit_a_row_are_whole(lengths: list[int], isolate: bool, in_memory: InMemory) -> None:
    """With the separator before and the one behind, T - 1 of its own tokens fit into T + 1."""
    rows = whole(in_memory(distinct(lengths)), 15, isolate=isolate)
    documents = {tuple(d) for d in distinct(lengths) if len(d) <= 14}
    number, found = 0, set()
    while rows.targets(number) < rows.tokens:
        row = rows.row(number)
        number += 1
        tokens = row.ids[row.segments >= 0].tolist()
        assert row.segments[len(tokens) :].tolist() == [-1] * (16 - len(tokens))
        assert not row.targets[len(tokens) :].any()
        text = ",".join(map(str, tokens))
        found |= {d for d in documents if f"{SEPARATOR},{','.join(map(str, d))},{SEPARATOR}" in text}
        pieces = len(tokens) - int(row.targets.sum())  # each begins with a token that is no target
        assert len(set(row.segments.tolist()) - {-1}) == (pieces if isolate else 1)
    assert found == documents


@pytest.mark.parametrize("seed", range(3))
def test_little_of_a_row_of_documents_is_padding(seed: int, in_memory: InMemory) -> None:
    lengths = np.random.default_rng(seed).integers(20, 900, 1000).tolist()
    rows = whole(in_memory([[1] * n for n in lengths]), 511, seed)
    count = next(n for n in itertools.count() if rows.targets(n) >= rows.tokens)
    assert rows.tokens / 511 <= count <= 1.06 * rows.tokens / 511


# Rows of conversations.


def equal(a: Batch, b: Batch) -> bool:
    assert a.segment_ids is not None
    assert b.segment_ids is not None
    return (
        torch.equal(a.input_ids, b.input_ids)
        and torch.equal(a.loss_mask, b.loss_mask)
        and torch.equal(a.segment_ids, b.segment_ids)
    )


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
        assert equal(shuffled.rows(row, 2), expected[row])


@pytest.mark.parametrize("seed", range(3))
def test_little_room_is_wasted(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(20, 200, 2000).tolist()
    rows = conversation_rows(lengths, row_tokens=511, seed=seed)
    needed = sum(lengths) / 512
    assert needed <= rows.epoch_rows(0) <= 1.05 * needed


def test_epochs_of_conversations_differ() -> None:
    rows = conversation_rows([5] * 30, row_tokens=15)
    count = rows.epoch_rows(0)
    assert not torch.equal(rows.rows(0, count).input_ids, rows.rows(count, count).input_ids)
    other = conversation_rows([5] * 30, row_tokens=15, seed=1)
    assert not torch.equal(rows.rows(0, count).input_ids, other.rows(0, count).input_ids)
