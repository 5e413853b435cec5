"""A tokenizer, a random model, and models that say what a test wants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch

from fledge.model.config import ModelConfig
from fledge.model.transformer import CausalLM
from fledge.tokenizer.bpe import Tokenizer, train_bpe

from .. import models

TEXT = "The café sells naïve 漢字 books. The cats sat; the cats ate. Hello, hello 🙂🙂! "


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_bpe([TEXT] * 3, 320)


def random_model(vocab_size: int, family: str = "qwen3", context: int = 128, seed: int = 1) -> CausalLM:
    """Weights large enough that every part of the model shows in its scores."""
    model = CausalLM(ModelConfig(family, vocab_size, 32, 48, 2, 4, 2, 8, context)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.25, generator=generator)
    return model


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> CausalLM:
    return random_model(tokenizer.vocab_size)


ChainModel = Callable[[Mapping[int, int]], CausalLM]


@pytest.fixture(scope="session")
def chain_model(tokenizer: Tokenizer) -> ChainModel:
    """A model that follows each id with the one that a table gives; any other id with end of turn."""
    return partial(models.chain_model, tokenizer)
