"""What training begins with: a model that its tokenizer belongs to, and the part of it that is trained."""

from __future__ import annotations

from pathlib import Path

import torch

from fledge.errors import UserError
from fledge.model.checkpoint import load_model
from fledge.model.transformer import CausalLM
from fledge.tokenizer.bpe import Tokenizer
from fledge.tokenizer.chat import gives_loss_mask


def load_start(
    directory: Path, tokenizer: Tokenizer, device: torch.device, checkpointed: bool = False
) -> CausalLM:
    """The model of a directory; `checkpointed`: see `CausalLM.checkpoint_activations`. Raises UserError if
    the tokenizer is another model's."""
    model = load_model(directory).to(device)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{directory}: its tokenizer has ids that the model lacks; the files are of different models"
        )
    model.checkpoint_activations = checkpointed
    return model


def require_chat(directory: Path, tokenizer: Tokenizer, otherwise: str = "") -> None:
    """Raises UserError for a model that cannot chat, or whose template does not say which part of a
    conversation it writes; `otherwise` is added to what can be done."""
    if tokenizer.chat_template is None or not gives_loss_mask(tokenizer):
        raise UserError(
            f"{directory}: its tokenizer has no chat template that marks what the assistant writes; start "
            f"from a model made by `fledge sft`{otherwise}"
        )
