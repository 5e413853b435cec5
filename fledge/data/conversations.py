"""Conversations in OpenAI's form, one JSON object a line, as token ids with a loss mask."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fledge.data.sources import (
    Source,
    document_filter,
    has_conversations,
    held_out,
    read_documents,
    read_rows,
)
from fledge.errors import UserError
from fledge.files import read_jsonl
from fledge.tokenizer.bpe import Tokenizer
from fledge.tokenizer.chat import encode_chat


@dataclass(frozen=True)
class EncodedConversations:
    """Ids and loss masks, and what was left out."""

    ids: list[list[int]]
    masks: list[list[bool]]
    overlong: int
    """Dropped or cut because they do not fit a row."""
    without_targets: int
    """Dropped because the assistant says nothing (within the row)."""

    @property
    def targets(self) -> int:
        """How many tokens are learned from in an epoch."""
        return sum(map(sum, self.masks))


def read_conversations(
    path: Path, tokenizer: Tokenizer, max_tokens: int, cut_overlong: bool
) -> EncodedConversations:
    """Read and encode a JSONL file; conversations of more than `max_tokens` are dropped, or cut at the end.

    Raises UserError with file and line for a broken line or message.
    """
    rows = ((f"{path}:{number}", row) for number, row in read_jsonl(path))
    return _encode_rows(str(path), rows, tokenizer, max_tokens, cut_overlong)


def _encode_rows(
    path: str,
    rows: Iterable[tuple[str, dict[str, Any]]],
    tokenizer: Tokenizer,
    max_tokens: int,
    cut_overlong: bool,
) -> EncodedConversations:
    ids: list[list[int]] = []
    masks: list[list[bool]] = []
    overlong = without_targets = 0
    for where, row in rows:
        messages = row.get("messages")
        if not isinstance(messages, list) or not messages:
            problem = "has no field" if messages is None else "needs a non-empty list in the field"
            raise UserError(f'{where}: the line {problem} "messages"')
        if not isinstance(row.get("tools"), list | None):
            raise UserError(f'{where}: the field "tools" must be a list')
        try:
            chat = encode_chat(tokenizer, messages, row.get("tools"))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if len(chat.ids) > max_tokens:
            overlong += 1
            if not cut_overlong:
                continue
        if not any(chat.mask[1:max_tokens]):
            without_targets += 1
            continue
        ids.append(chat.ids[:max_tokens])
        masks.append(chat.mask[:max_tokens])
    if not ids:
        counts = f"{overlong} too long for {max_tokens} tokens, {without_targets} without an assistant's turn"
        raise UserError(f"{path}: no conversation to learn from ({counts})")
    return EncodedConversations(ids, masks, overlong, without_targets)


def answer_rows(chats: EncodedConversations) -> list[list[int]]:
    """The ids of each conversation to the token that ends the assistant's last turn."""
    ends = [len(mask) - mask[::-1].index(True) for mask in chats.masks]
    return [ids[:end] for ids, end in zip(chats.ids, ends, strict=True)]


Encoded = tuple[list[list[int]], list[list[bool]]]


def split_conversations(chats: EncodedConversations, share: float) -> tuple[Encoded, Encoded]:
    """Training and held-out ids and masks, decided by each conversation's content."""
    parts: tuple[Encoded, Encoded] = (([], []), ([], []))
    for ids, mask in zip(chats.ids, chats.masks, strict=True):
        part = parts[held_out(json.dumps(ids), share)]
        part[0].append(ids)
        part[1].append(mask)
    return parts if parts[0][0] else (parts[1], ([], []))


Encode = Callable[[Sequence[str]], list[list[int]]]


def read_texts(source: Source, tokenizer: Tokenizer) -> tuple[list[str], Encode]:
    """The documents of a source, and what turns some of them into ids.

    Conversations are text too: each is a document in the chat template's form, so that a base model meets the
    chat tokens; its text is what the template writes, special tokens left out.
    """
    if not has_conversations(source):
        return list(read_documents(source)), tokenizer.encode_batch
    chats = _encode_rows(source.path, read_rows(source), tokenizer, max_tokens=2**31, cut_overlong=False)
    keeps = document_filter(source)
    written = [(tokenizer.decode(ids, skip_special=True), ids) for ids in chats.ids]
    texts = [text for text, _ in written if keeps(text)]
    ids_of = dict(written)
    return texts, lambda some: [ids_of[text] for text in some]
