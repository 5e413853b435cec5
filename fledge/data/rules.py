"""What the quality rules look at, as pure functions: the reason for which a text is left out, or None.

Rae et al. 2021, "Scaling language models: methods, analysis & insights from training Gopher", appendix A.1;
Raffel et al. 2020, "Exploring the limits of transfer learning with a unified text-to-text transformer",
section 2.2 (the numbers of its first version and of its published code).
"""

from __future__ import annotations

import re
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fledge.data.words import Hashes, ngram_hashes

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
BULLET = re.compile(r"[•‣▪●○◦∙·*–-]\s")  # noqa: RUF001
ELLIPSIS_ENDS = ("...", "…")
SENTENCE_ENDS = (".", "?", "!", '"', "”", "’", "'", "。", "?", "!", "」", "』")  # noqa: RUF001
POLICIES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
_SENTENCE = re.compile(r"[.?!](?=[\"'”’)\]]*(?:\s|$))|[。?!]")  # noqa: RUF001
_ELLIPSIS = re.compile(r"\.{3,}|…")
_LETTER = re.compile(r"[^\W\d_]")
_PARAGRAPH = re.compile(r"\n[ \t\r]*\n\s*")


class Text:
    """A text and what the rules count in it, each found at most once."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        """What white space separates."""
        return self.text.split()

    @cached_property
    def word_lengths(self) -> npt.NDArray[np.int64]:
        """Characters of each word."""
        return np.fromiter(map(len, self.words), np.int64, len(self.words))

    @cached_property
    def word_numbers(self) -> Hashes:
        """A number for each word, the same for the same word in lower case."""
        numbers: dict[str, int] = {}
        lowered = self.text.lower().split()
        found = (numbers.setdefault(word, len(numbers)) for word in lowered)
        return np.fromiter(found, np.uint64, len(lowered))

    @cached_property
    def lines(self) -> list[str]:
        """Lines that are not blank, without white space around them."""
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @cached_property
    def paragraphs(self) -> list[str]:
        """What blank lines separate."""
        return [part for part in map(str.strip, _PARAGRAPH.split(self.text)) if part]

    @cached_property
    def duplicate_starts(self) -> dict[int, npt.NDArray[np.bool_]]:
        """For each n from 2 to 10, at which words runs of n words begin that occur more than once.

        A run can only repeat where the run shorter by a word does: each n looks at what the last one left.
        """
        found: dict[int, npt.NDArray[np.bool_]] = {}
        candidates = np.arange(len(self.words))
        for n in range(2, 11):
            candidates = candidates[candidates <= len(self.words) - n]
            repeated = np.zeros(len(self.words), bool)
            if len(candidates):
                hashes = ngram_hashes(self.word_numbers, n)[candidates]
                candidates = candidates[_is_repeated(hashes)]
                repeated[candidates] = True
            found[n] = repeated
        return found


def _is_repeated(hashes: Hashes) -> npt.NDArray[np.bool_]:
    order = np.argsort(hashes, kind="stable")
    equal = hashes[order][1:] == hashes[order][:-1]
    result = np.zeros(len(hashes), bool)
    result[order[1:][equal]] = True
    result[order[:-1][equal]] = True
    return result


# --- Gopher: the document as a whole --------------------------------------------------------------


def min_words(text: Text) -> str | None:
    """At least 50 words."""
    return f"{len(text.words):,} words < 50" if len(text.words) < 50 else None


def max_words(text: Text) -> str | None:
    """At most 100,000 words."""
    return f"{len(text.words):,} words > 100,000" if len(text.words) > 100_000 else None


def word_length(text: Text) -> str | None:
    """Words of 3 to 10 characters in the mean."""
    mean = float(text.word_lengths.mean()) if text.words else 0.0
    if 3 <= mean <= 10:
        return None
    return f"mean word length {mean:.2f} " + ("< 3" if mean < 3 else "> 10")


def symbols(text: Text) -> str | None:
    """At most 0.1 hash signs and 0.1 ellipses per word."""
    hashes = text.text.count("#")
    ellipses = len(_ELLIPSIS.findall(text.text)) if "..." in text.text or "…" in text.text else 0
    for name, count in (("hash signs", hashes), ("ellipses", ellipses)):
        share = count / max(len(text.words), 1)
        if share > 0.1:
            return f"{name} per word {share:.2f} > 0.1"
    return None


def _share(count: float, total: float) -> float:
    return count / total if total else 0.0


def bullets(text: Text) -> str | None:
    """At most 90% of lines begin with a bullet."""
    share = _share(sum(1 for line in text.lines if BULLET.match(line)), len(text.lines))
    return f"lines that begin with a bullet {share:.0%} > 90%" if share > 0.9 else None


def ellipsis_lines(text: Text) -> str | None:
    """At most 30% of lines end in an ellipsis."""
    share = _share(sum(line.endswith(ELLIPSIS_ENDS) for line in text.lines), len(text.lines))
    return f"lines that end in an ellipsis {share:.0%} > 30%" if share > 0.3 else None


def letters(text: Text) -> str | None:
    """At least 80% of words have a letter."""
    with_letter = sum(1 for word in text.words if word.isalpha() or _LETTER.search(word))
    share = _share(with_letter, len(text.words))
    return f"words with a letter {share:.0%} < 80%" if share < 0.8 else None


def stop_words(text: Text) -> str | None:
    """At least two of the stop words."""
    found: set[str] = set()
    for word in text.words:
        if word.lower() in STOP_WORDS:
            found.add(word.lower())
            if len(found) >= 2:
                return None
    return f"{len(found)} different stop words < 2"


# --- Gopher: repetition ---------------------------------------------------------------------------


def duplicates(what: str, by: str, limit: float, text: Text) -> str | None:
    """At most a share `limit` of the lines or paragraphs, or of their characters, repeats an earlier one."""
    parts: list[str] = getattr(text, what)
    seen: set[str] = set()
    again = [part for part in parts if part in seen or seen.add(part)]  # type: ignore[func-returns-value]
    if by == "characters":
        share = _share(sum(map(len, again)), sum(map(len, parts)))
        return f"characters in repeated {what} {share:.0%} > {limit:.0%}" if share > limit else None
    share = _share(len(again), len(parts))
    return f"repeated {what} {share:.0%} > {limit:.0%}" if share > limit else None


def _covered(text: Text, starts: npt.NDArray[np.intp], n: int) -> float:
    """The share of the words' characters that lie in the runs of n words at `starts`."""
    border = np.zeros(len(text.words) + 1, np.int64)
    np.add.at(border, starts, 1)
    np.add.at(border, starts + n, -1)
    inside = np.cumsum(border[:-1]) > 0
    return _share(float(text.word_lengths[inside].sum()), float(text.word_lengths.sum()))


def top_ngram(n: int, limit: float, text: Text) -> str | None:
    """At most a share `limit` of the characters is in the most frequent run of n words."""
    starts = np.flatnonzero(text.duplicate_starts[n])
    if not len(starts):
        return None
    hashes = ngram_hashes(text.word_numbers, n)[starts]
    _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    most = counts == counts.max()
    if text.word_lengths[_window(starts[first[most]], n)].sum(axis=1).max() * counts.max() <= (
        limit * text.word_lengths.sum()
    ):
        return None  # even if no two of them overlapped
    for place in first[most]:
        at = starts[hashes == hashes[place]]
        if (share := _covered(text, at, n)) > limit:
            words = " ".join(text.words[at[0] : at[0] + n])[:60]
            return f"characters in the most frequent {n}-gram ({words}) {share:.0%} > {limit:.0%}"
    return None


def _window(starts: npt.NDArray[np.intp], n: int) -> npt.NDArray[np.intp]:
    """The places of the `n` words from each start, a row each."""
    return np.asarray(starts[:, None] + np.arange(n))


def duplicate_ngrams(n: int, limit: float, text: Text) -> str | None:
    """At most a share `limit` of the characters is in runs of n words that repeat an earlier one.

    What repeats an earlier run counts, the first occurrence does not; no character counts twice.
    """
    starts = np.flatnonzero(text.duplicate_starts[n])
    if not len(starts):
        return None
    _, first = np.unique(ngram_hashes(text.word_numbers, n)[starts], return_index=True)
    share = _covered(text, np.delete(starts, first), n)
    return f"characters in repeated {n}-grams {share:.0%} > {limit:.0%}" if share > limit else None


# --- C4 -------------------------------------------------------------------------------------------


def ends_a_sentence(line: str) -> bool:
    """Whether a line ends in terminal punctuation."""
    return line.endswith(SENTENCE_ENDS) and not line.endswith("...")


def has_three_words(line: str) -> bool:
    """Whether a line has at least 3 words."""
    return len(line.split(maxsplit=3)) >= 3


def without_javascript(line: str) -> bool:
    """Whether a line does not mention JavaScript."""
    return "javascript" not in line.lower()


def without_policy(line: str) -> bool:
    """Whether a line is not about terms of use, privacy or cookies."""
    lowered = line.lower()
    return not any(phrase in lowered for phrase in POLICIES)


def lorem_ipsum(text: Text) -> str | None:
    """No filler text."""
    return '"lorem ipsum"' if "lorem ipsum" in text.text.lower() else None


def curly_brace(text: Text) -> str | None:
    """No curly brace, which is a sign of code."""
    return "a curly brace" if "{" in text.text else None


def sentences(text: Text) -> str | None:
    """At least 5 sentences."""
    count = len(_SENTENCE.findall(text.text))
    return f"{count} sentences < 5" if count < 5 else None
