"""Answers as OpenAI's objects, whole and in chunks."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from fledge.serve.openai import ChatRequest, CompletionRequest
from fledge.serve.tokens import TokenTexts, chat_logprobs, prompt_logprobs, text_logprobs
from fledge.serve.tools import read_calls
from fledge.serve.worker import Ended, Step
from fledge.types import Token


@dataclass
class Made:
    """A completion as far as it is known."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    end: Ended | None = None

    def add(self, step: Step) -> None:
        """What came."""
        self.text += step.text
        self.tokens += step.tokens
        self.end = step.end or self.end

    @property
    def finish_reason(self) -> str:
        """`stop` or `length`; a full context is a length too."""
        return "stop" if self.end is not None and self.end.reason == "stop" else "length"

    @property
    def scored(self) -> list[Token]:
        """The tokens with the one that ended the text, if one did: its probability belongs to the text's."""
        stop = None if self.end is None else self.end.stop_token
        return self.tokens if stop is None else [*self.tokens, stop]


def as_json(value: Any) -> bytes:
    """A value as JSON."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(
        errors="replace"
    )


def event(value: Any) -> bytes:
    """A value as a server-sent event."""
    return b"data: " + as_json(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"
# Headers of a stream.
NOT_KEPT = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def head(kind: str, prefix: str, model: str) -> dict[str, Any]:
    """What an answer and all of its chunks begin with."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()),
        "model": model,
    }  # fmt: skip


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """The numbers of tokens."""
    return {
        "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """A prompt as it was read: its ids, and their log-probabilities where they were asked for."""

    ids: list[int]
    echoed: list[Token]


def text_choice(
    request: CompletionRequest, texts: TokenTexts, index: int, prompt: Prompt, made: Made
) -> dict[str, Any]:
    """A choice of `/v1/completions`."""
    text, tokens = made.text, list[Token | int](made.scored)
    if request.echo:
        text = texts.tokenizer.decode(prompt.ids, skip_special=True) + text
        tokens = [prompt.ids[0], *prompt.echoed, *tokens]
    choice: dict[str, Any] = {
        "index": index, "text": text, "finish_reason": made.finish_reason, "logprobs": None,
    }  # fmt: skip
    if request.logprobs is not None:
        choice["logprobs"] = text_logprobs(texts, tokens, request.logprobs)
    if request.prompt_logprobs is not None:
        choice["prompt_logprobs"] = prompt_logprobs(texts, prompt.ids, prompt.echoed, request.prompt_logprobs)
    if request.return_token_ids:
        choice |= {"prompt_token_ids": prompt.ids, "token_ids": [token.id for token in made.tokens]}
    return choice


def chat_choice(
    request: ChatRequest, texts: TokenTexts, index: int, made: Made, with_tools: bool
) -> dict[str, Any]:
    """A choice of `/v1/chat/completions`."""
    content, calls = read_calls(made.text) if with_tools else (made.text, [])
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if calls:
        message |= {"content": content or None, "tool_calls": calls}
    choice: dict[str, Any] = {
        "index": index, "message": message, "logprobs": None,
        "finish_reason": chat_reason(made, bool(calls)),
    }  # fmt: skip
    if request.logprobs:
        choice["logprobs"] = chat_logprobs(texts, made.scored, request.top_logprobs or 0)
    if request.return_token_ids:
        choice["token_ids"] = [token.id for token in made.tokens]
    return choice


def chat_reason(made: Made, has_calls: bool) -> str:
    """Why an answer ended; one that was cut off has ended by its length, whatever it called before."""
    reason = made.finish_reason
    return "tool_calls" if has_calls and reason == "stop" else reason
