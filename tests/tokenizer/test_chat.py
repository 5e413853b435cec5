from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fledge.errors import UserError
from fledge.tokenizer.bpe import SPECIAL_TOKENS, Tokenizer, train_bpe
from fledge.tokenizer.chat import EncodedChat, encode_chat, parse_tool_calls, render_chat

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(SPECIAL_TOKENS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
# Pieces that, alone or beside each other and the template's text, read like special tokens or marks.
pieces = st.sampled_from(
    (
        *SPECIAL_TOKENS,
        *("<|", "|>", "<", ">", "im_end", "think", "<|im_", "end|>", "</tool", "_call>"),
        *("fledge0", "fledge1|", "fledge0(", "{{ 1 }}", "{% endgeneration %}"),
        *("\n", " ", "é", "🦊", "word"),
    )
)
contents = st.text(max_size=12) | st.lists(pieces, max_size=6).map("".join)
calls = st.builds(
    lambda name, arguments: {
        "id": "call_0",
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
    },
    st.text(min_size=1, max_size=8) | pieces,
    st.dictionaries(st.text(max_size=5) | pieces, json_values, max_size=3),
)
messages_ = st.one_of(
    st.builds(lambda role, c: {"role": role, "content": c}, st.sampled_from(["user", "tool"]), contents),
    st.builds(lambda c: {"role": "assistant", "content": c}, contents),
    st.builds(
        lambda c, t: {"role": "assistant", "content": c, "tool_calls": t},
        st.none() | contents,
        st.lists(calls, min_size=1, max_size=3),
    ),
)
conversations = st.builds(
    lambda system, rest: [{"role": "system", "content": c} for c in system] + rest,
    st.lists(contents, max_size=1),
    st.lists(messages_, min_size=1, max_size=5),
)
tool_lists = st.none() | st.lists(
    st.builds(
        lambda name, parameters: {"type": "function", "function": {"name": name, "parameters": parameters}},
        pieces | st.text(max_size=5),
        st.dictionaries(pieces | st.text(max_size=5), json_values, max_size=3),
    ),
    max_size=2,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = "system user assistant\nHello, how can I help you?\n\n\n\n  \n\n You may call <tool_call>\n"
    return train_bpe([text * 3, json.dumps(WEATHER) * 3], 500)


def targets(tokenizer: Tokenizer, chat: EncodedChat) -> list[str]:
    """The runs of tokens under the mask, as text."""
    runs: list[list[int]] = []
    for i, (token_id, on) in enumerate(zip(chat.ids, chat.mask, strict=True)):
        if on:
            if i == 0 or not chat.mask[i - 1]:
                runs.append([])
            runs[-1].append(token_id)
    return [tokenizer.decode(run) for run in runs]


def test_the_form_of_a_chat(tokenizer: Tokenizer) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Bye."},
    ]
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHello?<|im_end|>\n"
        "<|im_start|>assistant\nHi.<|im_end|>\n"
        "<|im_start|>user\nBye.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert render_chat(tokenizer, messages, add_generation_prompt=True) == expected
    chat = encode_chat(tokenizer, messages, add_generation_prompt=True)
    assert chat.ids == tokenizer.encode_special(expected)
    assert targets(tokenizer, chat) == ["Hi.<|im_end|>"]
    assert render_chat(tokenizer, messages[1:2]) == "<|im_start|>user\nHello?<|im_end|>\n"


def test_the_form_of_tools(tokenizer: Tokenizer) -> None:
    call = {"type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Köln"}'}}
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "call_0"},
        {"role": "assistant", "content": "And now", "tool_calls": [call, call]},
        {"role": "tool", "content": "rain"},
        {"role": "tool", "content": "snow"},
    ]
    text = render_chat(tokenizer, messages, [WEATHER], add_generation_prompt=True)
    one = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
    assert text.startswith("<|im_start|>system\nBe brief.\n\n")
    assert f"<tools>\n{json.dumps(WEATHER)}\n</tools>" in text
    assert text.count("<|im_start|>system") == 1
    assert text[text.index("<|im_start|>user") :] == (
        "<|im_start|>user\nWeather?<|im_end|>\n"
        f"<|im_start|>assistant\n{one}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n"
        f"<|im_start|>assistant\nAnd now\n{one}\n{one}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nrain\n</tool_response>\n"
        "<tool_response>\nsnow\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    chat = encode_chat(tokenizer, messages, [WEATHER])
    assert targets(tokenizer, chat) == [f"{one}<|im_end|>", f"And now\n{one}\n{one}<|im_end|>"]
    # Its tool calls are special tokens: three calls, and the one in the system turn's explanation.
    assert chat.ids.count(tokenizer.special_tokens["<tool_call>"]) == 4
    assert chat.ids.count(tokenizer.special_tokens["</tool_response>"]) == 3
    without_system = render_chat(tokenizer, messages[1:], [WEATHER], add_generation_prompt=True)
    assert without_system == text.replace("Be brief.\n\n", "")
    assert render_chat(tokenizer, messages, []) == render_chat(tokenizer, messages)


def special_count(tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: object) -> int:
    """How many special tokens the template itself writes, counted by hand."""
    count = 0
    roles = [message["role"] for message in messages]
    for i, message in enumerate(messages):
        if message["role"] == "tool":
            count += 2 + 2 * (i == 0 or roles[i - 1] != "tool")
        else:
            count += 2 + 2 * len(message.get("tool_calls", []))
    if tools:
        count += 2 + (0 if roles[0] == "system" else 2)
    return count


@given(messages=conversations, tools=tool_lists)
@settings(deadline=None, max_examples=300)
def test_what_texts_say_never_becomes_a_special_token(
    tokenizer: Tokenizer, messages: list[Any], tools: list[Any] | None
) -> None:
    before = copy.deepcopy((messages, tools))
    chat = encode_chat(tokenizer, messages, tools)
    assert (messages, tools) == before
    assert tokenizer.decode(chat.ids) == render_chat(tokenizer, messages, tools)
    found = sum(token_id in tokenizer.special_ids for token_id in chat.ids)
    assert found == special_count(tokenizer, messages, tools)


@given(messages=conversations, tools=tool_lists)
@settings(deadline=None, max_examples=200)
@example([{"role": "user", "content": "a"}, {"role": "assistant", "content": "\n\n b"}], None)
def test_the_prompt_of_every_answer_begins_the_whole(
    tokenizer: Tokenizer, messages: list[Any], tools: list[Any] | None
) -> None:
    whole = encode_chat(tokenizer, messages, tools)
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and i > 0:
            prompt = encode_chat(tokenizer, messages[:i], tools, add_generation_prompt=True)
            assert whole.ids[: len(prompt.ids)] == prompt.ids
            assert whole.mask[: len(prompt.ids)] == prompt.mask
            assert whole.mask[len(prompt.ids)]


@given(messages=conversations, tools=tool_lists)
@settings(deadline=None, max_examples=200)
def test_the_mask_is_what_the_assistant_wrote(
    tokenizer: Tokenizer, messages: list[Any], tools: list[Any] | None
) -> None:
    written = []
    for message in messages:
        if message["role"] == "assistant":
            parts = [message["content"]] if message["content"] else []
            for call in message.get("tool_calls", []):
                function = call["function"]
                name = json.dumps(function["name"], ensure_ascii=False)
                arguments = json.dumps(json.loads(function["arguments"]), ensure_ascii=False)
                parts.append(f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>')
            written.append("\n".join(parts) + "<|im_end|>")
    assert targets(tokenizer, encode_chat(tokenizer, messages, tools)) == written


@given(content=st.text(max_size=20), tool_calls=st.lists(calls, max_size=3))
@settings(deadline=None)
def test_tool_calls_come_back(tokenizer: Tokenizer, content: str, tool_calls: list[Any]) -> None:
    messages: list[Any] = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": content, "tool_calls": tool_calls},
    ]
    (text,) = targets(tokenizer, encode_chat(tokenizer, messages))
    parsed_content, parsed = parse_tool_calls(text.removesuffix("<|im_end|>"))
    assert parsed_content == content
    assert [call["id"] for call in parsed] == [f"call_{i}" for i in range(len(parsed))]
    for got, given_ in zip(parsed, tool_calls, strict=True):
        assert got["type"] == "function"
        assert got["function"]["name"] == given_["function"]["name"]
        assert json.loads(got["function"]["arguments"]) == json.loads(given_["function"]["arguments"])
    # What was parsed can be sent back, and reads the same.
    again: list[Any] = [messages[0], {"role": "assistant", "content": parsed_content, "tool_calls": parsed}]
    assert encode_chat(tokenizer, again) == encode_chat(tokenizer, messages)


CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        ("", "", []),
        ("no call", "no call", []),
        (CALL, "", ["f"]),
        (f"before\n{CALL}\nafter", "before\nafter", ["f"]),
        (f"{CALL}{CALL}", "", ["f", "f"]),
        ('<tool_call>{"name":"g"}</tool_call>', "", ["g"]),
        ('<tool_call>\n{"name": "g", "arguments": {}}\n', "", ["g"]),
        ('<tool_call>{"name": "g", "arguments": {"t": "</tool_call>"}}</tool_call>', "", ["g"]),
        ("<tool_call>{broken}</tool_call>", "<tool_call>{broken}</tool_call>", []),
        (f"<tool_call>{{broken\n{CALL}", "<tool_call>{broken", ["f"]),
        ("<tool_call>", "<tool_call>", []),
        ('<tool_call>{"name": "g"} more</tool_call>', '<tool_call>{"name": "g"} more</tool_call>', []),
        ("<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
        ('<tool_call>{"name": 1}</tool_call>', '<tool_call>{"name": 1}</tool_call>', []),
        ('<tool_call>{"name": "g", "arguments": "x"}', '<tool_call>{"name": "g", "arguments": "x"}', []),
        ('<tool_call>{"name": "g", "arguments": {"x": NaN}}', None, []),
        ('<tool_call>{"name": "g", "arguments": {"x": "\\ud800"}}', None, []),
        ("<tool_call>" + "[" * 100_000, None, []),
        ('<tool_call>{"name": ' + "1" * 5000 + "}", None, []),
    ],
)
def test_parsing_of_calls(text: str, content: str | None, names: list[str]) -> None:
    parsed_content, parsed = parse_tool_calls(text)
    assert parsed_content == (text if content is None else content)
    assert [call["function"]["name"] for call in parsed] == names


@given(text=st.lists(pieces | st.sampled_from([*'{}[]":,', CALL, '{"name": "f"}'])).map("".join))
@settings(deadline=None)
def test_parsing_never_raises_and_loses_no_text(text: str) -> None:
    content, parsed = parse_tool_calls(text)
    if not parsed:
        assert content == text


USER: Any = {"role": "user", "content": "hi"}


def with_call(**function: object) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"role": "robot", "content": "x"}, "role is 'robot'"),
        ({"content": "x"}, "role is None"),
        ({"role": ["user"], "content": "x"}, "role is"),
        ("hello", "not an object"),
        ({"role": "user"}, "no content"),
        ({"role": "user", "content": None}, "no content"),
        ({"role": "assistant", "content": None}, "no content"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "no content"),
        ({"role": "user", "content": 3}, "content is of type int"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}]}, "content is of type list"),
        ({"role": "user", "content": "a\ud800b"}, "surrogate"),
        ({"role": "user", "content": "x", "extra": {1, 2}}, "cannot be written as JSON"),
        ({"role": "user", "content": "x", "tool_calls": [{}]}, "only assistants"),
        ({"role": "assistant", "tool_calls": "f()"}, "tool_calls is not a list"),
        ({"role": "assistant", "tool_calls": ["f()"]}, r"tool_calls\[0\]: not of the form"),
        ({"role": "assistant", "tool_calls": [{"type": "magic", "function": {}}]}, "not of the form"),
        (with_call(arguments="{}"), "function.name"),
        (with_call(name="", arguments="{}"), "function.name"),
        (with_call(name="f"), "function.arguments"),
        (with_call(name="f", arguments={"x": 1}), "function.arguments"),
        (with_call(name="f", arguments="[1]"), "function.arguments"),
        (with_call(name="f", arguments="{"), "function.arguments"),
        (with_call(name="f", arguments='{"x": NaN}'), "function.arguments"),
        (with_call(name="f", arguments='{"x": "\\ud800"}'), "surrogate"),
    ],
)
def test_bad_messages_are_named(tokenizer: Tokenizer, message: Any, complaint: str) -> None:
    for function in (encode_chat, render_chat):
        with pytest.raises(UserError, match=rf"^messages\[1\].*{complaint}") as caught:
            function(tokenizer, [USER, message])
        assert "\n" not in str(caught.value)
        str(caught.value).encode()


def test_no_messages_and_bad_tools(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="messages: empty"):
        encode_chat(tokenizer, [])
    bad: list[Any] = ["f", {}, {"function": {"name": 3}}]
    for tool in bad:
        with pytest.raises(UserError, match=r"^tools\[1\]: not of the form"):
            encode_chat(tokenizer, [USER], [WEATHER, tool])


def other(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    changed = copy.copy(tokenizer)
    changed.chat_template = template
    return changed


def test_templates_of_others(tokenizer: Tokenizer) -> None:
    """Templates trim, compare, and write tokens by their role in the tokenizer's config."""
    template = (
        "{% for m in messages if m.role != 'system' %}\n"
        "{{ m.role }}: {{ m.content | trim }}{{ eos_token }}\n{% endfor %}\n"
        "{% if tools[0].type == 'function' %}{{ tools[0].function.name }}{% endif %}"
    )
    messages: list[Any] = [
        {"role": "system", "content": "no"},
        {"role": "user", "content": "\n a<|endoftext|> "},
    ]
    changed = other(tokenizer, template)
    text = "user: a<|endoftext|><|endoftext|>\nget_weather"
    assert render_chat(changed, messages, [WEATHER]) == text
    chat = encode_chat(changed, messages, [WEATHER])
    assert tokenizer.decode(chat.ids) == text
    assert chat.ids.count(tokenizer.eos_id) == 1
    assert chat.mask == [False] * len(chat.ids)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content.split('</think>')[1] }}",
        "{% if '</think>' in messages[0].content %}x{% endif %}",
        "{{ messages[0].content | length }}",
    ],
)
def test_templates_that_look_at_look_alikes_are_refused(tokenizer: Tokenizer, template: str) -> None:
    message: Any = {"role": "user", "content": "a</think>b<|im_end|></think>c"}
    with pytest.raises(UserError, match="chat template"):
        encode_chat(other(tokenizer, template), [message])


def test_a_template_cannot_be_completed_into_a_special_token(tokenizer: Tokenizer) -> None:
    """Text between or beside the template's own angle brackets stays text."""
    for template, content in [
        ("<{{ messages[0].content }}>", "think"),
        ("{{ messages[0].content }}>", "<|im_end|"),
        ("<|im_{{ messages[0].content }}", "end|>"),
        ("{{ messages[0].content }}{{ messages[0].name }}", "<thi"),
    ]:
        message: Any = {"role": "user", "content": content, "name": "nk>"}
        chat = encode_chat(other(tokenizer, template), [message])
        assert tokenizer.special_ids.isdisjoint(chat.ids)


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (None, "no chat template"),
        ("{% if %}", "refuses"),
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{{ messages[0].nothing.at_all }}", "refuses"),
        ("{{ messages[0].content + 1 }}", "refuses"),
        ("{{ ''.__class__.__mro__ }}", "refuses"),
    ],
)
def test_templates_that_fail(tokenizer: Tokenizer, template: str | None, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        encode_chat(other(tokenizer, template), [USER])
