"""Words of a text as numbers, so that runs of words can be compared across millions of documents."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

# Scripts that put no spaces between words: there, each character counts as a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[^\W{_UNSPACED}]+|[{_UNSPACED}]")
_CACHED_WORDS = 200_000
_MULTIPLIERS = np.random.default_rng(13).integers(0, 2**63, 256, dtype=np.uint64) * np.uint64(2) + np.uint64(
    1
)


def words_of(text: str) -> list[str]:
    """The words of a text in lower case and without punctuation, as Brown et al. (2020, appendix C) compare
    them; a character of Chinese, Japanese, Thai and other scripts without spaces is a word."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return _WORD.findall(text.lower())


class _WordHashes(dict[str, int]):
    """64-bit hashes of words, the same on every machine; computed once for each word."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _CACHED_WORDS:  # memory stays bounded, whatever the words are
            self.clear()
        digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self[word] = value = int.from_bytes(digest, "big")
        return value


_word_hashes = _WordHashes()


def word_hashes(words: Sequence[str]) -> Hashes:
    """A 64-bit number for each word."""
    return np.fromiter(map(_word_hashes.__getitem__, words), np.uint64, len(words))


def ngram_hashes(hashes: Hashes, n: int) -> Hashes:
    """A 64-bit number for each run of `n` words; empty if there are fewer words.

    A multilinear hash (Lemire & Kaser 2014, "Strongly universal string hashing is fast"), whose upper bits
    are then mixed into the lower.
    """
    count = max(len(hashes) - n + 1, 0)
    result = np.full(count, n, np.uint64)
    for i in range(n if count else 0):
        result += hashes[i : i + count] * _MULTIPLIERS[i % len(_MULTIPLIERS)]
    return result ^ (result >> np.uint64(32))
