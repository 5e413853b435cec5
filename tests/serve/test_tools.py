"""Tool calls: what may be asked for, and answers taken apart while they come."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.engine.constraints import Grammars
from fledge.serve.errors import ApiError
from fledge.serve.tools import CallStream, calls_grammar, read_calls, tool_choice
from fledge.tokenizer.bpe import Tokenizer
from fledge.types import Grammar

from .real import make_tokenizer


def tool(name: str, **schema: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", **schema}}}


CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "b"}}\n</tool_call>'
PIECES = st.sampled_from([
    CALL, "<tool_call>", "</tool_call>", "\n", "text", "<", "<tool", "_call>", '{"name": "g"}',
    '<tool_call>\n{"name": "f", "arguments": {"a": "</tool_call>"}}\n</tool_call>',
    "<tool_call>\n{]\n</tool_call>",
])  # fmt: skip


def without_ids(calls: list[dict[str, Any]]) -> list[Any]:
    return [call["function"] for call in calls]


@given(st.lists(PIECES, max_size=8), st.lists(st.integers(1, 12), min_size=1))
def test_pieces_together_are_what_the_whole_text_says(parts: list[str], cuts: list[int]) -> None:
    text, stream, content, calls, at = "".join(parts), CallStream(), "", list[Any](), 0
    while at < len(text):
        size = cuts[at % len(cuts)]
        piece, more = stream.push(text[at : at + size])
        content, calls, at = content + piece, calls + more, at + size
    rest, more = stream.finish()
    whole_content, whole_calls = read_calls(text)
    assert content + rest == whole_content
    assert without_ids(calls + more) == without_ids(whole_calls)


def test_text_is_not_held_back_and_calls_come_when_they_are_whole() -> None:
    stream = CallStream()
    assert stream.push("I look. ") == ("I look. ", [])
    assert stream.push("1 < 2\n") == ("1 < 2", [])  # the line break may belong to a call
    assert stream.push(CALL[:20]) == ("", [])
    assert stream.push(CALL[20:-3]) == ("", [])
    content, calls = stream.push(CALL[-3:])
    assert content == "" and without_ids(calls) == [{"name": "f", "arguments": '{"a": "b"}'}]


@pytest.mark.parametrize(
    ("tools", "choice", "mode", "names"),
    [
        (None, None, "none", []),
        ([tool("f")], "none", "none", []),
        ([], "auto", "none", []),
        ([tool("f"), tool("g")], None, "auto", ["f", "g"]),
        ([tool("f"), tool("g")], "required", "required", ["f", "g"]),
        ([tool("f"), tool("g")], {"type": "function", "function": {"name": "g"}}, "required", ["g"]),
        ([tool("f"), tool("g")],
         {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [tool("f")]}}, "auto", ["f"]),
    ],
)  # fmt: skip
def test_choices(tools: Any, choice: Any, mode: str, names: list[str]) -> None:
    found = tool_choice(tools, choice, True)
    assert found.mode == mode
    assert [one["function"]["name"] for one in found.callable] == names
    assert len(found.tools) == (0 if mode == "none" else len(tools))


@pytest.mark.parametrize(
    ("tools", "choice"),
    [
        (None, "required"),
        ([tool("f")], "always"),
        ([tool("f")], {"type": "function", "function": {"name": "g"}}),
        ([tool("f")], {"type": "function"}),
        ([tool("f")], {"type": "allowed_tools", "allowed_tools": {"tools": []}}),
        ([tool("f"), tool("f")], "auto"),
        ([{"type": "function", "function": {"name": "f", "parameters": []}}], "auto"),
        ([{"type": "web_search"}], None),
        ([tool(f"f{i}") for i in range(200)], None),
    ],
)
def test_choices_that_mean_nothing(tools: Any, choice: Any) -> None:
    with pytest.raises(ApiError) as caught:
        tool_choice(tools, choice, True)
    assert caught.value.status == 400


CITY = {"properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}


def allows(tokenizer: Tokenizer, grammar: Grammar, text: str) -> bool:
    """Whether an answer, with its marks as tokens, is whole by a grammar."""
    constraint = Grammars(tokenizer, tokenizer.vocab_size).start(grammar)
    try:
        for token_id in tokenizer.encode_special(text):
            constraint.advance(token_id)
    except Exception:
        return False
    return constraint.accepting


@pytest.mark.parametrize(
    ("choice", "parallel", "text", "allowed"),
    [
        ("auto", True, "", True),
        ("auto", True, "Only text.", True),
        ("auto", True, 'Text\n<tool_call>\n{"name": "f", "arguments": {"city": "x"}}\n</tool_call>', True),
        ("auto", True, '<tool_call>\n{"name": "f", "arguments": {"town": "x"}}\n</tool_call>', False),
        ("auto", True, '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>', False),
        ("auto", True, '<tool_call>\n{"name": "f", "arguments": {"city": "x"}}', False),
        ("required", True, "Only text.", False),
        ("required", True, '<tool_call>\n{"name": "g\\u00e9", "arguments": {}}\n</tool_call>', False),
        ("required", True, '<tool_call>\n{"name": "gé", "arguments": {"a": [1]}}\n</tool_call>', True),
        ("required", True, "\n".join([CALL.replace('"a"', '"city"')] * 2), True),
        ("required", False, "\n".join([CALL.replace('"a"', '"city"')] * 2), False),
        ("required", False, CALL.replace('"a"', '"city"'), True),
    ],
)
def test_calls_are_held_to_their_schemas(choice: str, parallel: bool, text: str, allowed: bool) -> None:
    tokenizer = make_tokenizer()
    asked = tool_choice([tool("f", **CITY), tool("gé")], choice, parallel)
    assert allows(tokenizer, calls_grammar(asked, None, tokenizer), text) == allowed
    if allowed and "<tool_call>" in text:
        assert read_calls(text)[1]


def test_a_schema_for_the_text_leaves_calls_possible() -> None:
    tokenizer = make_tokenizer()
    asked = tool_choice([tool("f", **CITY)], "auto", True)
    form = Grammar("json_schema", json.dumps({"enum": [True]}))
    grammar = calls_grammar(asked, form, tokenizer)
    assert allows(tokenizer, grammar, "true")
    assert allows(tokenizer, grammar, CALL.replace('"a"', '"city"'))
    assert not allows(tokenizer, grammar, "text")
    with pytest.raises(ApiError):
        calls_grammar(asked, Grammar("regex", "a"), tokenizer)
