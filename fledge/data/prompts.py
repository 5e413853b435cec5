"""Prompts: what a model is asked, from conversations or preferences."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fledge.data.preferences import Turns
from fledge.data.readers import file_rows
from fledge.data.streams import BadLines
from fledge.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """The turns before an answer, and the row they came from."""

    messages: Turns
    tools: list[dict[str, Any]] | None
    row: dict[str, Any]
    where: str


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a JSON Lines or Parquet file: `messages` without the assistant's last turns, or `prompt`
    (a text or messages). Raises UserError with file and line."""
    prompts = []
    for where, row in file_rows(path, BadLines(advice="")):
        value = row.get("messages", row.get("prompt"))
        if isinstance(value, str):
            value = [{"role": "user", "content": value}]
        if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
            raise UserError(f'{where}: it takes a list in "messages", or a text or a list in "prompt"')
        if not isinstance(row.get("tools"), list | None):
            raise UserError(f'{where}: the field "tools" must be a list')
        turns: Turns = list(value)
        while turns and turns[-1].get("role") == "assistant":
            turns.pop()
        if not turns:
            raise UserError(f"{where}: no turn of somebody else than the assistant")
        prompts.append(Prompt(turns, row.get("tools"), row, where))
    if not prompts:
        raise UserError(f"{path}: holds no prompts")
    return prompts
