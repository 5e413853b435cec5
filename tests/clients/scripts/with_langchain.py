"""What LangChain's ChatOpenAI gets from a server: `with_langchain.py BASE_URL`; JSON on the last line."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import pydantic
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI

BASE_URL = sys.argv[1]
model = ChatOpenAI(model="assistant", base_url=BASE_URL, api_key="any", temperature=0, max_retries=0)


class Person(pydantic.BaseModel):
    """A person."""

    name: str
    age: int


class get_weather(pydantic.BaseModel):
    """The weather of a city."""

    city: str


def answers() -> Any:
    whole = model.invoke("Say hello.")
    kind = model.invoke([SystemMessage("Be kind."), HumanMessage("Count to twelve.")])
    scored = model.bind(logprobs=True, top_logprobs=2).invoke("Say hello.")
    chunks = list(model.stream("Count to twelve.", stream_usage=True))
    return {
        "text": whole.content,
        "reason": whole.response_metadata["finish_reason"],
        "usage": whole.usage_metadata["total_tokens"]
        == sum(whole.usage_metadata[name] for name in ("input_tokens", "output_tokens")),
        "kind": kind.content,
        "scored": len(scored.response_metadata["logprobs"]["content"]),
        "streamed": "".join(chunk.content for chunk in chunks),
        "pieces": len(chunks) > 3,
        "counted": [chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata],
        "batch": [message.content for message in model.batch(["Say hello.", "Count to twelve."])],
        "later": asyncio.run(later()),
        "completion": OpenAI(
            model="assistant", base_url=BASE_URL, api_key="any", temperature=0, max_tokens=2, max_retries=0
        ).invoke("one two three"),
    }


async def later() -> Any:
    whole = await model.ainvoke("Say hello.")
    return [whole.content, "".join([chunk.content async for chunk in model.astream("Say hello.")])]


def tools() -> Any:
    able = model.bind_tools([get_weather])
    turns: list[Any] = [HumanMessage("What is the weather in Paris?")]
    first = able.invoke(turns)
    turns += [first, ToolMessage("18 degrees", tool_call_id=first.tool_calls[0]["id"])]
    streamed = None
    for chunk in able.stream("What is the weather in Paris and in Rome?"):
        streamed = chunk if streamed is None else streamed + chunk
    forced = model.bind_tools([get_weather], tool_choice="get_weather").invoke(turns[:1])
    return {
        "calls": [[call["name"], call["args"]] for call in first.tool_calls],
        "answer": able.invoke(turns).content,
        "streamed": [[call["name"], call["args"]] for call in streamed.tool_calls],
        "forced": [[call["name"], call["args"]] for call in forced.tool_calls],
    }


def structured() -> Any:
    def made(form: Any, method: Any, question: str) -> Any:
        found = model.with_structured_output(form, method=method, include_raw=True).invoke(question)
        parsed = found["parsed"]
        return [str(found["parsing_error"]), parsed.model_dump() if isinstance(parsed, form) else parsed]

    return {
        "json_schema": made(Person, "json_schema", "A person as JSON."),
        "json_mode": made(Person, "json_mode", "A person as JSON."),
        "function_calling": made(get_weather, "function_calling", "What is the weather in Paris?"),
    }


print(json.dumps({check.__name__: check() for check in (answers, tools, structured)}))
