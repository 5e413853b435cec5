"""Duplicates: what counts as the same, and estimates against exact Jaccard similarities."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.data.duplicates import MAX_LINKS, NearDuplicates, Repeats, Sketch, shingles, text_hash
from fledge.data.words import Hashes, word_hashes, words_of

pytest.importorskip("rensa")


def shingles_of(text: str, words: int = 5) -> Hashes:
    return shingles(text, word_hashes(words_of(text)), words)


@given(st.text(max_size=60), st.text(max_size=60))
def test_the_same_text_is_the_same_but_for_white_space(one: str, other: str) -> None:
    assert (text_hash(one) == text_hash(other)) == (one.split() == other.split())
    assert text_hash(one) == text_hash("\n\t" + "  ".join(one.split()))


def test_shingles_are_runs_of_words() -> None:
    assert len(shingles_of("a b c d e f g")) == 3
    assert len(shingles_of("a b c")) == 1  # shorter: one run
    assert shingles_of("a b c").tolist() != shingles_of("a b d").tolist()
    assert len(shingles_of("!!!")) == 1 and shingles_of("!!!").tolist() != shingles_of("???").tolist()


def sets(rng: np.random.Generator, jaccard: float, size: int = 900) -> tuple[Hashes, Hashes]:
    """Two sets of `size` numbers with this similarity: 2 * size * j / (1 + j) of them are in both."""
    both = round(2 * size * jaccard / (1 + jaccard))
    numbers = rng.integers(0, 2**63, 2 * size - both, dtype=np.uint64)
    return numbers[:size], numbers[size - both :]


@pytest.mark.parametrize("jaccard", [0.5, 0.8, 0.95])
def test_estimates_are_as_good_as_the_formula_says(jaccard: float) -> None:
    """Mean and spread over 200 pairs: sqrt(j * (1 - j) / 120), Broder 1997."""
    rng = np.random.default_rng(1)
    estimates = []
    for seed in range(200):
        index = NearDuplicates(seed)
        one, other = (index.sketch(each) for each in sets(rng, jaccard))
        estimates.append(float((one.signature == other.signature).mean()))
    deviation = (jaccard * (1 - jaccard) / 120) ** 0.5
    assert np.mean(estimates) == pytest.approx(jaccard, abs=4 * deviation / 200**0.5)
    assert np.std(estimates) == pytest.approx(deviation, rel=0.25)


def test_most_pairs_at_the_threshold_meet_and_few_far_below_it() -> None:
    """1 - (1 - j^6)^20: 99.8% at 0.8, 1.4% at 0.3; here over 400 pairs in one index."""
    rng = np.random.default_rng(2)
    for jaccard, low, high in ((0.8, 0.98, 1.0), (0.3, 0.0, 0.06)):
        index = NearDuplicates(0)
        pairs = [sets(rng, jaccard) for _ in range(400)]
        for one, _ in pairs:
            index.add(index.sketch(one))
        found = [index.find(index.sketch(other), 0.0) for _, other in pairs]
        right = [match is not None and match.number == number for number, match in enumerate(found)]
        assert low <= np.mean(right) <= high


def test_everything_is_found_again_while_the_index_grows() -> None:
    rng = np.random.default_rng(3)
    index = NearDuplicates(7)
    sketches = [index.sketch(rng.integers(0, 2**63, 5, dtype=np.uint64)) for _ in range(3000)]
    for number, sketch in enumerate(sketches):
        assert index.find(sketch, 1.0) is None
        index.add(sketch)
        if number in (0, 1023, 1024, 2999):
            for earlier in (0, number // 2, number):
                match = index.find(sketches[earlier], 1.0)
                assert match is not None and (match.number, match.similarity) == (earlier, 1.0)
    assert index.memory_bytes / 4096 == pytest.approx(640)  # as promised, in a table for 4096


def test_a_seed_gives_the_same_signatures_and_another_gives_others() -> None:
    text = shingles_of(" ".join(f"word{i}" for i in range(100)))
    one, again, other = (NearDuplicates(seed).sketch(text).signature for seed in (1, 1, 2))
    assert (one == again).all() and (one == other).mean() < 0.1
    shuffled = np.random.default_rng(0).permutation(np.concatenate([text, text]))
    assert (NearDuplicates(1).sketch(shuffled).signature == one).all()


def test_one_changed_word_in_a_long_text_is_a_near_duplicate() -> None:
    rng = random.Random(0)
    words = [rng.choice("abcdefghijklmnop") * rng.randint(2, 5) for _ in range(300)]
    changed = [*words[:150], "changed", *words[151:]]
    index = NearDuplicates(0)
    index.add(index.sketch(shingles_of(" ".join(rng.sample(words, 300)))))
    index.add(index.sketch(shingles_of(" ".join(words))))
    match = index.find(index.sketch(shingles_of(" ".join(changed))), 0.8)
    assert match is not None and match.number == 1


def test_texts_of_one_template_take_a_bounded_number_of_links_and_are_told_apart() -> None:
    """250 numbers in common and 50 of their own: a third of all bands hold the template's numbers alone."""
    rng = np.random.default_rng(4)
    template = rng.integers(0, 2**63, 250, dtype=np.uint64)
    own = rng.integers(0, 2**63, (900, 50), dtype=np.uint64)
    index = NearDuplicates(0)
    for each in own:
        index.add(index.sketch(np.concatenate([template, each])))
    for number in range(0, 900, 9):
        sketch = index.sketch(np.concatenate([template[5:], own[number]]))  # Jaccard 295 / 300
        shared = (index.sketch(template).keys == sketch.keys).sum()
        links = index.links(sketch)
        assert shared * MAX_LINKS <= len(links) <= 20 * MAX_LINKS
        assert np.bincount(links).max() <= 20  # a document once a band
        match = index.find(sketch, 0.9)
        assert match is not None and match.number == number and match.similarity > 0.9


def test_a_chain_is_followed_up_to_its_limit_and_from_the_latest() -> None:
    index = NearDuplicates(0)
    sketch = index.sketch(np.arange(50, dtype=np.uint64))
    assert not len(index.links(sketch))
    for count in range(1, 2 * MAX_LINKS):
        index.add(sketch)
        links = index.links(sketch)
        assert len(links) == 20 * min(count, MAX_LINKS)
        assert (links.max(), links.min()) == (count - 1, max(0, count - MAX_LINKS))


def test_a_short_text_repeats_one_with_the_same_shingles_only() -> None:
    kept = Repeats(0, 0.8)

    def key(text: str) -> Sketch | int:
        return kept.key(shingles_of(text), len(words_of(text)))

    short = " ".join(f"w{i}" for i in range(29))
    long = " ".join(f"v{i}" for i in range(60))
    kept.add(key(long), 3)
    before = kept.memory_bytes
    kept.add(key(short), 5)
    kept.add(key("a b a b a b a b"), 6)
    kept.add(key("!!!"), 8)
    kept.add(key(long.replace("v", "u")), 9)
    assert kept.memory_bytes - before < 1000  # no signature of the short ones; one more entry in the index
    found = {text: kept.find(key(text)) for text in (short.upper(), "a, b a b a b a b a b", "!!!")}
    assert [match and match[0] for match in found.values()] == [5, 6, 8]
    assert all(match and match[1] == "the same runs of words" for match in found.values())
    assert kept.find(key(short + " more")) is None and kept.find(key("w1 " + short[3:])) is None
    assert kept.find(key("???")) is None
    for text, number in ((long, 3), (long + " more", 3), (long.replace("v", "u"), 9)):
        match = kept.find(key(text))
        assert match is not None and match[0] == number and match[1].endswith(">= 0.8")
