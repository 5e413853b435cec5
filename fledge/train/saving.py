"""What training on conversations and preferences writes: an assistant, whole or as an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fledge.model.checkpoint import save_model
from fledge.model.lora import LoRA, save_adapter
from fledge.model.transformer import CausalLM
from fledge.tokenizer.bpe import Tokenizer


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
    if lora is not None:
        save_adapter(directory, model, lora, base, tokenizer, origin)
        return
    ends = [token_id for token_id in (tokenizer.end_of_turn_id, tokenizer.eos_id) if token_id is not None]
    save_model(directory, model, tokenizer, origin, list(dict.fromkeys(ends)))
