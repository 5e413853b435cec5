"""Corrections from the chat page: preferences, a JSON line each, as `fledge dpo`, `reward`, `label` read."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fledge.data.preferences import parse_preference
from fledge.errors import UserError

MAX_TEXT_CHARACTERS = 100_000  # as in labels
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed")
_FIELDS = ("role", "content", "tool_calls", "tool_call_id", "name")


class CorrectionFile:
    """A file that only ever grows, a line for each correction; safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        """Raises UserError if the file cannot be written."""
        self.path = path
        self._lock = threading.Lock()
        self._keys: set[str] = set()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("ab").close()
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}; name another file") from None

    def add(self, row: Mapping[str, Any], key: str = "") -> bool:
        """Append a line; once this returns it is on the disk. False, and nothing written, where a row came
        with the same key before: a click that was sent twice. Raises OSError when the disk refuses."""
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            if key and key in self._keys:
                return False
            with self.path.open("ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # a crash left half a line: this one must not join it
                        line = b"\n" + line
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            if key:
                self._keys.add(key)
        return True


def correction_row(body: Mapping[str, Any], models: Sequence[str]) -> dict[str, Any]:
    """What the page sends as a preference in TRL's field names: `prompt`, `chosen` (the correction),
    `rejected` (the answer), `models` (as in labels: who wrote which), `sampling`, and `tools` if the model
    had some.

    `body` has `prompt` (messages), `rejected` (the assistant's message), `correction` (a text), `model`,
    `sampling` and `tools`. Raises UserError, one line, for the first thing that is wrong.
    """
    model, text = body.get("model"), body.get("correction")
    if model not in models:
        raise UserError(f"correction: model is {model!r}; this server has {', '.join(models)}")
    if not isinstance(text, str) or not text.strip():
        raise UserError("correction: the text is empty; write the answer as it should be")
    if len(text) > MAX_TEXT_CHARACTERS:
        raise UserError(f"correction: the text has {len(text):,} characters; at most {MAX_TEXT_CHARACTERS:,}")
    rejected = _message(body.get("rejected"), "rejected")
    if rejected["role"] != "assistant":
        raise UserError(f"correction: rejected is a message of the {rejected['role']}, not of the assistant")
    if rejected["content"] == text and "tool_calls" not in rejected:
        raise UserError("correction: the text is the model's own answer; change it")
    prompt = body.get("prompt")
    if not isinstance(prompt, list) or not prompt:
        raise UserError("correction: prompt must be a list of messages")
    row: dict[str, Any] = {
        "prompt": [_message(message, f"prompt[{i}]") for i, message in enumerate(prompt)],
        "chosen": [{"role": "assistant", "content": text}],
        "rejected": [rejected],
        "models": ["correction", model],
        "sampling": _sampling(body.get("sampling", {})),
    }
    if body.get("tools") is not None:
        row["tools"] = body["tools"]
    parse_preference(row, "correction")  # whoever reads the file does the same
    return row


def _message(value: Any, where: str) -> dict[str, Any]:
    """The known fields of a message."""
    if not isinstance(value, dict) or value.get("role") not in ("system", "user", "assistant", "tool"):
        raise UserError(f"correction: {where} is no message with a role")
    message = {name: value[name] for name in _FIELDS if value.get(name) is not None}
    if not isinstance(message.setdefault("content", ""), str):
        raise UserError(f"correction: the content of {where} is no text")
    if not isinstance(message.get("tool_calls", []), list):
        raise UserError(f"correction: the tool_calls of {where} are no list")
    return message


def _sampling(value: Any) -> dict[str, float]:
    """The settings of the page that the answer was made with; those left to the server are missing."""
    if not isinstance(value, dict):
        raise UserError("correction: sampling is no JSON object")
    given = {name: value[name] for name in SAMPLING if value.get(name) is not None}
    for name, number in given.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise UserError(f"correction: sampling.{name} is {number!r}; it must be a number")
    return given
