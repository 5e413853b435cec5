"""What the servers of others answer: texts, pieces of them, and what went wrong."""

from __future__ import annotations

import json
from typing import Any

import httpx2

from fledge.engine.text import TextCompletion, terminal_safe
from fledge.errors import UserError
from fledge.types import FinishReason

LONGEST_PAUSE_SECONDS = 60.0
# Too many requests, and what a server says while it starts or restarts.
PASSING = {408, 425, 429, 500, 502, 503, 504}
# Wrong for every request: the key, what it has paid for, the address.
OF_ALL = {401, 402, 403, 404, 405}


def completion(address: str, body: Any, key: str | None) -> TextCompletion:
    """The text of an answer. Raises UserError for one that has none."""
    is_chat = address.endswith("/chat/completions")
    try:
        choice = body["choices"][0]
        text = choice["message"].get("content") or "" if is_chat else choice["text"]
        if not isinstance(text, str):
            raise TypeError("its content is no text")
        return TextCompletion(text, [], [], reason(choice.get("finish_reason")), tokens=_tokens(body))
    except (KeyError, IndexError, TypeError, AttributeError):
        said = _short(json.dumps(body), key)
        kind = "chat" if is_chat else "text"
        raise UserError(f"{address}: the answer is no {kind} completion: {said}") from None


def piece(address: str, data: str, key: str | None) -> tuple[str, str | None]:
    """The text of an event, and why it was the last; UserError for an error in the middle of a stream."""
    try:
        event = json.loads(data)
        if "choices" not in event and "error" in event:
            said = event["error"]["message"] if isinstance(event["error"], dict) else event["error"]
            raise UserError(f"{address}: {_short(said, key)}")
        choice = event["choices"][0]
        text = choice["text"] if "text" in choice else choice["delta"].get("content")
        return text or "", choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return "", None  # usage and comments


def reason(value: object) -> FinishReason:
    """Why a text ended, of what a server says about it."""
    return "length" if value == "length" else "stop"


def refusal(address: str, answer: httpx2.Response, key: str | None) -> str:
    """What went wrong, in the server's words if it has some."""
    code = None
    try:
        error = answer.json()["error"]
        said = error if isinstance(error, str) else error["message"]
        code = None if isinstance(error, str) else error.get("code")
    except (ValueError, KeyError, TypeError):
        said = answer.headers.get("location") or answer.text or answer.reason_phrase
    hints = {401: "; give a key with --endpoint-key", 404: _lost(address, code)}
    hint = "; it is at another address" if answer.is_redirect else hints.get(answer.status_code, "")
    return f"{address}: {answer.status_code}: {_short(said, key)}{hint}"


def _lost(address: str, code: object) -> str:
    """What may be wrong where a server has nothing to answer with."""
    if code == "model_not_found":
        return ""
    if "/v1/" not in address:
        return "; check the address: most servers' ends in /v1"
    if address.endswith("/chat/completions"):
        return "; check address and model"
    return "; check address and model, or ask in chats: not every server continues texts"


def refuses_all(status: int) -> bool:
    """Whether a server that answers so would answer other requests alike. One that breaks (500) may do so at
    this request only."""
    return status < 400 or status in OF_ALL or status in PASSING - {500}


def wished_pause(answer: httpx2.Response) -> float | None:
    """Seconds until the server wants to be asked again (`Retry-After`); a longer pause than a minute is not
    waited for."""
    try:
        seconds = float(answer.headers["retry-after"])
    except (KeyError, ValueError):  # it may be a date, too
        return None
    return seconds if 0 <= seconds <= LONGEST_PAUSE_SECONDS else None


def why(error: Exception) -> str:
    """What kept a request from being answered."""
    if isinstance(error, httpx2.ConnectError):
        return " ".join(f"nobody answers there ({error})".split())
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")


def _tokens(body: dict[str, Any]) -> int | None:
    usage = body.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return count if type(count) is int else None


def _short(said: object, key: str | None) -> str:
    """A server's words as a part of one line, which cannot steer a terminal. Some repeat the key."""
    words = str(said).replace(key, "(the key)") if key else str(said)
    return terminal_safe(" ".join(words.split())[:200])
