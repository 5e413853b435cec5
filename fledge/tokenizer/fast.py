"""The same ids many times as fast: a tokenizer's merges, run by `tiktoken` where that is the same thing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from fledge.tokenizer.bpe import BYTE_OF_CHAR, SPLIT_PATTERN, Tokenizer, check_text

Ids = npt.NDArray[np.uint32]
Encode = Callable[[Sequence[str]], list[Ids]]

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = SPLIT_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# The regular expressions known to mean the same to both libraries, for every character and for long runs,
# and to leave no character out (the one library drops what does not match, the other keeps it).
KNOWN_PATTERNS = frozenset({SPLIT_PATTERN, GPT2_PATTERN, LLAMA3_PATTERN})

# Stands between texts that are encoded in one call: two code points that are no characters.
SEPARATOR = "\U0010ffff\U0010fffe"
# `\s+(?!\S)` is matched with a stack that overflows at about 250,000 characters of white space.
WHITE_SPACE_CHARACTERS = 16_384


def fast_encoder(tokenizer: Tokenizer) -> Encode | None:
    """What turns texts into the ids that `tokenizer.encode_batch` gives them, or None if that is not sure.

    The ids are the same when the tokenizer has no normaliser, splits text by one of `KNOWN_PATTERNS`, and
    merging by the rank of a pair equals merging by the rank of its result, which is checked for all merges
    (see `_ranks`). The encoder may be called from several threads, and lets others run meanwhile. It raises
    UserError on a lone surrogate.
    """
    found = _build(tokenizer._plain.to_str())
    if found is None:
        return None
    encoding, ids_of_rank = found
    separator = encoding.max_token_value  # the highest rank is the separator's
    translate = not np.array_equal(ids_of_rank[:separator], np.arange(separator))

    def encode_joined(texts: Sequence[str]) -> list[Ids]:
        ranks = encoding.encode_to_numpy(SEPARATOR.join(texts), allowed_special={SEPARATOR})
        borders = np.flatnonzero(ranks == separator)
        ids = ids_of_rank[ranks] if translate else ranks
        edges = [-1, *borders.tolist(), len(ids)]
        return [ids[start + 1 : end] for start, end in pairwise(edges)]

    def encode(texts: Sequence[str]) -> list[Ids]:
        for index, text in enumerate(texts):
            check_text(text, f"text {index}")
        slow = {i for i, text in enumerate(texts) if SEPARATOR[0] in text or _has_much_white_space(text)}
        quick = [text for i, text in enumerate(texts) if i not in slow]
        done = iter(encode_joined(quick) if quick else [])
        return [
            np.array(tokenizer.encode(text), dtype=np.uint32) if i in slow else next(done)
            for i, text in enumerate(texts)
        ]

    return encode


def _has_much_white_space(text: str) -> bool:
    """Whether a run of at least twice `WHITE_SPACE_CHARACTERS` is in it (a shorter one may count too).

    Such a run holds a whole block between multiples of the number, so few characters need a look.
    """
    step = WHITE_SPACE_CHARACTERS
    return any(
        text[start].isspace() and text[start : start + step].isspace() for start in range(0, len(text), step)
    )


@lru_cache(maxsize=2)
def _build(tokenizer_json: str) -> tuple[Any, Ids] | None:
    """An encoding of tiktoken's and the id of each of its ranks, for the contents of a tokenizer.json."""
    import tiktoken

    data = json.loads(tokenizer_json)
    pattern = _pattern(data["pre_tokenizer"])
    model = data["model"]
    affixes = (model.get("continuing_subword_prefix"), model.get("end_of_word_suffix"))
    if data["normalizer"] or pattern is None or any(affixes) or model.get("dropout"):
        return None
    if model.get("byte_fallback"):
        return None
    vocab = _byte_vocab(model["vocab"])
    ranks = _ranks(vocab, model["merges"])
    # `ignore_merges` takes a whole word from the vocabulary even if no merges lead to it.
    if ranks is None or (model.get("ignore_merges") and len(ranks) != len(model["vocab"])):
        return None
    encoding = tiktoken.Encoding(
        "fledge", pat_str=pattern, mergeable_ranks=ranks, special_tokens={SEPARATOR: len(ranks)}
    )
    ids = np.array([vocab[token] for token in ranks] + [0], dtype=np.uint32)
    return encoding, ids


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The regular expression that a byte-level pre-tokenizer splits text by, if it is a known one."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    last = steps[-1] or {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if len(steps) == 1:
        return GPT2_PATTERN if last.get("use_regex", True) else None
    first = steps[0]
    isolated = (
        first.get("type") == "Split" and first.get("behavior") == "Isolated" and not first.get("invert")
    )
    if len(steps) > 2 or not isolated or last.get("use_regex", True):
        return None
    pattern = first["pattern"].get("Regex")
    return pattern if pattern in KNOWN_PATTERNS else None


def _byte_vocab(vocab: dict[str, int]) -> dict[bytes, int]:
    """The tokens that stand for bytes, as these bytes."""
    chars = BYTE_OF_CHAR.keys()
    return {_to_bytes(token): i for token, i in vocab.items() if chars >= set(token)}


def _to_bytes(token: str) -> bytes:
    return bytes(map(BYTE_OF_CHAR.__getitem__, token))


def _ranks(vocab: dict[bytes, int], merges: list[list[str]]) -> dict[bytes, int] | None:
    """Ranks by which merging whatever gives the lowest one is what the merges do; None if there are none.

    It is the same when for every merge of l and r to t, merging the bytes of t by the ranks below t's ends in
    exactly [l, r]. For then no other two neighbours that spell t ever meet: as long as nothing has been
    merged over the borders of their span, it went through the same merges as t alone and holds l and r. By
    induction over the ranks the same pairs are merged in the same order.
    """
    singles = [bytes([byte]) for byte in range(256)]
    if any(single not in vocab for single in singles):
        return None
    ranks = {single: rank for rank, single in enumerate(sorted(singles, key=vocab.__getitem__))}
    result, ends = b"", False  # the last token and whether its own pair has been among its merges
    for left, right in merges:
        if not BYTE_OF_CHAR.keys() >= {*left, *right}:
            return None
        pair = [_to_bytes(left), _to_bytes(right)]
        token = b"".join(pair)
        if token != result:  # several merges may lead to one token if they follow each other
            if token in ranks or (result and not ends):
                return None
            expected = _merge(token, ranks)
            ranks[token] = len(ranks)
            result, ends = token, False
        ends = ends or pair == expected
    return ranks if ends or not result else None


def _merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The parts that the bytes of a token end in when those of the lowest rank are merged, leftmost first."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        found = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        lowest = min(found)
        if lowest == len(ranks):
            break
        i = found.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts
