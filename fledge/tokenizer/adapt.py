"""What a tokenizer of others lacks for fine-tuning on chats."""

from __future__ import annotations

from dataclasses import dataclass

from fledge.tokenizer.bpe import Tokenizer
from fledge.tokenizer.chat import CHAT_TEMPLATE, gives_loss_mask


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer that fine-tuning can use, and what was changed in it for that."""

    tokenizer: Tokenizer
    added: dict[str, int]
    """Tokens that are new, with their ids."""
    note: str
    """One line for the user; "" if nothing was changed."""


def fit_for_chats(tokenizer: Tokenizer) -> ChatTokenizer:
    """The tokenizer itself if its chat template tells what the assistant wrote and ends its turns with a
    special token; else one with fledge's template and the special tokens for it.

    Where the model wants a token in front of a text (`prefix_ids`), the template starts with it.
    """
    if tokenizer.chat_template is not None and gives_loss_mask(tokenizer):
        return ChatTokenizer(tokenizer, {}, "")
    prefix = tokenizer.decode(tokenizer.prefix_ids).strip()
    template = f"{{{{- {prefix!r} }}}}\n{CHAT_TEMPLATE}" if prefix else CHAT_TEMPLATE
    fitted = tokenizer.with_chat(template)
    added = {
        token: token_id
        for token, token_id in fitted.special_tokens.items()
        if token not in tokenizer.special_tokens
    }
    why = "it has no chat template"
    if tokenizer.chat_template is not None:
        why = "its chat template does not mark the assistant's whole turns with {% generation %}"
    tokens = f", {len(added)} tokens added ({', '.join(added)})" if added else ""
    return ChatTokenizer(fitted, added, f"tokenizer: {why}; fledge's is used instead{tokens}")
