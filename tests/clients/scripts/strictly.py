"""Every form of answer against the `openai` package's own models: `strictly.py BASE_URL`.

JSON on the last line: by case what does not fit (with strict types) and the fields that those models lack.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import httpx2
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.shared import ErrorObject
from pydantic import BaseModel, ValidationError

client = httpx2.Client(base_url=sys.argv[1], timeout=60)
SAY: Any = {"messages": [{"role": "user", "content": "Say hello."}], "temperature": 0}
CALL: Any = {
    "messages": [{"role": "user", "content": "What is the weather in Paris and in Rome?"}],
    "temperature": 0,
    "tools": [{"type": "function", "function": {"name": "get_weather", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}],
}  # fmt: skip
FORM: Any = {
    "messages": [{"role": "user", "content": "A person as JSON."}], "max_tokens": 100,
    "response_format": {"type": "json_object"},
}  # fmt: skip
TEXT: Any = {"prompt": "one two three", "max_tokens": 4}
USAGE: Any = {"stream_options": {"include_usage": True}}
EXTRAS: Any = {"return_token_ids": True, "prompt_logprobs": 2}
CHATS = {
    "plain": SAY,
    "several": {**SAY, "n": 2, "temperature": 1.0},
    "scored": {**SAY, "logprobs": True, "top_logprobs": 2},
    "cut": {**SAY, "max_tokens": 1},
    "called": CALL,
    "required": {**CALL, "tool_choice": "required", "logprobs": True},
    "form": FORM,
    "usage": {**SAY, **USAGE},
    "extras": {**SAY, **EXTRAS},
}
TEXTS = {
    "plain": TEXT,
    "ids": {**TEXT, "prompt": [[5, 6], [7]], "n": 2, "best_of": 2},
    "scored": {**TEXT, "logprobs": 2, "echo": True},
    "only scored": {**TEXT, "logprobs": 0, "echo": True, "max_tokens": 0},
    "usage": {**TEXT, **USAGE},
    "extras": {**TEXT, **EXTRAS},
}
WRONG: Any = {
    "chat": ("/chat/completions", {**SAY, "temperature": 9e9, "n": 0}),
    "text": ("/completions", {"prompt": 7}),
    "model": ("/chat/completions", {**SAY, "model": "another"}),
    "json": ("/chat/completions", None),
    "path": ("/nothing", {}),
    "method": ("/models", {}),
    "embeddings": ("/embeddings", {"input": []}),
}


def extras(value: Any, place: str = "") -> Iterator[str]:
    """Names of fields that a model of the package does not have."""
    if isinstance(value, BaseModel):
        yield from (f"{place}{name}" for name in value.model_extra or {})
        for name in type(value).model_fields:
            yield from extras(getattr(value, name), f"{place}{name}.")
    elif isinstance(value, list):
        for one in value:
            yield from extras(one, place)


def checked(kind: type[BaseModel], data: Any, is_chunk: bool = False) -> tuple[list[str], set[str]]:
    """What is wrong with an answer, and what it has in addition."""
    if kind is Completion:
        allow(data, is_chunk)
    try:
        return [], set(extras(kind.model_validate_json(json.dumps(data), strict=True)))
    except ValidationError as error:
        return [str(error)], set()


def allow(data: Any, is_chunk: bool) -> None:
    """What OpenAI's own server says too, but the package's `Completion` does not have."""
    for choice in data["choices"]:
        if is_chunk:  # of a text's stream: no reason before the end
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        scored = choice["logprobs"]
        if scored and scored["text_offset"][0] == 0 and scored["token_logprobs"][0] is None:
            # Nothing stands before an echoed prompt's first token.
            assert scored["top_logprobs"][0] is None
            scored["token_logprobs"][0], scored["top_logprobs"][0] = 0.0, {}


def posted(path: str, body: Any) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json" and "warning" not in answer.headers
    return answer.json()


def streamed(path: str, body: Any) -> list[Any]:
    answer = client.post(path, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done, end = answer.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def main() -> None:
    found: dict[str, Any] = {}
    # Errors by case, and the extras of all.
    for path, cases, whole, chunk in (
        ("/chat/completions", CHATS, ChatCompletion, ChatCompletionChunk),
        ("/completions", TEXTS, Completion, Completion),
    ):
        for name, body in cases.items():
            found[f"{path} {name}"] = checked(whole, posted(path, body))
            if "best_of" in body:
                continue
            chunks = [checked(chunk, data, True) for data in streamed(path, body)]
            wrong = [text for texts, _ in chunks for text in texts]
            found[f"{path} {name}, streamed"] = wrong, set().union(*(more for _, more in chunks))
    found["models"] = checked(Model, client.get("/models").json()["data"][0])
    vectors = posted("/embeddings", {"input": ["one", "two"], "model": "assistant"})
    found["embeddings"] = checked(CreateEmbeddingResponse, vectors)
    for name, (path, body) in WRONG.items():
        answer = client.post(path, **({"json": body} if body is not None else {"content": b"{]"}))
        found[f"error {name}"] = checked(ErrorObject, answer.json().get("error"))
        assert 400 <= answer.status_code < 500, answer.text
    print(json.dumps({name: [wrong, sorted(more)] for name, (wrong, more) in found.items()}))


main()
