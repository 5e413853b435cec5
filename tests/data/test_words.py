"""Words as numbers: the same words give the same numbers, and runs of words are told apart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.data.words import ngram_hashes, word_hashes, words_of


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The cat -- it's HERE!", ["the", "cat", "it", "s", "here"]),
        ("e\u0301t\u00e9", ["\u00e9t\u00e9"]),  # composed and decomposed letters are the same
        ("\u6211\u7231cats", ["\u6211", "\u7231", "cats"]),
        ("...!", []),
    ],
)
def test_words_are_lower_case_and_without_punctuation(text: str, words: list[str]) -> None:
    assert words_of(text) == words


def test_the_number_of_a_word_is_its_blake2b() -> None:
    """From the reference: the same on every machine, in every process."""
    assert word_hashes(["abc"]).tolist() == [0xD8BB14D833D59559]


@given(st.lists(st.sampled_from("abcde"), max_size=40), st.integers(1, 15))
def test_equal_runs_and_only_they_have_equal_numbers(words: list[str], n: int) -> None:
    numbers = ngram_hashes(word_hashes(words), n)
    runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    assert len(numbers) == len(runs)
    assert len(set(numbers.tolist())) == len(set(runs))
    assert numbers.dtype == np.uint64
