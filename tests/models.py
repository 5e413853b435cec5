"""Models made by hand that say what a test wants."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import torch

from fledge.model.checkpoint import save_model
from fledge.model.config import ModelConfig
from fledge.model.transformer import CausalLM
from fledge.tokenizer.bpe import Tokenizer


def chain_model(tokenizer: Tokenizer, followers: Mapping[int, int], context: int = 128) -> CausalLM:
    """A model that follows each id with the one that a table gives; any other id with end of turn."""
    size = tokenizer.vocab_size
    config = ModelConfig("llama", size, size, 4, 1, 1, 1, 4, context, tie_word_embeddings=False)
    model = CausalLM(config).eval()
    assert tokenizer.end_of_turn_id is not None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0 if parameter.ndim == 1 else 0.0)
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight[tokenizer.end_of_turn_id] = 10.0
        for before, after in followers.items():
            model.lm_head.weight[after, before] = 20.0
    return model


def save_chain_model(
    directory: Path, tokenizer: Tokenizer, text: str, context: int = 128, endless: bool = False
) -> None:
    """A model that writes `text` (all characters different) after a line break, so as its every answer; over
    and over if `endless`, else it ends its turn."""
    ids = tokenizer.encode("\n" + text)
    assert len(set(ids)) == len(ids)
    model = chain_model(tokenizer, dict(itertools.pairwise(ids + ids[1:2] * endless)), context)
    directory.mkdir()
    save_model(directory, model, tokenizer, {"stage": "sft"}, [tokenizer.end_of_turn_id, tokenizer.eos_id])
