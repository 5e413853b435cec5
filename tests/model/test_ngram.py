"""The n-gram model: against numbers worked out by hand, the definition in plain Python, and damaged files."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from fledge.errors import UserError
from fledge.model.ngram import FALLBACK, NOTHING, NgramConfig, NgramModel, discounts, is_ngram, load_ngram

# Documents as shards have them: the separator 0, then ids.
DOCUMENTS = [[0, 1, 2], [0, 1, 2], [0, 1, 3]]


class NoTokenizer:
    def save(self, directory: Path) -> None:
        (directory / "tokenizer.json").write_text("{}", encoding="utf-8")


def counted(documents: list[list[int]], order: int, vocab_size: int) -> NgramModel:
    config = NgramConfig(vocab_size, order, 100)
    return NgramModel.count([np.array(ids, dtype=np.uint16) for ids in documents], 0, config)


def test_bigrams_by_hand() -> None:
    """Unigrams count the tokens before them: {2, 3} before 0, one before each of 1, 2, 3; 4 never came. With
    the discounts 0.5, 1, 1.5 there is 0.5 * 3 + 1 = 2.5 of 5 left for the uniform 1/5."""
    model = counted(DOCUMENTS, 1, 5)
    # Of order 1, plain counts: 0 and 1 three times, 2 twice, 3 once; discounts 1.5, 1.5, 1, 0.5 of 9.
    uniform = 4.5 / 9 / 5
    expected = [1.5 / 9 + uniform, 1.5 / 9 + uniform, 1 / 9 + uniform, 0.5 / 9 + uniform, uniform]
    assert model.probabilities(np.empty((1, 0), dtype=np.int64))[0] == pytest.approx(expected)

    model = counted(DOCUMENTS, 2, 5)
    unigrams = [0.3, 0.2, 0.2, 0.2, 0.1]
    after = model.probabilities(np.array([[NOTHING], [4], [1], [0], [2]]))
    assert after[0] == pytest.approx(unigrams), "nothing stands before it"
    assert after[1] == pytest.approx(unigrams), "what stands before it was never seen"
    # After 1: 2 twice and 3 once, of 3; 1 + 0.5 of 3 is left for the unigrams.
    assert after[2] == pytest.approx([0.15, 0.1, 1 / 3 + 0.1, 0.5 / 3 + 0.1, 0.05])
    # After the separator: 1 three times, of 3; 1.5 of 3 is left. Nothing follows a document's end.
    assert after[3] == pytest.approx([0.15, 0.5 + 0.1, 0.1, 0.1, 0.05])
    assert after[4] == pytest.approx([0.5 + 0.15, 0.1, 0.1, 0.1, 0.05])


def test_discounts_by_hand() -> None:
    """n1..n4 = 8, 3, 2, 1: Y = 8 / 14, so D1 = 1 - 2Y * 3/8, D2 = 2 - 3Y * 2/3, D3+ = 3 - 4Y * 1/2."""
    counts = np.array([1] * 8 + [2] * 3 + [3] * 2 + [4] + [9])
    assert discounts(counts) == pytest.approx((4 / 7, 6 / 7, 13 / 7))
    assert discounts(counts[:-2]) == FALLBACK, "nothing occurs four times"
    assert discounts(np.array([1, 2] + [3] * 9 + [4])) == FALLBACK, "D2 would be below 0"


def by_definition(
    documents: list[list[int]], order: int, vocab_size: int
) -> dict[tuple[int, ...], list[float]]:
    """Chen & Goodman's recursion with dictionaries, for every context that occurs."""
    grams: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(order + 1)]
    for ids in documents:
        closed = [*ids, 0]
        for n in range(1, order + 1):
            starts = range(1 if n == 1 else 0, len(closed) - n + 1)
            grams[n].update(tuple(closed[i : i + n]) for i in starts)
    for n in range(1, order):
        before = Counter(gram[1:] for gram in grams[n + 1])
        grams[n] = Counter({gram: before[gram] or count for gram, count in grams[n].items()})
    followers = [defaultdict[tuple[int, ...], dict[int, int]](dict) for _ in range(order + 1)]
    for n in range(1, order + 1):
        for gram, count in grams[n].items():
            followers[n][gram[:-1]][gram[-1]] = count
    levels = [(0.0, *discounts(np.array(list(level.values())))) if level else () for level in grams]

    def probability(context: tuple[int, ...], token: int) -> float:
        n = len(context) + 1
        lower = probability(context[1:], token) if context else 1 / vocab_size
        seen = followers[n].get(context)
        if not seen:
            return lower
        kept = sum(levels[n][min(count, 3)] for count in seen.values())
        count = seen.get(token, 0)
        return (count - levels[n][min(count, 3)] + kept * lower) / sum(seen.values())

    contexts = {context for n in range(1, order + 1) for context in followers[n]}
    return {context: [probability(context, token) for token in range(vocab_size)] for context in contexts}


texts = st.lists(st.lists(st.integers(1, 4), max_size=12).map(lambda ids: [0, *ids]), min_size=1, max_size=12)


@given(texts, st.integers(1, 4))
def test_the_definition(documents: list[list[int]], order: int) -> None:
    model = counted(documents, order, 6)
    expected = by_definition(documents, order, 6)
    contexts = [[NOTHING] * (order - 1 - len(context)) + [*context] for context in expected]
    found = model.probabilities(np.array(contexts, dtype=np.int64).reshape(len(contexts), order - 1))
    for row, values in zip(found, expected.values(), strict=True):
        assert row == pytest.approx(values, abs=1e-12)


@given(
    texts, st.integers(1, 5), st.lists(st.lists(st.integers(NOTHING, 5), min_size=4, max_size=4), min_size=1)
)
def test_probabilities_sum_to_1_behind_anything(
    documents: list[list[int]], order: int, histories: list[list[int]]
) -> None:
    contexts = np.array(histories)[:, 4 - (order - 1) :]
    p = counted(documents, order, 6).probabilities(contexts)
    assert p.sum(1) == pytest.approx(np.ones(len(p)))
    assert (p > 0).all()


def test_estimated_discounts_are_used() -> None:
    """On a text with all counts of counts, where a level's discounts are none of the fallback's."""
    rng = np.random.default_rng(0)
    documents = [[0, *np.minimum(rng.geometric(0.25, 30), 19)] for _ in range(60)]
    model, expected = counted(documents, 3, 20), by_definition(documents, 3, 20)
    pairs = [context for context in expected if len(context) == 2]
    found = model.probabilities(np.array(pairs))
    assert np.abs(found - np.array([expected[pair] for pair in pairs])).max() < 1e-12
    all_pairs = Counter(pair for ids in documents for pair in itertools.pairwise([*ids[1:], 0]))
    assert discounts(np.array(list(all_pairs.values()))) != FALLBACK


def test_a_saved_model_is_the_same(tmp_path: Path) -> None:
    model = counted(DOCUMENTS, 3, 5)
    model.save(tmp_path, NoTokenizer(), {"stage": "pretrain"}, 0)
    assert is_ngram(tmp_path)
    loaded = load_ngram(tmp_path)
    assert loaded.config == model.config
    contexts = np.array(list(itertools.product(range(-1, 5), repeat=2)))
    assert np.array_equal(loaded.probabilities(contexts), model.probabilities(contexts))
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {
        "README.md", "config.json", "generation_config.json", "lineage.json", "model.safetensors",
        "tokenizer.json",
    }  # fmt: skip


def test_damage_is_named(tmp_path: Path) -> None:
    model = counted(DOCUMENTS, 2, 5)
    model.save(tmp_path, NoTokenizer(), {}, 0)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    good, whole = load_file(file), json.loads(config.read_text())
    reversed_keys = good["order_2.keys"][::-1].copy()
    for change in (
        {"order_2.keys": reversed_keys},
        {"order_2.keys": good["order_2.keys"] + 1000},
        {"order_2.counts": good["order_2.counts"] * 0},
        {"order_2.counts": good["order_2.counts"][:-1]},
        {"order_2.counts": good["order_2.counts"].astype(np.float64)},
    ):
        save_file({**good, **change}, file)
        with pytest.raises(UserError, match="order_2 holds no counts"):
            load_ngram(tmp_path)
    file.write_bytes(b"no")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_ngram(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match="no such file"):
        load_ngram(tmp_path)
    config.write_text(json.dumps({**whole, "order": "2"}))
    with pytest.raises(UserError, match="whole numbers above 0"):
        load_ngram(tmp_path)
