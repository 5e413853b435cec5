"""OpenAI's messages as chat templates take them: parts of content joined, newer names for older ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from fledge.serve.errors import ApiError
from fledge.tokenizer.bpe import Tokenizer
from fledge.tokenizer.chat import encode_chat, render_chat
from fledge.types import Message

_TEXT_PARTS = {"text": "text", "input_text": "text", "refusal": "refusal"}


def plain_messages(messages: Sequence[dict[str, Any]]) -> list[Message]:
    """The same messages with their content as one text; what only OpenAI's models do is refused (400).

    The template checks what is left: roles, tool calls, missing content.
    """
    return [_plain(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _plain(message: dict[str, Any], where: str) -> Message:
    plain = {key: value for key, value in message.items() if value is not None}
    if plain.get("role") == "developer":
        plain["role"] = "system"
    if isinstance(plain.get("content"), list):
        plain["content"] = "".join(
            _part_text(part, f"{where}.content[{i}]") for i, part in enumerate(plain["content"])
        )
    calls = plain.get("tool_calls")
    if calls == []:
        del plain["tool_calls"]
    elif isinstance(calls, list):
        plain["tool_calls"] = [_call(call) for call in calls]
    if plain.get("role") == "assistant" and "content" not in plain and "tool_calls" not in plain:
        plain["content"] = plain.get("refusal", "")
    return cast(Message, plain)


def _part_text(part: Any, where: str) -> str:
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        shown = f"parts of type {str(kind)[:40]!r}" if isinstance(kind, str) else "such parts"
        raise ApiError(
            400, f"{where}: the models here read text only, no {shown}", where, "unsupported_content"
        )
    text = part.get(_TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise ApiError(400, f"{where}.{_TEXT_PARTS[kind]}: must be a text", where, "invalid_value")
    return text


def _call(call: Any) -> Any:
    """A tool call; some clients write no arguments as an empty text."""
    function = call.get("function") if isinstance(call, dict) else None
    if isinstance(function, dict) and function.get("arguments") in ("", None):
        return {**call, "function": {**function, "arguments": "{}"}}
    return call


def chat_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | None = None,
) -> list[int]:
    """The ids of a conversation, as the model reads it before it goes on. A final message that is continued
    stands as the model itself would have begun its answer. Raises ApiError, UserError."""
    before, begun, prompted = _parts(messages, add_generation_prompt, continue_final_message)
    if begun is None:
        return encode_chat(tokenizer, messages, tools, prompted).ids
    return [*encode_chat(tokenizer, before, tools, True).ids, *tokenizer.encode_piece(begun, "text")]


def chat_text(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | None = None,
) -> str:
    """The same as one text, to be shown."""
    before, begun, prompted = _parts(messages, add_generation_prompt, continue_final_message)
    if begun is None:
        return render_chat(tokenizer, messages, tools, prompted)
    return render_chat(tokenizer, before, tools, True) + begun


def _parts(
    messages: Sequence[Message], add_generation_prompt: bool | None, continue_final_message: bool | None
) -> tuple[Sequence[Message], str | None, bool]:
    """The messages, the beginning of an answer that is continued, whether an answer is asked for."""
    if not continue_final_message:
        return messages, None, add_generation_prompt is not False
    name, last = "continue_final_message", messages[-1]
    if add_generation_prompt:
        raise ApiError(400, f"{name} and add_generation_prompt exclude each other", name)
    if last.get("role") != "assistant" or last.get("tool_calls"):
        raise ApiError(400, f"{name}: the last message must be an assistant's text", name)
    if len(messages) < 2:
        raise ApiError(400, f"{name}: there must be a message before the one that is continued", name)
    content = last.get("content")
    if not isinstance(content, str):
        raise ApiError(400, f"{name}: the last message has no text", name)
    return messages[:-1], content, True
