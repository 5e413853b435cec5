"""A server without a model that speaks the same protocol: what it answers depends on the message alone."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from fledge.serve.page import page_routes

from ..on_a_port import on_a_port

HOSTILE = """\
<script>window.pwned = 1; alert(1)</script><img src="http://evil.example/x.png" onerror="window.pwned = 2">
<svg onload="window.pwned = 3"><iframe srcdoc="<script>parent.pwned = 4</script>"></iframe>
[click](javascript:window.pwned=5) ![x](http://evil.example/pixel.png) <a href="//evil.example">x</a>
<style>* { display: none !important }</style><meta http-equiv="refresh" content="0;url=http://evil.example/">
</script></textarea></template></div></main><script>window.pwned = 6</script>
<form action="http://evil.example"><button autofocus onfocus="window.pwned = 7">x</button></form>
bidi: access\u202e level\u2066 is\u2069 none; hidden: a\u200bb\U000e0041; control: \x1b[31mred\x07

```js"onload="window.pwned=8
</code></pre><script>window.pwned = 9</script>
```

> > > > > > > > > > > > > > > > deep
"""
MARKDOWN = """\
## Capitals

The capital of **France** is *Paris*; `len("x")` is code, ~~this~~ is not. A [link](https://example.org/a_b_c).
A second line with 2 * 3 * 4 and snake_case_name.

1. First
2. Second
   - inner **one**
   - inner two

| country | capital |
|:--|--:|
| France | Paris |

```python
def f(x):
    return x ** 2  # <b>
```

> Quoted *text*

---
End.
"""
CALLS = [("get_weather", '{"city": "Paris"}'), ("get_time", '{"zone": "CET"}')]


def words_of(text: str) -> list[str]:
    """Cut into tokens: a space or line break goes with the word behind it."""
    made: list[str] = []
    for letter in text:
        if made and not (letter in " \n" or len(made[-1]) > 8):
            made[-1] += letter
        else:
            made.append(letter)
    return made


def entry(raw: bytes, text: str | None = None, place: int = 0) -> dict[str, Any]:
    """A token as log-probabilities tell of it, with candidates: itself at 60%, and others."""

    def one(data: bytes, p: float) -> dict[str, Any]:
        shown = text if text is not None and data == raw else data.decode(errors="replace")
        return {"token": shown, "logprob": math.log(p), "bytes": list(data)}

    others = [b" London", b" Lyon", b"\xc3", b"\n", b" the", b"<b>", " \u202e".encode(), b" a", b" no"]
    p = 0.6 if place % 3 else 0.97
    rest = [one(data, (1 - p) * 0.5**rank * 0.5) for rank, data in enumerate(others, 1)]
    top = [one(raw, p), *[other for other in rest if other["bytes"] != list(raw)]]
    if place % 3:
        top[2:2] = [{"token": "<|im_end|>", "logprob": math.log(0.06), "bytes": None}]
    return {**one(raw, p), "top_logprobs": top}


@dataclass
class Scripted:
    """What the tests ask of the server, and what it was asked."""

    corrections: Path | None = None
    models: tuple[str, ...] = ("tiny",)
    key: str | None = None
    delay: float = 0.0
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    fails: int = 1

    def app(self) -> Starlette:
        routes = [
            *page_routes(self.models, self.corrections),
            Route("/v1/models", self.list_models),
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
        ]
        return Starlette(routes=routes)

    def refused(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return _error("this server needs an API key", 401)

    async def list_models(self, request: Request) -> Response:
        shared = {"object": "model", "created": 0, "owned_by": "fledge"}
        listed = [{"id": name, **shared, "kind": "chat"} for name in self.models]
        listed.append({"id": "judge", **shared, "kind": "reward"})  # answers nothing
        return self.refused(request) or JSONResponse({"object": "list", "data": listed})

    async def complete(self, request: Request) -> Response:
        if answer := self.refused(request):
            return answer
        body = await request.json()
        self.requests.append(body)
        asked = next(m["content"] for m in reversed(body["messages"]) if m["role"] in ("user", "tool"))
        if asked == "busy" and self.fails > 0:
            self.fails -= 1
            return _error("64 requests wait already", 429, {"retry-after": "2"})
        return StreamingResponse(self.stream(body, asked, request), media_type="text/event-stream")

    async def stream(self, body: dict[str, Any], asked: str, request: Request) -> AsyncIterator[bytes]:
        yield _event(body, {"role": "assistant", "content": ""})
        try:
            async for part in self.parts(body, asked):
                if isinstance(part, str):
                    yield part.encode()
                    return
                delta, tokens, reason = part
                yield _event(body, delta, tokens, reason)
                await asyncio.sleep(self.delay)
        except asyncio.CancelledError:
            self.gone.append(asked)
            raise
        usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
        yield b"data: " + json.dumps({**_head(body), "choices": [], "usage": usage}).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"

    async def parts(self, body: dict[str, Any], asked: str) -> AsyncIterator[Any]:
        """Deltas with the tokens that made them and the finish reason, or raw bytes that end the stream."""
        texts = {"hostile": HOSTILE, "markdown": MARKDOWN, "line": "x" * 100_000, "empty": ""}
        text = texts.get(asked, f"{body['model']} says: the capital of France is Paris.")
        if body.get("continue_final_message"):
            text = " Then it goes on."
        if asked == "slow":
            for number in range(10_000):
                yield {"content": f" {number}"}, [entry(f" {number}".encode())], None
                await asyncio.sleep(0.02)
        if asked == "tool" and body["messages"][-1]["role"] == "user":
            yield {"content": "Let me see."}, [entry(b"Let me see.")], None
            for index, (name, arguments) in enumerate(CALLS):
                call = {"index": index, "id": f"call_{index}", "type": "function"}
                yield {"tool_calls": [{**call, "function": {"name": name, "arguments": ""}}]}, [], None
                for piece in (arguments[:6], arguments[6:]):
                    made = [entry(piece.encode())]
                    yield {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}, made, None
            yield {}, [], "tool_calls"
            return
        if asked == "bytes":
            yield {"content": "Price: "}, [entry(b"Price: ")], None
            for byte, shown in zip("€".encode(), ("", "", "€"), strict=True):
                yield {"content": shown} if shown else {}, [entry(bytes([byte]), f"\\x{byte:02x}")], None
            text = " paid"
        for place, word in enumerate(words_of(text) if asked != "line" else [text]):
            yield {"content": word}, [entry(word.encode(), place=place)], None
            if asked in ("midway", "lost") and place == 3 and self.fails > 0:
                self.fails -= 1
                told = json.dumps({"error": {"message": "the model broke down", "code": None}})
                yield f"data: {told}\n\n" if asked == "midway" else ""
        end = {"token": "<|im_end|>", "logprob": math.log(0.9), "bytes": None, "top_logprobs": []}
        yield {}, [end], "length" if asked == "cut" else "stop"


def _head(body: dict[str, Any]) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 0, "model": body["model"]}


def _event(body: dict[str, Any], delta: dict[str, Any], tokens: Any = (), reason: str | None = None) -> bytes:
    logprobs = {"content": list(tokens), "refusal": None} if tokens else None
    choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
    return b"data: " + json.dumps({**_head(body), "choices": [choice]}).encode() + b"\n\n"


def _error(message: str, status: int, headers: dict[str, str] | None = None) -> Response:
    error = {"message": message, "type": "error", "param": None, "code": None}
    return JSONResponse({"error": error}, status, headers)


@contextmanager
def served(made: Scripted) -> Iterator[Scripted]:
    """The page and the script behind a real server, on a free port of loopback."""
    with on_a_port(made.app()) as made.url:
        yield made


# --- what a reader does ---------------------------------------------------------------------------

PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
ANSWER = "tiny says: the capital of France is Paris."


def say(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.wait_for_selector("#send:visible")


def answers(page: Any) -> list[str]:
    return [text.strip() for text in page.locator(".answer .parts").all_inner_texts()]


def texts(messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]
