"""Documents that share a run of words with an evaluation: they would let a model know the answers.

After Brown et al. 2020, "Language models are few-shot learners", appendix C: runs of 13 words in lower case
and without punctuation. There the run and 200 characters around it are cut out; here the document goes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fledge.data.privacy import mask
from fledge.data.readers import kind_of
from fledge.data.sources import Source, list_files, read_documents, read_records
from fledge.data.words import Hashes, ngram_hashes, word_hashes, words_of
from fledge.errors import UserError

NGRAM_WORDS = 13
SHORTEST_WORDS = 8
"""Evaluation texts of 8 to 12 words are looked for whole; shorter ones are too common to look for."""
DIFFERENT_WORDS = 5
"""A run with fewer different words, numbers aside, is a table or a list: it tells nothing of an answer."""
_TABLE_BITS = 22


class Evaluations:
    """The runs of words of evaluation files. Raises UserError for a file that cannot be read or has none."""

    def __init__(self, paths: Sequence[str], masked: Sequence[str] = ()) -> None:
        self.files = list(paths)
        self._file_of: dict[int, dict[int, int]] = {}  # length -> hash -> place in `files`
        for place, path in enumerate(paths):
            # Texts are masked as the documents are, or what was masked there would hide what they share.
            if not sum(self._add(mask(text, masked).text, place) for text in evaluation_texts(path)):
                raise UserError(f"{path}: no text of {SHORTEST_WORDS} words or more to keep out of the data")
        # Most runs of a document are in no evaluation: a table of bits says so quickly.
        self._bits: dict[int, npt.NDArray[np.bool_]] = {}
        for length, known in self._file_of.items():
            bits = np.zeros(2**_TABLE_BITS, bool)
            bits[np.fromiter(known, np.uint64, len(known)) & np.uint64(2**_TABLE_BITS - 1)] = True
            self._bits[length] = bits

    def _add(self, text: str, place: int) -> bool:
        """Whether the text is long enough."""
        words = words_of(text)
        hashes = word_hashes(words)
        if len(hashes) < SHORTEST_WORDS:
            return False
        length = min(len(hashes), NGRAM_WORDS)
        known = self._file_of.setdefault(length, {})
        for start, value in enumerate(ngram_hashes(hashes, length).tolist()):
            different = {word for word in words[start : start + length] if not word.isdecimal()}
            if len(different) >= DIFFERENT_WORDS:
                known.setdefault(value, place)
        return True

    def find(self, words: Sequence[str], hashes: Hashes) -> str | None:
        """Why a document with these words is too close to an evaluation; None if it is not."""
        for length, known in self._file_of.items():
            runs = ngram_hashes(hashes, length)
            maybe = np.flatnonzero(self._bits[length][runs & np.uint64(2**_TABLE_BITS - 1)])
            for start in maybe.tolist():
                place = known.get(int(runs[start]))
                if place is not None:
                    shared = " ".join(words[start : start + length])
                    return f"{length} words are in {self.files[place]}: {shared}"
        return None


def evaluation_texts(path: str) -> Iterator[str]:
    """The texts of an evaluation: all strings in the rows of .jsonl and .parquet files (also .gz and .zst),
    the paragraphs of other files; the lines of a file without blank lines. A folder or glob is all its files.
    """
    for file in list_files(Source("evaluation", path, None)):
        source = Source("evaluation", str(file.path), None)
        if kind_of(file.path) in ("jsonl", "parquet"):
            for row in read_records(source):
                yield from _strings(row)
        else:
            for document in read_documents(source):
                paragraphs = re.split(r"\n[ \t\r]*\n", document)
                yield from paragraphs if len(paragraphs) > 1 else document.split("\n")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
