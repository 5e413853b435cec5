"""Tokens as OpenAI and vLLM show them, with their log-probabilities."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from fledge.tokenizer.bpe import Tokenizer
from fledge.types import Token

# What JSON can hold, for tokens that are impossible.
LOWEST = -9999.0


class TokenTexts:
    """What the tokens of a tokenizer are called."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool = False) -> None:
        """`as_ids`: every token is called `token_id:7`."""
        self.tokenizer, self.as_ids = tokenizer, as_ids

    @cached_property
    def _special(self) -> dict[int, str]:
        return {token_id: name for name, token_id in self.tokenizer.special_tokens.items()}

    def raw(self, token_id: int) -> bytes:
        """A token's bytes; a special token's are those of its name."""
        name = self._special.get(token_id)
        return self.tokenizer.token_bytes(token_id) if name is None else name.encode()

    def name(self, token_id: int) -> str:
        """A token's text; `bytes:\\xe2\\x82`, as OpenAI writes it, for bytes that are no whole characters."""
        if self.as_ids:
            return f"token_id:{token_id}"
        raw = self.raw(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def shown(self, token_id: int) -> bytes:
        """What a token is of a text: one that only steers is nothing of it."""
        return b"" if token_id in self.tokenizer.control_ids else self.raw(token_id)


def chat_logprobs(texts: TokenTexts, tokens: Sequence[Token], top: int) -> dict[str, Any]:
    """`logprobs` of a chat's choice. A token that only steers, as the one that ended it, has no bytes."""

    def entry(token_id: int, logp: float) -> dict[str, Any]:
        raw = None if token_id in texts.tokenizer.control_ids else list(texts.raw(token_id))
        return {"token": texts.name(token_id), "logprob": max(logp, LOWEST), "bytes": raw}

    content = [
        {**entry(token.id, token.logp), "top_logprobs": [entry(*pair) for pair in token.top[:top]]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


class Place:
    """How many characters the tokens so far have, a half one not counted."""

    def __init__(self) -> None:
        self.characters = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, shown: bytes) -> int:
        """One token more; where it begins."""
        begin = self.characters
        self.characters += len(self._decoder.decode(shown))
        return begin


def text_logprobs(
    texts: TokenTexts, tokens: Sequence[Token | int], top: int, place: Place | None = None
) -> dict[str, Any]:
    """`logprobs` of a text's choice; an id stands for a token without a log-probability (the prompt's first).
    `place`: behind the tokens before, and moved on."""
    place = place or Place()
    offsets = [place.add(texts.shown(token if isinstance(token, int) else token.id)) for token in tokens]
    return {
        "tokens": [texts.name(token if isinstance(token, int) else token.id) for token in tokens],
        "token_logprobs": [None if isinstance(t, int) else max(t.logp, LOWEST) for t in tokens],
        "top_logprobs": [None if isinstance(token, int) else _tops(texts, token, top) for token in tokens],
        "text_offset": offsets,
    }


def _tops(texts: TokenTexts, token: Token, top: int) -> dict[str, float]:
    """The most probable tokens, and the one that is there; of two with one text the more probable."""
    found: dict[str, float] = {}
    for token_id, logp in (*token.top[:top], (token.id, token.logp)):
        name = texts.name(token_id)
        found[name] = max(found.get(name, LOWEST), logp)
    return found


def prompt_logprobs(
    texts: TokenTexts, prompt: Sequence[int], echoed: Sequence[Token], top: int
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: nothing of the first token; of each other one itself and the likeliest, by
    id. Only of the most probable is the rank known."""
    if not prompt:
        return []
    rows: list[dict[str, Any] | None] = [None]
    for token in echoed:
        ranks: Mapping[int, int] = {token_id: rank for rank, (token_id, _) in enumerate(token.top, start=1)}
        pairs = {**dict(token.top[:top]), token.id: token.logp}
        rows.append({
            str(token_id): {
                "logprob": max(logp, LOWEST), "rank": ranks.get(token_id),
                "decoded_token": texts.name(token_id),
            }
            for token_id, logp in pairs.items()
        })  # fmt: skip
    return rows
