"""Models of another server: offered as the own ones are, and passed on unchanged."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from fledge.errors import UserError
from fledge.serve.relay import Endpoint, Relay
from fledge.serve.running import new_server
from fledge.web.listening import address_of, listen

from .real import Serving, events, load, make_tokenizer, save_random_model, serving

# A request whose stream does not end by itself.
LONG = {"prompt": "The", "model": "far", "max_tokens": 4000, "ignore_eos": True, "stream": True}
ASK = [{"role": "user", "content": "The cats sat"}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "far"
    save_random_model(path, make_tokenizer(), context=4096)
    return path


@pytest.fixture
def pair(directory: Path) -> Iterator[tuple[Serving, Serving]]:
    """A server that wants a key, and one that passes on to it."""
    with serving(load(directory, "far"), keys=("far-away-key",)) as far:
        relay = Relay(Endpoint(f"{far.url}/v1", "far-away-key"))
        with serving(load(directory, "near"), relay=relay) as near:
            yield far, near


def test_requests_are_passed_on(pair: tuple[Serving, Serving]) -> None:
    near = pair[1]
    with near.client() as client:
        assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["near", "far"]
        assert client.get("/v1/models/far").json()["max_model_len"] == 4096
    body = {"messages": ASK, "max_tokens": 8, "temperature": 0}
    answers = [near.post("/v1/chat/completions", {**body, "model": name}).json() for name in ("near", "far")]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[1]["model"] == "far"
    lines = events(near.post("/v1/chat/completions", {**body, "model": "far", "stream": True}))
    text = "".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines[:-1])
    assert text == answers[0]["choices"][0]["message"]["content"]
    refused = near.post("/v1/chat/completions", {**body, "model": "far", "top_logprobs": 1})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "top_logprobs"
    assert near.post("/v1/embeddings", {"model": "far", "input": "x"}).status_code == 200


def test_who_goes_is_gone_there_too(pair: tuple[Serving, Serving]) -> None:
    far, near = pair
    with near.client() as client, client.stream("POST", "/v1/completions", json=LONG) as response:
        lines = response.iter_lines()
        next(lines)
        assert far.service.live["far"] == 1
    far.until_idle()


def test_an_endpoint_that_ends(directory: Path) -> None:
    with serving(load(directory, "far")) as far:
        relay = Relay(Endpoint(f"{far.url}/v1"))
    with serving(load(directory, "near"), relay=relay) as near:
        response = near.post("/v1/completions", {"model": "far", "prompt": "The"})
        assert response.status_code == 502 and response.json()["error"]["code"] == "bad_gateway"


def test_an_endpoint_that_breaks_off_in_mid_stream(pair: tuple[Serving, Serving]) -> None:
    far, near = pair
    with near.client() as client, client.stream("POST", "/v1/completions", json=LONG) as response:
        lines = response.iter_lines()
        next(lines)
        for connection in list(far.server.server_state.connections):
            connection.loop.call_soon_threadsafe(connection.transport.abort)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "bad_gateway"


def test_how_many_at_once_is_the_endpoints_affair(directory: Path) -> None:
    """It answers none of its requests before all are there."""
    count, all_there = 120, asyncio.Event()
    waiting: list[Request] = []

    async def models(request: Request) -> JSONResponse:
        return JSONResponse({"data": [{"id": "far"}]})

    async def complete(request: Request) -> JSONResponse:
        waiting.append(request)
        if len(waiting) == count:
            all_there.set()
        await all_there.wait()
        return JSONResponse({"choices": []})

    async def ask(url: str) -> list[int]:
        unlimited = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=url, timeout=60, limits=unlimited) as client:
            body = {"model": "far", "prompt": "The"}
            asked = [client.post("/v1/completions", json=body) for _ in range(count)]
            return [answer.status_code for answer in await asyncio.gather(*asked)]

    routes = [Route("/v1/models", models), Route("/v1/completions", complete, methods=["POST"])]
    listening = listen("127.0.0.1", 0)
    server = new_server(Starlette(routes=routes), 1.0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
    thread.start()
    try:
        with serving(relay=Relay(Endpoint(f"{address_of(listening)}/v1"))) as near:
            assert asyncio.run(ask(near.url)) == [200] * count
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()


@pytest.mark.parametrize(("status", "text"), [(404, "{}"), (200, "no JSON"), (200, '{"data": 3}')])
def test_what_is_no_endpoint(status: int, text: str) -> None:
    transport = httpx2.MockTransport(lambda request: httpx2.Response(status, text=text))
    with pytest.raises(UserError, match="no list of models"):
        Endpoint("http://far.example/v1", transport=transport)


def test_a_stream_of_another_server_is_told_when_this_one_ends(directory: Path) -> None:
    with serving(load(directory, "far")) as far:
        relay = Relay(Endpoint(f"{far.url}/v1"))
        with (
            serving(load(directory, "near"), relay=relay, stop_seconds=0.3) as near,
            near.client() as client,
            client.stream("POST", "/v1/completions", json=LONG) as response,
        ):
            lines = response.iter_lines()
            next(lines)
            near.server.should_exit = True
            rest = [line for line in lines if line]
        far.until_idle()
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "shutting_down"


def test_what_another_server_is_asked_is_its_affair(pair: tuple[Serving, Serving]) -> None:
    """Settings that this server does not take are that one's to judge; other addresses are not passed on."""
    near = pair[1]
    refused = near.post("/v1/completions", {"model": "far", "prompt": "The", "suffix": "end"})
    assert "suffix" in refused.json()["error"]["message"]
    assert (
        near.post("/tokenize", {"model": "far", "prompt": "The"})
        .json()["error"]["message"]
        .endswith("is another server's model, and this address is not passed on")
    )
