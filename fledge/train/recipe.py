"""One dial: from a number of parameters to shape, batch, learning rates and tokens."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from fledge.errors import UserError
from fledge.model.config import ModelConfig

HEAD_DIM = 64
TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022


@dataclass(frozen=True)
class Recipe:
    """What `--params` chooses; the rates are peaks, of Muon for hidden matrices and AdamW for the rest."""

    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    key_value_heads: int
    batch_tokens: int
    matrix_lr: float
    adam_lr: float
    tokens: int


def parse_count(text: str, what: str) -> int:
    """`10M`, `1.5B`, `300k` or `5000000` as a number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMbB]?)", text.strip())
    count = round(float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[match[2].lower()]) if match else 0
    if count < 1:
        raise UserError(f"--{what} {text}: write a positive number, as in 10M, 1.5B or 300k")
    return count


def intermediate_size_for(hidden_size: int) -> int:
    """8/3 of the width (SwiGLU keeps the size of a plain MLP of 4 x), in multiples of 64."""
    return max(64, round(hidden_size * 8 / 3 / 64) * 64)


def recipe_for(params: int, vocab_size: int) -> Recipe:
    """The shape of about `params` weights (tied embeddings) nearest to a good aspect ratio, and its training.

    Width over depth grows slowly with size, from about 43 at 5M to 100 at 1B, as in published families.
    Batch grows with size (McCandlish et al. 2018); AdamW's rate falls with the root of the width.
    """
    best: tuple[float, int, int] | None = None
    aspect = 43 * (params / 5e6) ** 0.16
    for hidden in range(HEAD_DIM, 16_385, HEAD_DIM):
        block = 4 * hidden * hidden + 3 * hidden * intermediate_size_for(hidden)
        layers = round((params - vocab_size * hidden) / block)
        if layers < 1:
            break
        size = vocab_size * hidden + layers * block
        miss = abs(math.log(hidden / layers / aspect)) + 4 * abs(math.log(size / params))
        if best is None or miss < best[0]:
            best = (miss, hidden, layers)
    if best is None:
        smallest = vocab_size * HEAD_DIM + 4 * HEAD_DIM**2 + 3 * HEAD_DIM * intermediate_size_for(HEAD_DIM)
        raise UserError(
            f"--params {params:,}: a vocabulary of {vocab_size:,} needs at least {smallest:,} parameters; "
            "train a smaller tokenizer or a larger model"
        )
    _, hidden, layers = best
    heads = hidden // HEAD_DIM
    return Recipe(
        layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate_size_for(hidden),
        heads=heads,
        key_value_heads=heads,
        batch_tokens=2 ** max(10, round(math.log2(4096 * (params / 5e6) ** 0.75))),
        matrix_lr=0.02,
        adam_lr=3e-3 * (256 / hidden) ** 0.5,
        tokens=TOKENS_PER_PARAMETER * params,
    )


def adapted(recipe: Recipe, row_tokens: int, hidden_size: int | None, **chosen: float | None) -> Recipe:
    """The recipe with other values where they are not None. A width brings its heads and MLP with it; a batch
    is whole rows of `row_tokens`."""
    changes: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    if hidden_size:
        heads = hidden_size // HEAD_DIM
        changes |= {"hidden_size": hidden_size, "heads": heads, "key_value_heads": heads}
        changes["intermediate_size"] = intermediate_size_for(hidden_size)
    recipe = replace(recipe, **changes)
    return replace(recipe, batch_tokens=max(1, recipe.batch_tokens // row_tokens) * row_tokens)


def model_config(recipe: Recipe, model_type: str, vocab_size: int, context_tokens: int) -> ModelConfig:
    """The `config.json` of a fresh model."""
    return ModelConfig(
        model_type=model_type,
        vocab_size=vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=context_tokens,
    )
