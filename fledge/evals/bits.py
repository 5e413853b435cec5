"""Bits per byte: how well a model predicts text, comparable across tokenizers."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from fledge.types import Scorer


def bits_per_byte(
    scorer: Scorer,
    documents: Sequence[Sequence[int]],
    text_bytes: int,
    separator: int,
    special_ids: Collection[int],
    window_tokens: int,
) -> float:
    """Total nats / (ln 2 * UTF-8 bytes) of tokenised documents, each read behind the document separator.

    Documents longer than `window_tokens` are read in windows that overlap by one token, so every token
    is scored exactly once. Special tokens count no bytes, and their loss is left out.
    """
    windows: list[list[int]] = []
    for document in documents:
        ids = [separator, *document]
        windows += [ids[i : i + window_tokens + 1] for i in range(0, len(ids) - 1, window_tokens)]
    nats = 0.0
    for ids, logps in zip(windows, scorer.score(windows), strict=True):
        nats -= math.fsum(
            logp for token, logp in zip(ids[1:], logps, strict=True) if token not in special_ids
        )
    return nats / (math.log(2) * max(1, text_bytes))
