"""Scores for short factual answers, and the two controls that say how much of them is spelling."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_REFUSAL = re.compile(
    r"^\s*([\w.]+\?\s+)?"  # as much of the name as is known
    r"(sorry,?\s*)?(but\s*)?i('m| am)?\s*(do not|don't|not)\s+(know|recognize|sure|familiar|aware)"
    r"|\b(does not|doesn't) exist\b|\bno such (name|module|function|class|method)\b",
    re.IGNORECASE,
)


def token_f1(prediction: str, gold: str) -> float:
    """F1 of the bags of words as SQuAD scores it (Rajpurkar et al. 2016): no case, punctuation, articles."""
    predicted, wanted = _squad_words(prediction), _squad_words(gold)
    if not predicted or not wanted:
        return float(predicted == wanted)
    common = sum((Counter(predicted) & Counter(wanted)).values())
    return 2 * common / (len(predicted) + len(wanted))


def _squad_words(text: str) -> list[str]:
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def wilson_interval(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval for a proportion (Wilson 1927); (0, 1) without observations."""
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def is_refusal(text: str) -> bool:
    """Whether an answer says that the name is not known."""
    return _REFUSAL.search(text.replace("\u2019", "'")) is not None


def _ngrams(name: str, sizes: Sequence[int]) -> list[str]:
    padded = f"^{name}$"
    return [padded[i : i + n] for n in sizes for i in range(len(padded) - n + 1)]


def nearest_name_baseline(train: Sequence[tuple[str, str]], names: Sequence[str]) -> list[str]:
    """The answer of the most similar training name, for each name: what a look-up by spelling gets.

    Similarity is the cosine of counts of character 2- to 4-grams, weighted by inverse document frequency.
    """
    if not train:
        return [""] * len(names)
    bags = [Counter(_ngrams(name.lower(), (2, 3, 4))) for name, _ in train]
    known = Counter(gram for bag in bags for gram in bag)
    column = {gram: i for i, gram in enumerate(sorted(known))}
    idf = {gram: math.log((1 + len(train)) / (1 + count)) + 1 for gram, count in known.items()}

    def vectors(bags: Sequence[Mapping[str, int]]) -> NDArray[np.float32]:
        matrix = np.zeros((len(bags), len(column)), dtype=np.float32)
        for row, bag in enumerate(bags):
            for gram, count in bag.items():
                if gram in column:
                    matrix[row, column[gram]] = count * idf[gram]
        matrix /= np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-9)
        return matrix

    trained = vectors(bags)
    answers: list[str] = []
    for start in range(0, len(names), 256):
        asked = vectors([Counter(_ngrams(name.lower(), (2, 3, 4))) for name in names[start : start + 256]])
        answers.extend(train[int(i)][1] for i in (asked @ trained.T).argmax(axis=1))
    return answers


@dataclass(frozen=True)
class Share:
    """A proportion with its 95% Wilson interval."""

    successes: int
    n: int

    @property
    def rate(self) -> float:
        """The proportion; 0 without observations."""
        return self.successes / self.n if self.n else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """The Wilson interval."""
        return wilson_interval(self.successes, self.n)

    def as_dict(self) -> dict[str, Any]:
        """For summary files."""
        low, high = self.interval
        return {"rate": self.rate, "low": low, "high": high, "successes": self.successes, "n": self.n}


@dataclass(frozen=True)
class SpellingControl:
    """What a classifier of spellings gets; `accuracy` is the mean of its two right shares."""

    refused_invented: Share
    wrongly_refused: Share

    @property
    def accuracy(self) -> float:
        """0.5 is chance."""
        return (self.refused_invented.rate + 1 - self.wrongly_refused.rate) / 2


class NgramNameClassifier:
    """Naive Bayes over character n-grams of a name: real against invented, equal priors.

    It sees no documents, so what it gets right is given away by the spelling alone.
    """

    def __init__(
        self, real: Sequence[str], invented: Sequence[str], sizes: Sequence[int] = (1, 2, 3, 4)
    ) -> None:
        self._sizes = tuple(sizes)
        counts = [Counter(g for name in side for g in _ngrams(name, sizes)) for side in (real, invented)]
        vocabulary = set(counts[0]) | set(counts[1])
        totals = [sum(side.values()) + len(vocabulary) for side in counts]
        self._log_ratios = {
            gram: math.log((counts[1][gram] + 1) / totals[1]) - math.log((counts[0][gram] + 1) / totals[0])
            for gram in vocabulary
        }

    def score(self, name: str) -> float:
        """Log-odds that a name is invented; n-grams never seen in training say nothing."""
        return sum(self._log_ratios.get(gram, 0.0) for gram in _ngrams(name, self._sizes))

    def evaluate(self, real: Sequence[str], invented: Sequence[str]) -> SpellingControl:
        """Refusal means log-odds above 0."""
        refused, wrongly = (
            Share(sum(self.score(n) > 0 for n in names), len(names)) for names in (invented, real)
        )
        return SpellingControl(refused, wrongly)


def is_right(answer: str, gold: str | None, threshold: float = 0.8) -> bool:
    """Whether an answer is right: F1 at least `threshold`, or a refusal where there is nothing to know."""
    return is_refusal(answer) if gold is None else token_f1(answer, gold) >= threshold
