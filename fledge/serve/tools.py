"""Tool calls in the Hermes form: which tools a model may call, the grammar of its calls, and reading them as
they come.

An answer is a text, then calls; each `<tool_call>` holds a JSON object with the function's name and arguments
by its schema. Where a tokenizer has the marks as tokens, only these begin and end a call.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fledge.engine.constraints import JSON_SPACES
from fledge.serve.errors import ApiError
from fledge.tokenizer.bpe import Tokenizer
from fledge.tokenizer.chat import parse_tool_calls
from fledge.types import Grammar

BEGIN, END = "<tool_call>", "</tool_call>"
MAX_TOOLS = 128
# Of functions without a schema.
NO_SCHEMA = {"type": "object"}


@dataclass(frozen=True)
class ToolChoice:
    """What may be called. `tools` stand in the prompt, `callable` are those that may be chosen; with mode
    "required" one must be. `parallel`: more than one may."""

    mode: Literal["none", "auto", "required"]
    tools: tuple[dict[str, Any], ...] = ()
    callable: tuple[dict[str, Any], ...] = ()
    parallel: bool = True


def tool_choice(tools: Sequence[dict[str, Any]] | None, choice: Any, parallel: bool) -> ToolChoice:
    """A request's `tools`, `tool_choice` and `parallel_tool_calls`. Raises ApiError."""
    known = tuple(tools or ())
    names = [_name(tool, f"tools[{i}]") for i, tool in enumerate(known)]
    if len(known) > MAX_TOOLS:
        raise ApiError(400, f"tools: {len(known)} are more than {MAX_TOOLS}", "tools")
    for called in names:
        if names.count(called) > 1:
            raise ApiError(400, f"tools: the function {called!r} is there twice", "tools")
    if choice is None:
        choice = "auto" if known else "none"
    if choice == "none" or (not known and choice == "auto"):
        return ToolChoice("none")  # a model is not told of tools that it may not call
    if not known:
        raise ApiError(400, "tool_choice needs tools", "tool_choice")
    if choice in ("auto", "required"):
        return ToolChoice(choice, known, known, parallel)
    if isinstance(choice, dict) and choice.get("type") == "function":
        name = _inner(choice.get("function")).get("name")
        return ToolChoice("required", known, _chosen(known, names, [name]), False)
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = _inner(choice.get("allowed_tools"))
        mode, wanted = allowed.get("mode", "auto"), allowed.get("tools")
        if mode in ("auto", "required") and isinstance(wanted, list) and wanted:
            chosen = [_inner(_inner(tool).get("function")).get("name") for tool in wanted]
            return ToolChoice(mode, known, _chosen(known, names, chosen), parallel)
    raise ApiError(
        400, 'tool_choice must be none, auto, required or {"type": "function", "function": {"name": ...}}',
        "tool_choice", "invalid_value",
    )  # fmt: skip


def _inner(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _name(tool: dict[str, Any], where: str) -> str:
    function = _inner(tool.get("function"))
    name = function.get("name")
    if tool.get("type") != "function" or not isinstance(name, str) or not name:
        raise ApiError(
            400,
            f'{where}: must be {{"type": "function", "function": {{"name": ...}}}}',
            where,
            "invalid_value",
        )
    if not isinstance(function.get("parameters", {}), dict | None):
        raise ApiError(400, f"{where}.function.parameters must be a JSON schema, an object", where)
    return name


def _chosen(
    tools: tuple[dict[str, Any], ...], names: Sequence[str], wanted: Sequence[Any]
) -> tuple[dict[str, Any], ...]:
    for name in wanted:
        if name not in names:
            raise ApiError(400, f"tool_choice: there is no tool {str(name)[:60]!r}", "tool_choice")
    return tuple(tool for tool, name in zip(tools, names, strict=True) if name in wanted)


def calls_grammar(choice: ToolChoice, text: Grammar | None, tokenizer: Tokenizer) -> Grammar:
    """What an answer may be: a text (by `text`, if it must be JSON), calls, or a text and then calls."""
    if text is not None and text.kind != "json_schema":
        raise ApiError(
            400, "structured_outputs: with tools only a JSON schema is possible", "structured_outputs"
        )
    begin, end = (_mark(mark, tokenizer) for mark in (BEGIN, END))
    calls = 'call ("\\n" call)*' if choice.parallel else "call"
    answer = "TEXT? (calls)?" if text is None else "calls | json"
    lines = [
        f"start: {calls if choice.mode == 'required' else answer}",
        f"calls: {calls}",
        f'call: {begin} "\\n" ({" | ".join(f"call{i}" for i in range(len(choice.callable)))}) "\\n" {end}',
    ]
    for i, tool in enumerate(choice.callable):
        function = tool["function"]
        opening = f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "arguments": '
        lines.append(f'call{i}: {json.dumps(opening)} arguments{i} "}}"')
        lines.append(f"arguments{i}: %json {_schema(function.get('parameters') or NO_SCHEMA)}")
    if text is not None:
        lines.append(f"json: %json {_schema(json.loads(text.text))}")
    elif choice.mode == "auto":
        lines.append("TEXT: /(.|\\n)+/")
    return Grammar("lark", "\n".join(lines) + "\n")


def _mark(mark: str, tokenizer: Tokenizer) -> str:
    token_id = tokenizer.special_tokens.get(mark)
    return json.dumps(mark) if token_id is None else f"<[{token_id}]>"


def _schema(schema: dict[str, Any]) -> str:
    return json.dumps({**schema, "x-guidance": JSON_SPACES})


def read_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """An answer's content and its tool calls, with ids that no other answer has."""
    content, calls = parse_tool_calls(text)
    return content, [{**call, "id": f"call_{secrets.token_hex(12)}"} for call in calls]


class CallStream:
    """Takes an answer apart while it comes: what is certainly content, and each call once it is whole. All
    pieces together are what `read_calls` makes of the whole text."""

    def __init__(self) -> None:
        self._held = ""
        self._tried = 0  # characters of it in which no closing mark closes the call

    def push(self, piece: str) -> tuple[str, list[dict[str, Any]]]:
        """The content and the calls that are certain now."""
        self._held += piece
        content, calls = "", list[dict[str, Any]]()
        while (start := _OPENING.search(self._held)) is not None:
            if start.start():
                content += self._held[: start.start()]
                self._cut(start.start())
            if not start[0].endswith(BEGIN):
                return content, calls  # perhaps the beginning of a mark
            # Until it is closed; a closing mark inside of an argument closes nothing.
            found: list[dict[str, Any]] = []
            for close in _CLOSING.finditer(self._held, self._tried):
                rest, found = read_calls(self._held[: close.end()])
                if found and not rest:
                    calls += found
                    self._cut(close.end())
                    break
                found, self._tried = [], close.end()
            if not found:
                return content, calls
        content += self._held
        self._cut(len(self._held))
        return content, calls

    def _cut(self, characters: int) -> None:
        self._held, self._tried = self._held[characters:], 0

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """The rest: nothing more will be pushed."""
        held, self._held = self._held, ""
        return read_calls(held)


# A mark with the line break before it, or what may become one at the text's end.
_BEGINNINGS = "|".join(re.escape(BEGIN[:n]) for n in range(len(BEGIN) - 1, 0, -1))
_CLOSING = re.compile(re.escape(END))
_OPENING = re.compile(rf"\n?{re.escape(BEGIN)}|\n?(?:{_BEGINNINGS})\Z|\n\Z")
