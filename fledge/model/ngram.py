"""An n-gram model: next tokens by how often they followed the last few, in interpolated modified Kneser-Ney.

Chen & Goodman, "An empirical study of smoothing techniques for language modeling" (1998), with their
discounts D1, D2, D3+ estimated from the counts of counts. Level n holds the n-grams that occur as sorted keys
`row of the first n - 1 tokens in level n - 1, times the vocabulary's size, plus the last token`, so that a
context is found by n binary searches and its followers stand side by side.

Shape suffixes: N contexts, C = order - 1 tokens of each, V vocabulary, P rows of the level below.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError

from fledge.errors import UserError
from fledge.files import read_json, write_json, write_text
from fledge.types import ModelFiles

MODEL_TYPE = "ngram"
NOTHING = -1  # in a context: the text had not begun there
# Discounts where there are too few n-grams to estimate them (as KenLM's fallback).
FALLBACK = (0.5, 1.0, 1.5)
# Probabilities computed at once: they bound memory.
MAX_PROBABILITIES = 2**22

# Memory for counting, measured at order 5.
BYTES_A_TOKEN = 150

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class NgramConfig:
    """What `config.json` says of an n-gram model. `max_position_embeddings` only bounds the length of texts,
    as with any model; nothing beyond the last `order - 1` tokens is looked at."""

    vocab_size: int
    order: int
    max_position_embeddings: int
    model_type: str = MODEL_TYPE
    # What an engine's cache keeps of each token: its id.
    num_hidden_layers: int = 1
    num_key_value_heads: int = 1
    head_dim: int = 1


class _Level:
    """The n-grams of one length, and what follows from their counts."""

    def __init__(self, keys: Ints, counts: Ints, parents: int, vocab_size: int) -> None:
        self.keys, self.counts = keys, counts
        parent, self.tokens = keys // vocab_size, keys % vocab_size
        self.first = np.searchsorted(parent, np.arange(parents + 1))
        totals_P = np.bincount(parent, weights=counts, minlength=parents)
        discount = np.array([0.0, *discounts(counts)])[np.minimum(counts, 3)]
        self.shares = (counts - discount) / totals_P[parent]
        kept_P = np.bincount(parent, weights=discount, minlength=parents)
        # What is left for the level below: everything, where nothing was seen to follow.
        self.rest_P = np.divide(kept_P, totals_P, out=np.ones(parents), where=totals_P > 0)


class NgramModel:
    """Probabilities of the next token, given the last few. `NgramModel.count` and `load_ngram` make one."""

    def __init__(self, config: NgramConfig, keys: list[Ints], counts: list[Ints]) -> None:
        self.config = config
        below = [1, *map(len, keys)]
        self._levels = [_Level(keys[n], counts[n], below[n], config.vocab_size) for n in range(config.order)]

    @classmethod
    def count(cls, documents: Iterable[npt.NDArray[Any]], separator: int, config: NgramConfig) -> NgramModel:
        """Count documents of ids, each beginning with the separator, which is expected at their ends too; no
        n-gram reaches over it. About `BYTES_A_TOKEN` of memory meanwhile.

        Below the highest order an n-gram counts for the different tokens that stand before it; one that
        begins a document, for its occurrences.
        """
        closed = [np.append(document, separator).astype(np.int64) for document in documents]
        tokens = np.concatenate(closed)
        lengths = np.array([len(document) for document in closed])
        places = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        del closed
        keys: list[Ints] = []
        counts: list[Ints] = []
        rows = np.zeros(len(tokens), dtype=np.int64)  # of the n-gram that ends in each place
        for n in range(1, config.order + 1):
            ends = np.flatnonzero(places >= max(1, n - 1))
            above = tokens[ends] if n == 1 else rows[ends - 1] * config.vocab_size + tokens[ends]
            found, first, inverse, times = np.unique(
                above, return_index=True, return_inverse=True, return_counts=True
            )
            if n > 1:
                before = np.bincount(rows[ends[first]], minlength=len(keys[-1]))
                counts[-1] = np.where(before > 0, before, counts[-1])
            rows = np.full(len(tokens), NOTHING, dtype=np.int64)
            rows[ends] = inverse
            if n == 1:
                rows[places == 0] = np.searchsorted(found, separator)
            keys.append(found)
            counts.append(times.astype(np.int64))
        return cls(config, keys, counts)

    def num_parameters(self) -> int:
        """How many n-grams of all lengths it has counted."""
        return sum(len(level.keys) for level in self._levels)

    def probabilities(self, contexts_NC: Ints) -> Floats:
        """The probability of every token (N, V) behind contexts of the last `order - 1` ids, oldest first;
        `NOTHING` stands before a text that is shorter. Each row sums to 1, and none of its numbers is 0."""
        N, V = len(contexts_NC), self.config.vocab_size
        p_NV = np.full((N, V), 1 / V)
        for n, level in enumerate(self._levels):
            rows_N = self._rows(contexts_NC[:, contexts_NC.shape[1] - n :])
            known = np.flatnonzero(rows_N >= 0)
            rows = rows_N[known]
            p_NV[known] *= level.rest_P[rows][:, None]
            begin, size = level.first[rows], level.first[rows + 1] - level.first[rows]
            grams = np.arange(size.sum()) + np.repeat(begin - (np.cumsum(size) - size), size)
            p_NV[np.repeat(known, size), level.tokens[grams]] += level.shares[grams]
        return p_NV

    def log_probabilities(self, contexts_NC: Ints) -> npt.NDArray[np.float32]:
        """`probabilities` as nats in fp32."""
        logps_NV = np.empty((len(contexts_NC), self.config.vocab_size), dtype=np.float32)
        chunk = max(1, MAX_PROBABILITIES // self.config.vocab_size)
        for i in range(0, len(contexts_NC), chunk):
            logps_NV[i : i + chunk] = np.log(self.probabilities(contexts_NC[i : i + chunk]))
        return logps_NV

    def _rows(self, grams_NL: Ints) -> Ints:
        """The row of each L-gram in level L; `NOTHING` where it was never seen."""
        rows_N = np.zeros(len(grams_NL), dtype=np.int64)
        for level, ids_N in zip(self._levels, grams_NL.T, strict=False):
            if not len(level.keys):  # all texts were shorter
                return np.full(len(grams_NL), NOTHING)
            wanted_N = rows_N * self.config.vocab_size + ids_N
            places_N = np.minimum(np.searchsorted(level.keys, wanted_N), len(level.keys) - 1)
            is_seen = (rows_N >= 0) & (ids_N >= 0) & (level.keys[places_N] == wanted_N)
            rows_N = np.where(is_seen, places_N, NOTHING)
        return rows_N

    def save(self, directory: Path, tokenizer: ModelFiles, lineage: dict[str, Any], eos_id: int) -> None:
        """Write a model directory into an existing folder. Other software cannot load it."""
        config = self.config
        sizes = {"vocab_size": config.vocab_size, "max_position_embeddings": config.max_position_embeddings}
        write_json(
            directory / "config.json",
            {"model_type": MODEL_TYPE, "order": config.order, **sizes, "eos_token_id": eos_id},
        )
        tensors: dict[str, Ints] = {}
        for n, level in enumerate(self._levels, start=1):
            tensors |= {f"order_{n}.keys": level.keys, f"order_{n}.counts": level.counts}
        safetensors.numpy.save_file(tensors, directory / "model.safetensors")
        write_json(directory / "generation_config.json", {"eos_token_id": eos_id})
        tokenizer.save(directory)
        write_json(directory / "lineage.json", lineage)
        write_text(
            directory / "README.md",
            f"# An n-gram model\n\nOrder {config.order}, {self.num_parameters():,} n-grams, vocabulary "
            f"{config.vocab_size:,}: counts for interpolated modified Kneser-Ney. fledge reads it, other "
            "software does not.\n\n`lineage.json` beside this file holds the configuration and data "
            "fingerprints it was made from.\n",
        )


def discounts(counts: Ints) -> tuple[float, float, float]:
    """D1, D2 and D3+ of a level (Chen & Goodman 1998, equation 26), from how many n-grams have the counts 1
    to 4; `FALLBACK` where one of these does not occur, or they are no sensible discounts."""
    n1, n2, n3, n4 = (int((counts == k).sum()) for k in (1, 2, 3, 4))
    if not (n1 and n2 and n3 and n4):
        return FALLBACK
    y = n1 / (n1 + 2 * n2)
    found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    return found if all(0 < d <= k for k, d in enumerate(found, start=1)) else FALLBACK


def is_ngram(directory: Path) -> bool:
    """Whether a model directory holds an n-gram model."""
    path = directory / "config.json"
    raw = read_json(path) if path.exists() else None
    return isinstance(raw, dict) and raw.get("model_type") == MODEL_TYPE


def load_ngram(directory: Path) -> NgramModel:
    """Read an n-gram model's directory. Raises UserError, naming the file, for one that is damaged."""
    path, file = directory / "config.json", directory / "model.safetensors"
    raw = read_json(path)
    sizes = [raw.get(key) for key in ("vocab_size", "order", "max_position_embeddings")]
    if not all(type(size) is int and size > 0 for size in sizes):
        raise UserError(
            f"{path}: vocab_size, order and max_position_embeddings must be whole numbers above 0"
        )
    config = NgramConfig(*sizes)
    try:
        tensors = safetensors.numpy.load_file(file)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; a model directory keeps its counts there") from None
    except SafetensorError as error:
        raise UserError(f"{file}: not a readable safetensors file ({error}); copy it again") from None
    keys, counts, below = [], [], 1
    for n in range(1, config.order + 1):
        level = [tensors.get(f"order_{n}.{name}", np.empty(0)) for name in ("keys", "counts")]
        if not _is_level(level[0], level[1], below * config.vocab_size):
            raise UserError(f"{file}: order_{n} holds no counts of n-grams as config.json has them")
        keys.append(level[0])
        counts.append(level[1])
        below = len(level[0])
    return NgramModel(config, keys, counts)


def _is_level(keys: npt.NDArray[Any], counts: npt.NDArray[Any], end: int) -> bool:
    """Whether keys are sorted, different and below `end`, and counts above 0."""
    if keys.dtype != np.int64 or counts.dtype != np.int64 or keys.shape != counts.shape or keys.ndim != 1:
        return False
    is_sorted = bool((keys[1:] > keys[:-1]).all()) and bool((keys[:1] >= 0).all() and (keys[-1:] < end).all())
    return is_sorted and bool((counts > 0).all())
