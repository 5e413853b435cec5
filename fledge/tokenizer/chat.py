"""Conversations as token ids: the chat template, the loss mask, and tool calls read back from text."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fledge.errors import UserError

if TYPE_CHECKING:
    from fledge.tokenizer.bpe import Tokenizer
    from fledge.types import Message

# ChatML, with tools in the form of Hermes and Qwen. What stands in a generation block was written by the
# assistant. Every line break is written as an expression: Jinja drops one that follows a tag.
CHAT_TEMPLATE = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- 'You may call these functions. Each line inside <tools></tools> describes one:\n<tools>\n' }}
    {%- for tool in tools %}
        {{- (tool | tojson) + '\n' }}
    {%- endfor %}
    {{- '</tools>\n\nTo call one, write its name and its arguments as a JSON object, like this:\n' }}
    {{- '<tool_call>\n{"name": "function", "arguments": {"argument": "value"}}\n</tool_call>' }}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
            {%- if message.content %}
                {{- message.content }}
            {%- endif %}
            {%- for call in message.tool_calls or [] %}
                {%- if message.content or not loop.first %}
                    {{- '\n' }}
                {%- endif %}
                {{- '<tool_call>\n{"name": ' + (call.function.name | tojson) }}
                {{- ', "arguments": ' + (call.function.arguments | tojson) + '}\n</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- elif message.role == 'user' or not (tools and loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""".strip()

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class EncodedChat:
    """A conversation's ids; `mask` is True where the assistant wrote the token (its `<|im_end|>` too)."""

    ids: list[int]
    mask: list[bool]


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """The conversation as one text, to be shown: `encode_chat` is what makes ids of it.

    Raises UserError that names the message if one is not in OpenAI's form.
    """
    variables = _template_variables(messages, tools, add_generation_prompt)
    return _render(tokenizer, variables)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
) -> EncodedChat:
    """The conversation's ids and loss mask.

    The text is cut at the template's special tokens and at the borders of generation blocks, and each
    piece is encoded as plain text. So the ids of a prompt begin the ids of the conversation it grows
    into, and nothing in a message or a tool becomes a special token. With a template that has no
    generation blocks the mask is False throughout.

    Raises UserError that names the message if one is not in OpenAI's form.
    """
    variables = _template_variables(messages, tools, add_generation_prompt)
    tokens = tuple(tokenizer.special_tokens)
    mark = _unused_mark(json.dumps(variables, ensure_ascii=False) + str(tokenizer.chat_template))
    shielded = {key: _shielded(value, tokens, f"{mark}|") for key, value in variables.items()}
    pieces = re.split(rf"({mark}[|()])", _render(tokenizer, shielded, f"{mark}(", f"{mark})"))
    if "".join(pieces[::2]) != _render(tokenizer, variables):
        raise UserError(
            "the tokenizer's chat template treats messages with the text of special tokens differently, "
            "so they cannot be kept apart; take texts such as '</think>' out of the messages"
        )
    ids: list[int] = []
    mask: list[bool] = []
    after: Literal["start", "special", "text"] = "start"
    for part, generated in _segments(pieces, tokenizer):
        part_ids = tokenizer.encode_piece(part, after) if isinstance(part, str) else [part]
        after = "text" if isinstance(part, str) else "special"
        ids += part_ids
        mask += [generated] * len(part_ids)
    return EncodedChat(ids, mask)


_PROBE: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The special token that the chat template ends an assistant's turn with; None if there is none."""
    try:
        chat = encode_chat(tokenizer, _PROBE)
        prompt = [] if any(chat.mask) else encode_chat(tokenizer, _PROBE[:1], None, True).ids
    except UserError:
        return None
    shared = next((i for i, (a, b) in enumerate(zip(prompt, chat.ids, strict=False)) if a != b), len(prompt))
    marked = [token_id for token_id, on in zip(chat.ids, chat.mask, strict=True) if on]
    ids = reversed(marked) if marked else chat.ids[shared:]
    return next((token_id for token_id in ids if token_id in tokenizer.control_ids), None)


def gives_loss_mask(tokenizer: Tokenizer) -> bool:
    """Whether the chat template has all that fine-tuning learns from: it marks what the assistant writes by
    `{% generation %}` blocks, and a special token ends its turn inside them."""
    try:
        chat = encode_chat(tokenizer, _PROBE)
    except UserError:
        return False
    marked = [token_id for token_id, on in zip(chat.ids, chat.mask, strict=True) if on]
    return len(marked) > 1 and marked[-1] in tokenizer.control_ids


def parse_tool_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """Take an assistant's text apart: (content, tool calls in OpenAI's form).

    The inverse of what the chat template writes. A call that is cut short or is not the JSON of one
    stays in the content as it is; nothing is raised. Ids number the calls of this text.
    """
    content = ""
    calls: list[dict[str, Any]] = []
    position = 0
    for start in re.finditer(r"\n?<tool_call>\s*", text):
        if start.start() < position:
            continue  # inside the call before
        try:
            data, end = _JSON.raw_decode(text, start.end())
            name, arguments = data["name"], data.get("arguments", {})
            if not (isinstance(name, str) and name and isinstance(arguments, dict)):
                continue
            written = json.dumps(arguments, ensure_ascii=False)
            (name + written).encode()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
        close = _CALL_END.match(text, end)
        if close is None:
            continue
        content += text[position : start.start()]
        position = close.end()
        function = {"name": name, "arguments": written}
        calls.append({"id": f"call_{len(calls)}", "type": "function", "function": function})
    return content + text[position:], calls


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_JSON = json.JSONDecoder(parse_constant=_refuse_constant)
# A call is whole without its closing tag if nothing follows: stop strings and stop ids cut there.
_CALL_END = re.compile(r"\s*(?:</tool_call>|\Z)")


# Messages, checked and brought into the form that templates expect.


def _template_variables(
    messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, add_generation_prompt: bool
) -> dict[str, Any]:
    if not messages:
        raise UserError("messages: empty; a conversation has at least one")
    return {
        "messages": [_checked_message(message, f"messages[{i}]") for i, message in enumerate(messages)],
        "tools": [_checked_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)] if tools else None,
        "add_generation_prompt": add_generation_prompt,
    }


def _checked_message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UserError(f"{where}: not an object with role and content")
    # transformers drops null fields too: templates test for missing ones
    checked = {key: value for key, value in message.items() if value is not None}
    role = checked.get("role")
    if role not in ROLES:
        raise UserError(f"{where}: role is {role!r}; it must be one of {', '.join(ROLES)}")
    calls = checked.pop("tool_calls", [])
    if calls != []:
        if role != "assistant":
            raise UserError(f"{where}: tool_calls in a message of role {role!r}; only assistants have them")
        if not isinstance(calls, list):
            raise UserError(f"{where}: tool_calls is not a list")
        checked["tool_calls"] = [_checked_call(c, f"{where}.tool_calls[{i}]") for i, c in enumerate(calls)]
    content = checked.get("content")
    if content is None and not calls:
        raise UserError(f"{where}: no content; only an assistant's message with tool_calls may lack it")
    if not isinstance(content, str | None):
        raise UserError(f"{where}: content is of type {type(content).__name__}; it must be a string or null")
    _check_json(checked, where)
    return checked


def _checked_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or call.get("type", "function") != "function":
        raise UserError(f'{where}: not of the form {{"type": "function", "function": {{...}}}}')
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}: function.name is missing or not a string")
    try:
        parsed = _JSON.decode(arguments) if isinstance(arguments, str) else None
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise UserError(f"{where}: function.arguments is not a string that holds a JSON object")
    return {**call, "type": "function", "function": {"name": name, "arguments": parsed}}


def _checked_tool(tool: Any, where: str) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(f'{where}: not of the form {{"type": "function", "function": {{"name": ...}}}}')
    _check_json(tool, where)
    return dict(tool)


def _check_json(value: Any, where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        before = error.object[max(0, error.start - 20) : error.start]
        raise UserError(
            f"{where}: {error.object[error.start]!a} after {before!r} is half of a surrogate pair and "
            "not valid Unicode; mend or remove it"
        ) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: cannot be written as JSON ({error})") from None


# Rendering.


class _GenerationBlocks(Extension):
    """`{% generation %}...{% endgeneration %}`: writes two variables, one at each border."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.Name(f"generation_{x}", "load")]) for x in ("begin", "end"))
        return nodes.Scope([begin, *body, end]).set_lineno(line)


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    """A template set up as transformers sets it up, so that the same text comes out."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _render(tokenizer: Tokenizer, variables: dict[str, Any], begin: str = "", end: str = "") -> str:
    """Render with `begin` and `end` written at the borders of generation blocks."""
    if tokenizer.chat_template is None:
        raise UserError("the tokenizer has no chat template; use the tokenizer of a chat model")
    context = {**tokenizer.special_tokens_map, **variables}
    try:
        template = _compiled(tokenizer.chat_template)
        return template.render(context, generation_begin=begin, generation_end=end)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise UserError(f"the chat template refuses these messages: {error}") from None


# Keeping texts apart from the template. A mark is written inside whatever reads like a special token, and
# between a text and its surroundings where the two could read like one. No special token is looked for
# across a mark. Other texts stay untouched, so that templates can trim and compare them.


def _unused_mark(text: str) -> str:
    # "f" occurs once in a mark, so that a text's end and a mark's begin never read like an earlier mark
    return next(mark for n in itertools.count() if (mark := f"fledge{n}") not in text)


@dataclass(frozen=True)
class _Patterns:
    """What the text of special tokens is found with; `token` captures it, `begin` is where one may start."""

    token: re.Pattern[str]
    begin: re.Pattern[str]
    heads: tuple[str, ...]
    tails: tuple[str, ...]


@lru_cache(maxsize=8)
def _patterns(tokens: tuple[str, ...]) -> _Patterns:
    # The longest first, as `tokenizers` does. A token of one character cannot be told from text.
    longest_first = sorted((token for token in tokens if len(token) > 1), key=len, reverse=True)
    any_of = "|".join(map(re.escape, longest_first)) or "(?!)"
    return _Patterns(
        token=re.compile(f"({any_of})"),
        begin=re.compile(f"(?={any_of}).", re.DOTALL),
        heads=tuple({token[:i] for token in longest_first for i in range(1, len(token))}),
        tails=tuple({token[i:] for token in longest_first for i in range(1, len(token))}),
    )


def _shielded(value: Any, tokens: tuple[str, ...], mark: str, structure: bool = False) -> Any:
    """A JSON value with marks in its strings. `structure`: a word that templates look up or compare."""
    if isinstance(value, str):
        return _shielded_text(value, tokens, mark, structure)
    if isinstance(value, Mapping):
        return {
            _shielded_text(key, tokens, mark, True): _shielded(item, tokens, mark, key in ("role", "type"))
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_shielded(item, tokens, mark) for item in value]
    return value


def _shielded_text(text: str, tokens: tuple[str, ...], mark: str, structure: bool) -> str:
    patterns = _patterns(tokens)
    inside = bool(text) and not structure and any(text in token for token in tokens)
    before = mark if inside or text.startswith(patterns.tails) else ""
    after = mark if inside or text.endswith(patterns.heads) else ""
    return before + patterns.begin.sub(rf"\g<0>{mark}", text) + after


def _segments(pieces: Sequence[str], tokenizer: Tokenizer) -> Iterator[tuple[str | int, bool]]:
    """(plain text or a special token's id, whether the assistant wrote it) from texts and marks in turn."""
    special = tokenizer.special_tokens
    token = _patterns(tuple(special)).token
    plain, generated = "", False
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            for j, part in enumerate(token.split(piece)):
                if j % 2 == 0:
                    plain += part
                    continue
                if plain:
                    yield plain, generated
                yield special[part], generated
                plain = ""
        elif piece[-1] != "|":
            if plain:
                yield plain, generated
            plain, generated = "", piece[-1] == "("
    if plain:
        yield plain, generated
