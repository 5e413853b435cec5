"""Speculation as a command has it: settings that go together, and draft models with the model's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from fledge.engine.drafts import Draft, LookupDraft, ModelDraft, NewDraft
from fledge.engine.engine import Engine
from fledge.engine.language_model import reader_of
from fledge.engine.speculative import DRAFT_TOKENS, Speculation
from fledge.errors import UserError
from fledge.model.checkpoint import load_model
from fledge.model.ngram import is_ngram, load_ngram
from fledge.tokenizer.bpe import Tokenizer

# Drafts that need no model, as a command names them.
Speculate = Literal["lookup"]


def new_lookup(rows: int, slots: int) -> Draft:
    """A draft that needs no model."""
    return LookupDraft()


def speculation_of(
    speculate: Speculate | None,
    draft_model: Path | None,
    draft_tokens: int | None,
    engine: Engine,
    tokenizer: Tokenizer,
) -> Speculation | None:
    """What flags ask for; None is a flag that was not given. Raises UserError for those that do not go
    together, and as `load_draft`."""
    if speculate is None and draft_model is None:
        if draft_tokens is not None:
            raise UserError("--draft-tokens goes with --speculate lookup or --draft-model DIR")
        return None
    if speculate is not None and draft_model is not None:
        raise UserError("--speculate lookup and --draft-model are two ways to guess; give one of them")
    new_draft: NewDraft = new_lookup
    if draft_model is not None:
        vocab_size = engine.model.config.vocab_size
        new_draft = load_draft(draft_model, tokenizer, vocab_size, engine.device, engine.compute_dtype)
    return Speculation(new_draft, DRAFT_TOKENS if draft_tokens is None else draft_tokens)


def load_draft(
    directory: Path,
    tokenizer: Tokenizer,
    vocab_size: int,
    device: torch.device | None = None,
    compute_dtype: torch.dtype | None = None,
) -> NewDraft:
    """What makes drafts of a model directory, for a model of `vocab_size` ids with this tokenizer; counts
    of an n-gram model are read on the CPU. Raises UserError for one with another tokenizer."""
    check_same_tokens(directory, Tokenizer.load(directory), tokenizer)
    if is_ngram(directory):
        decoder = reader_of(load_ngram(directory), None)
    else:
        decoder = reader_of(load_model(directory).to(device or torch.device("cpu")), compute_dtype)

    def new_draft(rows: int, slots: int) -> Draft:
        return ModelDraft(decoder, vocab_size, rows, slots)

    return new_draft


def check_same_tokens(directory: Path, draft: Tokenizer, tokenizer: Tokenizer) -> None:
    """Raise UserError if an id means another token to a draft model than to the model."""
    if draft.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"{directory}: the draft model's tokenizer has {draft.vocab_size} tokens, the model's "
            f"{tokenizer.vocab_size}; a draft needs the model's own tokenizer"
        )
    if draft.special_tokens != tokenizer.special_tokens:
        raise UserError(
            f"{directory}: the draft model has other special tokens than the model; it needs the model's own "
            "tokenizer"
        )
    for token_id in range(tokenizer.vocab_size):
        if draft.token_bytes(token_id) != tokenizer.token_bytes(token_id):
            raise UserError(
                f"{directory}: token {token_id} is {draft.token_bytes(token_id)!r} to the draft model and "
                f"{tokenizer.token_bytes(token_id)!r} to the model; a draft needs the model's own tokenizer"
            )
