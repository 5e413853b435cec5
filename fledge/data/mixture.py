"""The sources of a pretraining run, tokenised: what each is trained on, and what is held out of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from fledge.data.conversations import read_texts
from fledge.data.packing import TokenSource
from fledge.data.sources import Source, split_documents
from fledge.errors import UserError
from fledge.tokenizer.bpe import Tokenizer

# A source's validation part beyond this costs more time at every evaluation than it adds precision.
VALIDATION_BYTES = 20_000


@dataclass(frozen=True)
class SourceTexts:
    """One source of the mixture."""

    name: str
    share: float
    """Of the training rows."""
    training: TokenSource
    documents: int
    """Training documents."""
    text_bytes: int
    """UTF-8 bytes of the training documents."""
    held_out: list[list[int]]
    """Ids of the documents to validate on."""
    held_out_bytes: int
    fingerprint: str
    """SHA-256 over all documents."""


def read_sources(
    sources: Sequence[Source], tokenizer: Tokenizer, validation_share: float, seed: int
) -> list[SourceTexts]:
    """Read and tokenise all sources; shares are the weights, or the tokens where there are none.

    Raises UserError for a source that is empty or too small to hold anything out.
    """
    texts = [_read(source, tokenizer, validation_share, seed * 1000 + i) for i, source in enumerate(sources)]
    total = sum(text.share for text in texts)
    return [SourceTexts(**{**vars(text), "share": text.share / total}) for text in texts]


def _read(source: Source, tokenizer: Tokenizer, validation_share: float, seed: int) -> SourceTexts:
    documents, encode = read_texts(source.path, tokenizer)
    if not documents:
        raise UserError(f"{source.path}: no text in it")
    training, held_out = split_documents(documents, validation_share)
    if not training or not held_out:
        raise UserError(
            f"{source.path}: too few different documents to train on some and hold out others "
            f"(--validation-share {validation_share})"
        )
    held_out = _first_bytes(held_out, VALIDATION_BYTES)
    packed = TokenSource.from_documents(source.name, encode(training), tokenizer.eos_id, seed)
    digest = hashlib.sha256()
    for text in documents:
        digest.update(hashlib.sha256(text.encode()).digest())
    return SourceTexts(
        name=source.name,
        share=float(len(packed)) if source.weight is None else source.weight,
        training=packed,
        documents=len(training),
        text_bytes=sum(len(text.encode()) for text in training),
        held_out=encode(held_out),
        held_out_bytes=sum(len(text.encode()) for text in held_out),
        fingerprint=digest.hexdigest(),
    )


def _first_bytes(documents: list[str], limit: int) -> list[str]:
    taken: list[str] = []
    size = 0
    for document in documents:
        size += len(document.encode())
        if taken and size > limit:
            break
        taken.append(document)
    return taken
