"""What training on conversations, preferences and rewards writes: a model, whole or as an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fledge.model.checkpoint import save_model
from fledge.model.lora import LoRA, save_adapter
from fledge.model.transformer import CausalLM
from fledge.tokenizer.bpe import Tokenizer
from fledge.types import ModelFiles


def save_policy(
    directory: Path,
    policy: CausalLM,
    tokenizer: ModelFiles,
    origin: dict[str, Any],
    eos_ids: list[int],
    base: Path,
    lora: LoRA | None,
) -> None:
    """Write a model directory into an existing folder, or with `lora` the adapter that belongs to `base`."""
    if lora is None:
        save_model(directory, policy, tokenizer, origin, eos_ids)
    else:
        save_adapter(directory, policy, lora, base, tokenizer, origin)


def save_assistant(
    directory: Path,
    tokens: int,
    *,
    model: CausalLM,
    tokenizer: Tokenizer,
    origin: dict[str, Any],
    base: Path,
    lora: LoRA | None = None,
) -> None:
    """Write a whole model directory into an existing folder, or only the adapter beside `base`; `origin` is
    the lineage but for the tokens that were read."""
    origin = {**origin, "tokens": tokens}
    ends = [token_id for token_id in (tokenizer.end_of_turn_id, tokenizer.eos_id) if token_id is not None]
    save_policy(directory, model, tokenizer, origin, list(dict.fromkeys(ends)), base, lora)
