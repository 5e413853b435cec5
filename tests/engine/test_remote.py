"""A chat model behind an OpenAI-compatible endpoint: what is sent, what comes back, what goes wrong."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from fledge.engine.remote import TRIES, EndpointError, RemoteChat
from fledge.errors import UserError
from fledge.types import Message, SamplingParams

ASKED: list[Message] = [{"role": "user", "content": "Hello?"}]


def answering(text: str, reason: str = "stop") -> httpx2.Response:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
    return httpx2.Response(200, json={"object": "chat.completion", "choices": [choice]})


def remote(handler: Callable[[httpx2.Request], httpx2.Response], **settings: Any) -> RemoteChat:
    transport = httpx2.MockTransport(handler)
    return RemoteChat("http://models.example/v1/", "m", transport=transport, sleep=lambda _: None, **settings)


def test_a_request_has_openais_form() -> None:
    seen: list[httpx2.Request] = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        seen.append(request)
        return answering("Hi.", "length")

    params = SamplingParams(
        temperature=0.5, top_p=0.9, max_tokens=7, seed=3, stop=("x",), presence_penalty=0.1
    )
    made = remote(handler, key="secret").reply(ASKED, params)
    assert (made.text, made.finish_reason, made.ids) == ("Hi.", "length", [])
    assert str(seen[0].url) == "http://models.example/v1/chat/completions"
    assert seen[0].headers["authorization"] == "Bearer secret"
    assert json.loads(seen[0].content) == {
        "model": "m", "messages": ASKED, "temperature": 0.5, "top_p": 0.9, "max_tokens": 7, "seed": 3,
        "stop": ["x"], "presence_penalty": 0.1,
    }  # fmt: skip


def test_n_replies_are_n_requests_with_seeds_of_their_own() -> None:
    seeds, lock = [], threading.Lock()

    def handler(request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content)
        with lock:
            seeds.append(body["seed"])
        return answering(f"{body['messages'][0]['content']} {body['seed']}")

    conversations: list[list[Message]] = [[{"role": "user", "content": text}] for text in "ab"]
    made = remote(handler).replies(conversations, SamplingParams(seed=10, n=3))
    assert [one.text for one in made] == ["a 10", "a 11", "a 12", "b 13", "b 14", "b 15"]
    assert sorted(seeds) == list(range(10, 16))


def test_what_passes_is_tried_again() -> None:
    answers = iter([httpx2.Response(503), httpx2.Response(429), answering("at last")])
    assert remote(lambda _: next(answers)).reply(ASKED, SamplingParams()).text == "at last"


def test_an_endpoint_that_is_down_is_told_from_a_prompt_that_is_refused() -> None:
    tries = []

    def down(request: httpx2.Request) -> httpx2.Response:
        tries.append(request)
        raise httpx2.ConnectError("refused")

    with pytest.raises(EndpointError, match="refused"):
        remote(down).reply(ASKED, SamplingParams())
    assert len(tries) == TRIES
    too_long = httpx2.Response(400, json={"error": {"message": "the prompt\nis too long"}})
    with pytest.raises(UserError, match="400: the prompt is too long") as error:
        remote(lambda _: too_long).reply(ASKED, SamplingParams())
    assert not isinstance(error.value, EndpointError)
    with pytest.raises(EndpointError, match="give a key"):
        remote(lambda _: httpx2.Response(401, text="no")).reply(ASKED, SamplingParams())


@pytest.mark.parametrize(
    "content", ["<html>", "[]", "{}", '{"choices": []}', '{"choices": [{"message": {"content": 3}}]}']
)
def test_what_is_no_chat_completion_is_one_line(content: str) -> None:
    with pytest.raises(UserError) as error:
        remote(lambda _: httpx2.Response(200, text=content)).reply(ASKED, SamplingParams())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("endpoint", ["models.example", "ftp://models.example", "/v1", "http://"])
def test_an_address_that_is_none(endpoint: str) -> None:
    with pytest.raises(UserError, match="--endpoint"):
        RemoteChat(endpoint, "m")


def test_a_stream_gives_the_pieces() -> None:
    pieces = [{"choices": [{"delta": {"content": text}}]} for text in ("Hel", "lo", None)]
    lines = [
        ": comment",
        *(f"data: {json.dumps(piece)}" for piece in [*pieces, {"usage": {}}]),
        "data: [DONE]",
    ]
    text = "\n\n".join([*lines, 'data: {"choices": [{"delta": {"content": "never"}}]}'])
    chat = remote(lambda _: httpx2.Response(200, text=text))
    assert list(chat.stream(ASKED, SamplingParams())) == ["Hel", "lo"]
    with pytest.raises(UserError, match="404"):
        list(remote(lambda _: httpx2.Response(404, text="none")).stream(ASKED, SamplingParams()))


def test_a_stream_tells_why_it_ended_and_what_went_wrong() -> None:
    def handler(request: httpx2.Request) -> httpx2.Response:
        asked = json.loads(request.content)["messages"][0]["content"]
        piece = {"choices": [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": None}]}
        end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}
        error = {"error": {"message": "the server is stopping", "type": "server_error"}}
        usage = {"choices": [], "usage": {"total_tokens": 3}}
        last = error if asked == "fail" else end
        lines = [f"data: {json.dumps(one)}\n\n" for one in (piece, last, usage)]
        return httpx2.Response(200, text="".join([*lines, "data: [DONE]\n\n"]))

    chat = remote(handler)
    stream = chat.stream_reply([{"role": "user", "content": "hello"}], SamplingParams())
    assert next(stream) == "Hi"
    with pytest.raises(StopIteration) as end:
        next(stream)
    assert (end.value.value.text, end.value.value.finish_reason) == ("Hi", "length")
    with pytest.raises(UserError, match="the server is stopping"):
        list(chat.stream([{"role": "user", "content": "fail"}], SamplingParams()))
