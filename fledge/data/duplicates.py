"""Duplicates across all sources: the same text, and almost the same text (Broder 1997: MinHash)."""

from __future__ import annotations

import hashlib
import sys
from array import array
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fledge.data.readers import need
from fledge.data.words import Hashes, ngram_hashes

PERMUTATIONS = 120
BAND_ROWS = 6
"""20 bands of 6: of pairs with a Jaccard similarity of 0.8, 99.8% meet in a band; of those with 0.5, 27%."""
MAX_LINKS = 100
"""How many documents of a band are looked at, the latest first. Texts made from one template all meet in the
bands of the template; looking at all of them would take time that grows with their square."""
SHORT_WORDS = 30
"""In a text with fewer words each word counts: it repeats another if all its shingles are the same."""


def text_hash(text: str) -> int:
    """64 bits of a text whose white space is all the same."""
    joined = " ".join(text.split()).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "big")


def shingles(text: str, hashes: Hashes, words: int) -> Hashes:
    """The runs of so many words, of which `hashes` are the text's; a shorter text is one run."""
    if not len(hashes):  # no word: it is like nothing but itself
        return np.array([text_hash(text)], np.uint64)
    return ngram_hashes(hashes, min(words, len(hashes)))


def shingle_set_hash(shingled: Hashes) -> int:
    """64 bits of a set of shingles, in any order and however often."""
    return int.from_bytes(hashlib.blake2b(np.unique(shingled).tobytes(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Match:
    """The earlier document that a text repeats."""

    number: int
    """The how manieth of those that were added, from 0."""
    similarity: float
    """Estimated Jaccard similarity of their shingles."""


@dataclass(frozen=True)
class Sketch:
    """A MinHash signature, and a key for each of its bands."""

    signature: npt.NDArray[np.uint32]
    keys: Hashes


class NearDuplicates:
    """An index of MinHash signatures (Broder 1997) with locality-sensitive hashing (Indyk & Motwani 1998).

    A document costs 4 bytes for each of the 120 permutations and for each of the 20 bands, and 4 to 8 bytes
    more for each band in its hash table: 640 to 720 bytes; while the index grows, up to twice that.
    Of each band at most `MAX_LINKS` (100) documents are looked at, the latest first: an earlier one is missed
    if in every band that it shares so many have come since.
    The standard error of an estimate is sqrt(j * (1 - j) / 120): 0.037 at a similarity j of 0.8.
    Raises UserError if `rensa` is not installed.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._digests = need("rensa", "data").RMinHash.digest_matrix_from_flat_token_hashes
        self._bands = np.arange(PERMUTATIONS // BAND_ROWS)
        factors = np.random.default_rng(seed).integers(0, 2**63, PERMUTATIONS, dtype=np.uint64)
        self._factors = factors * np.uint64(2) + np.uint64(1)
        self._count = 0
        self._signatures = np.zeros((0, PERMUTATIONS), np.uint32)
        # Chains of documents whose bands fall into the same slot: the latest of each slot, and for each
        # document the one before it. Numbers are those of documents plus 1; 0 ends a chain.
        self._latest = np.zeros((len(self._bands), 0), np.uint32)
        self._before = np.zeros((0, len(self._bands)), np.uint32)

    @property
    def memory_bytes(self) -> int:
        """What the index takes."""
        return self._signatures.nbytes + self._latest.nbytes + self._before.nbytes

    def sketch(self, shingled: Hashes) -> Sketch:
        """What is remembered of a document: of its shingles, in any order and however often."""
        borders = np.array([0, len(shingled)], np.uint64)
        rows = self._digests(np.ascontiguousarray(shingled), borders, PERMUTATIONS, self._seed).to_rows()
        signature = np.array(rows, np.uint32)
        return Sketch(signature[0], self._keys(signature)[0])

    def find(self, sketch: Sketch, threshold: float) -> Match | None:
        """The most similar of the documents that share a band, if it reaches the threshold."""
        candidates = np.unique(self.links(sketch))
        if not len(candidates):
            return None
        similarities = (self._signatures[candidates] == sketch.signature).mean(axis=1)
        best = int(similarities.argmax())
        if similarities[best] < threshold:
            return None
        return Match(int(candidates[best]), float(similarities[best]))

    def links(self, sketch: Sketch) -> npt.NDArray[np.int64]:
        """The documents that are looked at, one for each link followed: at most `MAX_LINKS` a band."""
        found = [np.zeros(0, np.int64)]
        bands = self._bands
        place = self._latest[bands, self._slots(sketch.keys)] if self._count else np.zeros(0, np.uint32)
        for _ in range(MAX_LINKS):
            filled = np.flatnonzero(place)
            if not len(filled):
                break
            bands, numbers = bands[filled], place[filled].astype(np.int64) - 1
            found.append(numbers)
            place = self._before[numbers, bands]
        return np.concatenate(found)

    def add(self, sketch: Sketch) -> None:
        """Add a document; its number is how many there were before it."""
        if self._count == len(self._signatures):
            self._grow()
        self._signatures[self._count] = sketch.signature
        self._link(self._count, self._slots(sketch.keys))
        self._count += 1

    def _keys(self, signatures: npt.NDArray[np.uint32]) -> Hashes:
        """64 bits for each band of each signature."""
        mixed = (signatures + np.uint64(1)) * self._factors
        mixed ^= mixed >> np.uint64(32)
        mixed *= self._factors[::-1]
        keys: Hashes = mixed.reshape(len(signatures), len(self._bands), BAND_ROWS).sum(axis=2)
        return keys ^ (keys >> np.uint64(32))

    def _slots(self, keys: Hashes) -> npt.NDArray[np.intp]:
        """The slot of each band in its table, whose size is a power of two."""
        return (keys & np.uint64(self._latest.shape[1] - 1)).astype(np.intp)

    def _link(self, number: int, slots: npt.NDArray[np.intp]) -> None:
        self._before[number] = self._latest[self._bands, slots]
        self._latest[self._bands, slots] = number + 1

    def _grow(self) -> None:
        size = max(1024, 2 * len(self._signatures))
        for name in ("_signatures", "_before"):
            old = getattr(self, name)
            new = np.zeros((size, old.shape[1]), np.uint32)
            new[: len(old)] = old
            setattr(self, name, new)
        self._latest = np.zeros((len(self._bands), size), np.uint32)
        for start in range(0, self._count, 4096):
            slots = self._slots(self._keys(self._signatures[start : min(start + 4096, self._count)]))
            for number, row in enumerate(slots, start=start):
                self._link(number, row)


class Repeats:
    """The documents that were kept, to be asked which of them a text repeats.

    Texts of at least `SHORT_WORDS` words are compared by an index of signatures, shorter ones by a hash of
    all their shingles; the long are not compared with the short.
    Raises UserError if `rensa` is not installed.
    """

    def __init__(self, seed: int, jaccard: float) -> None:
        self._jaccard = jaccard
        self._index = NearDuplicates(seed)
        self._numbers = array("I")  # of the documents in the index
        self._short: dict[int, int] = {}

    @property
    def memory_bytes(self) -> int:
        """What is remembered takes, at 32 bytes for each number in the table of short texts."""
        short = sys.getsizeof(self._short) + 64 * len(self._short)
        return self._index.memory_bytes + self._numbers.itemsize * len(self._numbers) + short

    def key(self, shingled: Hashes, words: int) -> Sketch | int:
        """What is remembered of a text with so many words."""
        return self._index.sketch(shingled) if words >= SHORT_WORDS else shingle_set_hash(shingled)

    def find(self, key: Sketch | int) -> tuple[int, str] | None:
        """The number of the document that a text repeats, and why it does."""
        if isinstance(key, int):
            return (self._short[key], "the same runs of words") if key in self._short else None
        match = self._index.find(key, self._jaccard)
        if match is None:
            return None
        return self._numbers[match.number], f"similarity {match.similarity:.2f} >= {self._jaccard:g}"

    def add(self, key: Sketch | int, number: int) -> None:
        """Remember a document under a number."""
        if isinstance(key, int):
            self._short[key] = number
        else:
            self._index.add(key)
            self._numbers.append(number)
