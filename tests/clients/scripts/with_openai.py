"""What the `openai` client gets from a server: `with_openai.py BASE_URL`; JSON on the last line."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

import openai
import pydantic

BASE_URL = sys.argv[1]
MODEL = "assistant"
HELLO: Any = [{"role": "user", "content": "Say hello."}]
COUNT: Any = [{"role": "user", "content": "Count to twelve."}]
WEATHER: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
PERSON: Any = [{"role": "user", "content": "A person as JSON."}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
client = openai.OpenAI(base_url=BASE_URL, api_key="any", max_retries=0)
ask = client.chat.completions.create


class Person(pydantic.BaseModel):
    name: str
    age: int


def plain() -> Any:
    whole = ask(model=MODEL, messages=HELLO, temperature=0)
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "hello."}]
    by_parts = ask(model=MODEL, messages=[{"role": "user", "content": parts}], temperature=0)  # type: ignore
    short = ask(model=MODEL, messages=COUNT, temperature=0, max_completion_tokens=3)
    several = ask(model=MODEL, messages=HELLO, n=3, seed=1, top_p=0.9, stop=["friend"])
    same = ask(model=MODEL, messages=HELLO, n=3, seed=1, top_p=0.9, stop=["friend"])
    return {
        "text": whole.choices[0].message.content,
        "reason": whole.choices[0].finish_reason,
        "usage": whole.usage.model_dump(exclude_none=True),
        "request_id": whole._request_id,
        "by_parts": by_parts.choices[0].message.content,
        "short": [short.choices[0].finish_reason, short.usage.completion_tokens],
        "several": [choice.message.content for choice in several.choices],
        "repeated": [choice.message.content for choice in same.choices],
    }


def logprobs() -> Any:
    made = ask(model=MODEL, messages=HELLO, temperature=0, logprobs=True, top_logprobs=3)
    tokens = made.choices[0].logprobs.content
    token_id = client.post(
        "/tokenize".replace("/", BASE_URL.removesuffix("v1"), 1), cast_to=object, body={"prompt": "Hello"}
    )["tokens"][0]
    biased = ask(model=MODEL, messages=HELLO, temperature=0, max_tokens=1, logit_bias={str(token_id): -100})
    return {
        "bytes": bytes(byte for token in tokens for byte in token.bytes or []).decode(),
        "best": [token.logprob == token.top_logprobs[0].logprob for token in tokens],
        "tops": [len(token.top_logprobs) for token in tokens],
        "biased": biased.choices[0].message.content,
        "text": made.choices[0].message.content,
    }


def models() -> Any:
    listed = client.models.list()
    return {"listed": [model.id for model in listed], "one": client.models.retrieve(MODEL).id}


def completions() -> Any:
    text = client.completions.create(model=MODEL, prompt="one two three", temperature=0, max_tokens=4)
    scored = client.completions.create(
        model=MODEL, prompt=["one two three", "one"], temperature=0, max_tokens=1, echo=True, logprobs=2
    )
    by_ids = client.completions.create(model=MODEL, prompt=[[5, 6, 7], [8, 9]], max_tokens=2, n=2, seed=3)
    with client.completions.create(
        model=MODEL, prompt="one two three", temperature=0, max_tokens=4, stream=True
    ) as stream:
        pieces = [chunk.choices[0].text for chunk in stream]
    first = scored.choices[0].logprobs
    return {
        "text": text.choices[0].text,
        "streamed": "".join(pieces),
        "echoed": [choice.text for choice in scored.choices],
        "joined": "".join(first.tokens),
        "unknown": first.token_logprobs[0],
        "lengths": [len(first.tokens), len(first.token_logprobs), len(first.top_logprobs)],
        "offsets": first.text_offset[:2],
        "indices": [choice.index for choice in by_ids.choices],
    }


def embeddings() -> Any:
    given = ["one two three", "Say hello.", "one two three"]
    coded = client.embeddings.create(model=MODEL, input=given)  # the client asks for base64
    plain = client.embeddings.create(model=MODEL, input=given, encoding_format="float")
    rows = [item.embedding for item in coded.data]
    others = [item.embedding for item in plain.data]
    return {
        "width": len(rows[0]),
        "norm": sum(x * x for x in rows[0]),
        "same": max(abs(a - b) for a, b in zip(rows[0], rows[2], strict=True)),
        "different": max(abs(a - b) for a, b in zip(rows[0], rows[1], strict=True)),
        "coded": max(abs(a - b) for a, b in zip(rows[1], others[1], strict=True)),
    }


def streams() -> Any:
    options: Any = {"include_usage": True}
    chunks = list(ask(model=MODEL, messages=HELLO, temperature=0, stream=True, stream_options=options))
    with_choice = [chunk.choices[0] for chunk in chunks if chunk.choices]
    with client.chat.completions.stream(model=MODEL, messages=COUNT, temperature=0) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion().choices[0]
    with ask(
        model=MODEL, messages=COUNT, stream=True, max_tokens=900, extra_body={"ignore_eos": True}
    ) as left:
        next(iter(left))  # and never again
    return {
        "ids": len({chunk.id for chunk in chunks}),
        "role": with_choice[0].delta.role,
        "roles": sum(choice.delta.role is not None for choice in with_choice),
        "text": "".join(choice.delta.content or "" for choice in with_choice),
        "reasons": [choice.finish_reason for choice in with_choice if choice.finish_reason],
        "usages": [chunk.usage is not None for chunk in chunks],
        "usage": chunks[-1].usage.model_dump(exclude_none=True),
        "kinds": sorted(set(kinds)),
        "final": [final.message.content, final.finish_reason],
    }


async def many() -> Any:
    async with openai.AsyncOpenAI(base_url=BASE_URL, api_key="any", max_retries=0) as other:

        async def whole(messages: Any) -> Any:
            made = await other.chat.completions.create(model=MODEL, messages=messages, temperature=0)
            return made.choices[0].message.content

        async def streamed(messages: Any) -> Any:
            stream = await other.chat.completions.create(
                model=MODEL, messages=messages, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        made = await asyncio.gather(*(form(m) for form in (whole, streamed) for m in (HELLO, COUNT) * 4))
        return {"texts": sorted(set(made)), "count": len(made)}


def tools() -> Any:
    def calls(message: Any) -> Any:
        return [[call.function.name, call.function.arguments] for call in message.tool_calls or []]

    first = ask(model=MODEL, messages=WEATHER, tools=[TOOL], temperature=0).choices[0]
    call = first.message.tool_calls[0]
    turns: Any = [
        *WEATHER, first.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "18 degrees"},
    ]  # fmt: skip
    both: Any = [{"role": "user", "content": "What is the weather in Paris and in Rome?"}]
    parallel = ask(model=MODEL, messages=both, tools=[TOOL], temperature=0).choices[0].message
    single = ask(model=MODEL, messages=both, tools=[TOOL], temperature=0, parallel_tool_calls=False)
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    forced = ask(model=MODEL, messages=WEATHER, tools=[TOOL], tool_choice=named, temperature=0)
    required = ask(model=MODEL, messages=WEATHER, tools=[TOOL], tool_choice="required", temperature=0)
    never = ask(model=MODEL, messages=HELLO, tools=[TOOL], tool_choice="none", temperature=0)
    with client.chat.completions.stream(model=MODEL, messages=both, tools=[TOOL], temperature=0) as stream:
        events = [event.type for event in stream]
        streamed = stream.get_final_completion().choices[0]
    return {
        "calls": calls(first.message),
        "content": first.message.content,
        "reason": first.finish_reason,
        "answer": ask(model=MODEL, messages=turns, tools=[TOOL], temperature=0).choices[0].message.content,
        "parallel": calls(parallel),
        "ids": len({call.id for call in parallel.tool_calls}),
        "single": calls(single.choices[0].message),
        "forced": calls(forced.choices[0].message),
        "required": calls(required.choices[0].message),
        "never": [never.choices[0].message.content, calls(never.choices[0].message)],
        "streamed": calls(streamed.message),
        "stream_reason": streamed.finish_reason,
        "events": sorted(set(events)),
    }


def parsed() -> Any:
    class GetWeather(pydantic.BaseModel):
        city: str

    tool = openai.pydantic_function_tool(GetWeather, name="get_weather")
    whole = client.chat.completions.parse(
        model=MODEL, messages=PERSON, response_format=Person, temperature=0, max_tokens=100
    )
    called = client.chat.completions.parse(
        model=MODEL, messages=WEATHER, tools=[tool], tool_choice="required", temperature=0, max_tokens=100
    )
    with client.chat.completions.stream(
        model=MODEL, messages=PERSON, response_format=Person, temperature=0, max_tokens=100
    ) as stream:
        streamed = stream.get_final_completion().choices[0].message.parsed
    free = ask(
        model=MODEL, messages=PERSON, response_format={"type": "json_object"}, temperature=0, max_tokens=100
    )
    cut = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=PERSON, response_format={"type": "json_object"}, max_tokens=2
    ).parse()
    try:
        client.chat.completions.parse(model=MODEL, messages=PERSON, response_format=Person, max_tokens=2)
        too_short = ""
    except openai.LengthFinishReasonError as error:
        too_short = type(error).__name__
    return {
        "whole": whole.choices[0].message.parsed.model_dump(),
        "kind": type(whole.choices[0].message.parsed).__name__,
        "called": called.choices[0].message.tool_calls[0].function.parsed_arguments.model_dump(),
        "streamed": streamed.model_dump(),
        "free": json.loads(free.choices[0].message.content),
        "cut": cut.choices[0].finish_reason,
        "too_short": too_short,
    }


def errors() -> Any:
    def caught(make: Callable[[], object]) -> Any:
        try:
            make()
        except openai.APIStatusError as error:
            return [type(error).__name__, error.status_code, error.param, error.code, bool(error.message)]
        return None

    ends = client.with_options(timeout=0.01)
    try:
        ends.chat.completions.create(model=MODEL, messages=COUNT, max_tokens=900, extra_body=ENDLESS)
        timeout = ""
    except openai.APITimeoutError as error:
        timeout = type(error).__name__
    far = [{"role": "user", "content": "one two " * 2000}]
    elsewhere = openai.OpenAI(base_url=BASE_URL.removesuffix("/v1") + "/v2", api_key="any", max_retries=0)
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=HELLO, extra_body={"colour": "blue"}, user="somebody"
    )
    return {
        "model": caught(lambda: ask(model="another", messages=HELLO)),
        "temperature": caught(lambda: ask(model=MODEL, messages=HELLO, temperature=-1)),
        "messages": caught(lambda: ask(model=MODEL, messages=[])),
        "role": caught(lambda: ask(model=MODEL, messages=[{"role": "king", "content": "x"}])),  # type: ignore
        "image": caught(lambda: ask(model=MODEL, messages=[{"role": "user", "content": [IMAGE]}])),
        "context": caught(lambda: ask(model=MODEL, messages=far)),  # type: ignore
        "streamed": caught(lambda: ask(model=MODEL, messages=far, stream=True)),  # type: ignore
        "suffix": caught(lambda: client.completions.create(model=MODEL, prompt="a", suffix="b")),
        "schema": caught(lambda: ask(model=MODEL, messages=HELLO, response_format=WRONG)),
        "path": caught(lambda: elsewhere.models.list()),
        "timeout": timeout,
        "warning": raw.headers.get("warning"),
    }


IMAGE: Any = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
WRONG: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
ENDLESS: Any = {"ignore_eos": True}


def main() -> None:
    checks = [plain, logprobs, models, completions, embeddings, streams, tools, parsed, errors]
    found = {check.__name__: check() for check in checks}
    found["many"] = asyncio.run(many())
    print(json.dumps(found))


main()
