"""A chat model behind an OpenAI-compatible endpoint: what is sent, what comes back, what goes wrong."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from fledge.engine.remote import TRIES, EndpointError, RemoteChat, endpoint_key, num_tokens
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
    tries: list[httpx2.Request | None] = []

    def down(request: httpx2.Request) -> httpx2.Response:
        tries.append(request)
        raise httpx2.ConnectError("refused")

    with pytest.raises(EndpointError, match="refused"):
        remote(down).reply(ASKED, SamplingParams())
    assert len(tries) == 1  # nobody has ever answered there

    def gone(request: httpx2.Request) -> httpx2.Response:
        return answering("Hi.") if not tries else down(request)

    tries.clear()
    chat = remote(gone)
    assert chat.reply(ASKED, SamplingParams()).text == "Hi."
    tries.append(None)
    with pytest.raises(EndpointError, match="refused"):
        chat.reply(ASKED, SamplingParams())
    assert len(tries) == 1 + TRIES
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


def test_the_pause_is_the_one_that_the_server_wishes() -> None:
    wishes = ["7", "0.5", "3600", None, "Wed, 21 Oct 2015 07:28:00 GMT", "nan"]
    for wish, pause in zip(wishes, [7, 0.5, 2, 2, 2, 2], strict=True):
        headers = {} if wish is None else {"retry-after": wish}
        answers = iter([httpx2.Response(429, headers=headers), answering("at last")])
        chat, pauses = remote(lambda _, answers=answers: next(answers)), list[float]()
        chat.sleep = pauses.append
        assert chat.reply(ASKED, SamplingParams()).text == "at last"
        assert pauses == [pause]


def test_a_busy_server_is_asked_for_longer_where_it_says_when() -> None:
    """Many requests at once push each other away more than a few times."""
    busy = [httpx2.Response(429, headers={"retry-after": "1"})] * 20
    answers = iter([*busy, answering("at last")])
    assert remote(lambda _: next(answers)).reply(ASKED, SamplingParams()).text == "at last"
    tries = []

    def spent(request: httpx2.Request) -> httpx2.Response:
        tries.append(request)
        return httpx2.Response(429, json={"error": {"message": "quota"}})

    with pytest.raises(EndpointError, match="429: quota"):
        remote(spent).reply(ASKED, SamplingParams())
    assert len(tries) == TRIES


def test_a_request_that_breaks_the_server_is_at_fault_itself() -> None:
    with pytest.raises(UserError, match="500: oops") as error:
        remote(lambda _: httpx2.Response(500, text="oops")).reply(ASKED, SamplingParams())
    assert not isinstance(error.value, EndpointError)
    steering = httpx2.Response(400, json={"error": {"message": "a\x1b]0;p\x07b\nc"}})
    with pytest.raises(UserError, match=r"400: a\]0;pb c$"):
        remote(lambda _: steering).reply(ASKED, SamplingParams())
    with pytest.raises(EndpointError, match="503"):
        remote(lambda _: httpx2.Response(503)).reply(ASKED, SamplingParams())


def test_a_text_is_continued() -> None:
    seen: list[httpx2.Request] = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        seen.append(request)
        if request.url.path.endswith("/chat/completions"):
            return answering("A chat.")
        choice = {"index": 0, "text": " time", "finish_reason": "length"}
        return httpx2.Response(200, json={"choices": [choice], "usage": {"completion_tokens": 5}})

    chat = remote(handler)
    chat.parallel = 1
    text, answer = chat.replies(["Once upon a", ASKED], SamplingParams(temperature=0, max_tokens=5))
    assert (text.text, text.finish_reason, num_tokens(text)) == (" time", "length", 5)
    assert (answer.text, num_tokens(answer)) == ("A chat.", None)
    assert str(seen[0].url) == "http://models.example/v1/completions"
    assert json.loads(seen[0].content) == {
        "model": "m", "prompt": "Once upon a", "temperature": 0, "max_tokens": 5, "seed": 0
    }  # fmt: skip
    with pytest.raises(EndpointError, match=r"404.*ask in chats"):
        remote(lambda _: httpx2.Response(404, text="no")).reply("Once", SamplingParams())
    with pytest.raises(UserError, match="no text completion"):
        remote(lambda _: answering("Hi.")).reply("Once", SamplingParams())
    with pytest.raises(UserError, match="surrogate"):
        chat.reply("caf\udce9", SamplingParams())


def test_requests_go_out_together_and_answers_keep_the_order() -> None:
    """As many as may be under way wait for each other; what is asked first is answered last."""
    together, lock, begun = threading.Barrier(4), threading.Lock(), list[str]()

    def handler(request: httpx2.Request) -> httpx2.Response:
        asked = json.loads(request.content)["prompt"]
        with lock:
            begun.append(asked)
        together.wait(10)
        return httpx2.Response(200, json={"choices": [{"text": asked}]})

    asked = [str(i) for i in range(12)]
    made = remote(handler, parallel=4).replies(asked, SamplingParams())
    assert [one.text for one in made] == asked and sorted(begun, key=int) == asked


def test_an_error_begins_nothing_more() -> None:
    begun: list[str] = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        begun.append(json.loads(request.content)["prompt"])
        return httpx2.Response(400, json={"error": {"message": "too long"}})

    with pytest.raises(UserError, match="400: too long"):
        remote(handler, parallel=2).replies(["a"] * 1000, SamplingParams())
    assert len(begun) < 500


def test_a_key_is_never_shown() -> None:
    assert endpoint_key(None, {}) is None
    assert endpoint_key("KEY", {"KEY": "sk-1\r\n"}) == "sk-1"
    for value in ("sk-\u00e9-hidden", "sk-1\nhidden", "Bearer hidden", "hidden\x00"):
        with pytest.raises(UserError, match="--endpoint-key KEY") as error:
            endpoint_key("KEY", {"KEY": value})
        assert "hidden" not in str(error.value)
    with pytest.raises(UserError, match="--endpoint-key") as error:
        RemoteChat("http://me:hidden@models.example/v1", "m")
    assert "hidden" not in str(error.value)


def test_a_key_that_a_server_repeats_is_not_shown() -> None:
    """Not even a part of it, where its words are cut."""
    key = "sk-" + "hidden" * 50
    words = "x" * 150 + f" {key} is no key"
    said = [
        httpx2.Response(401, json={"error": {"message": words}}),
        httpx2.Response(400, text=words),
        httpx2.Response(200, json={"error": words}),
        httpx2.Response(307, headers={"location": f"/login?key={key}"}),
    ]
    for answer in said:
        with pytest.raises(UserError, match="the key") as error:
            remote(lambda _, answer=answer: answer, key=key).reply(ASKED, SamplingParams())
        assert "hidden" not in str(error.value)
    event = f"data: {json.dumps({'error': {'message': words}})}\n\n"
    for answer in (httpx2.Response(200, text=event), httpx2.Response(400, text=words)):
        with pytest.raises(UserError, match="the key") as error:
            list(remote(lambda _, answer=answer: answer, key=key).stream(ASKED, SamplingParams()))
        assert "hidden" not in str(error.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (httpx2.Response(402, json={"error": {"message": "no credit"}}), "402: no credit"),
        (httpx2.Response(308, headers={"location": "https://models.example/v1"}), "https://models.*another"),
        (httpx2.Response(204), "204: No Content"),
    ],
)
def test_what_every_request_would_get_is_the_endpoints(answer: httpx2.Response, message: str) -> None:
    """So that a batch ends there, and can go on later."""
    with pytest.raises(EndpointError, match=message):
        remote(lambda _: answer).reply(ASKED, SamplingParams())


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


def test_a_stream_that_ends_too_early() -> None:
    half = 'data: {"choices": [{"text": "Hi", "finish_reason": null}]}\n\n'
    with pytest.raises(EndpointError, match="broke off"):
        list(remote(lambda _: httpx2.Response(200, text=half)).stream_reply("Say", SamplingParams()))


@pytest.mark.parametrize(
    ("address", "body", "hint"),
    [
        ("http://models.example", {}, "most servers' ends in /v1"),
        ("http://models.example/v1", {}, "ask in chats"),
        ("http://models.example/v1", {"error": {"message": "no such", "code": "model_not_found"}}, "no such"),
    ],
)
def test_what_may_be_wrong_where_nothing_is_found(address: str, body: dict[str, Any], hint: str) -> None:
    transport = httpx2.MockTransport(lambda _: httpx2.Response(404, json=body))
    with pytest.raises(EndpointError, match=f"{hint}[^;]*$"):
        RemoteChat(address, "m", transport=transport).reply("Once", SamplingParams())


def test_closed_with_the_last_request_under_way_and_nothing_asked_after() -> None:
    begun, go_on = threading.Event(), threading.Event()
    closings: list[bool] = []

    class Transport(httpx2.MockTransport):
        def close(self) -> None:
            closings.append(go_on.is_set())

    def handler(_request: httpx2.Request) -> httpx2.Response:
        begun.set()
        assert go_on.wait(10)
        return answering("Late.")

    chat = RemoteChat("http://models.example/v1/", "m", transport=Transport(handler))
    made: list[str] = []
    thread = threading.Thread(target=lambda: made.append(chat.reply(ASKED, SamplingParams()).text))
    thread.start()
    assert begun.wait(10)
    chat.close()
    assert closings == []
    go_on.set()
    thread.join()
    assert made == ["Late."] and closings == [True]
    with pytest.raises(EndpointError, match="closed"):
        chat.reply(ASKED, SamplingParams())
    with pytest.raises(EndpointError, match="closed"):
        list(chat.stream(ASKED, SamplingParams()))


def test_closed_at_once_where_nothing_is_asked() -> None:
    closings: list[None] = []

    class Transport(httpx2.MockTransport):
        def close(self) -> None:
            closings.append(None)

    chat = RemoteChat("http://models.example/v1/", "m", transport=Transport(lambda _: answering("Hi.")))
    assert chat.reply(ASKED, SamplingParams()).text == "Hi."
    chat.close()
    assert closings == [None]
