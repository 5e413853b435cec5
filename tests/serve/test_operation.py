"""Errors, limits, and clients that misbehave: nobody else notices."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from fledge.engine.engine import Engine
from fledge.model.checkpoint import save_model
from fledge.serve.guard import Limits
from fledge.tokenizer.bpe import Tokenizer
from fledge.types import SamplingParams

from .real import Serving, events, load, make_tokenizer, save_random_model, serving

ASK = [{"role": "user", "content": "The cats sat"}]
# So many tokens that it does not end by itself while a test looks.
LONG = {"prompt": "The", "max_tokens": 4000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def directory(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "tiny"
    save_random_model(path, tokenizer, context=4096)
    return path


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[Serving]:
    with serving(load(directory), limits=Limits(body_bytes=100_000)) as server:
        yield server


def until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "did not come about"
        time.sleep(0.01)


def assert_error(
    response: httpx2.Response, status: int, param: str | None = None, code: str | None = None
) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"]
    assert param is None or error["param"] == param
    assert code is None or error["code"] == code
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/completions", b"{", 400, None),
        ("/v1/completions", b"[]", 400, None),
        ("/v1/completions", b'{"prompt": "\\ud800"}', 400, None),
        ("/v1/completions", b'{"prompt": "a", "temperature": NaN}', 400, "temperature"),
        ("/v1/completions", b"[" * 50_000, 400, None),
        ("/v1/completions", {"prompt": "a", "max_tokens": "5"}, 400, "max_tokens"),
        ("/v1/completions", {"prompt": "a", "temperature": -1}, 400, "temperature"),
        ("/v1/completions", {"prompt": "a", "temperature": 1e300}, 400, None),
        ("/v1/completions", {"prompt": "a", "frequency_penalty": 1e300}, 400, None),
        ("/v1/completions", {"prompt": "a", "presence_penalty": -1e300}, 400, None),
        ("/v1/completions", {"prompt": "a", "repetition_penalty": 1e-300}, 400, None),
        ("/v1/completions", {"prompt": "a", "n": 0}, 400, "n"),
        ("/v1/completions", {"prompt": "a", "logprobs": 21}, 400, "logprobs"),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, 400, "suffix"),
        ("/v1/completions", {"prompt": "a", "n": 3, "best_of": 2}, 400, "best_of"),
        ("/v1/completions", {"prompt": "a", "n": 1, "best_of": 2, "stream": True}, 400, "best_of"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ("/v1/completions", {"prompt": []}, 400, "prompt"),
        ("/v1/completions", {"prompt": [99999]}, 400, None),
        ("/v1/completions", {"prompt": [1] * 5000}, 400, "prompt"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"99999": 1}}, 400, None),
        ("/v1/completions", {"prompt": "a", "model": "gpt-4"}, 404, "model"),
        ("/v1/completions", {"prompt": "a", "structured_outputs": {"regex": "("}}, 400, None),
        ("/v1/completions", {"prompt": "a", "structured_outputs": {"regex": "a", "choice": []}}, 400, None),
        ("/v1/completions", {"prompt": "a", "use_beam_search": True, "stream": True}, 400, "stream"),
        ("/v1/completions", {"prompt": "a", "stop": [""]}, 400, None),
        ("/v1/chat/completions", {}, 400, "messages"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "robot", "content": ""}]}, 400, None),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, 400, None),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400,
         "messages[0].content[0]"),
        ("/v1/chat/completions", {"messages": ASK, "top_logprobs": 3}, 400, "top_logprobs"),
        ("/v1/chat/completions", {"messages": ASK, "tool_choice": "required"}, 400, "tool_choice"),
        ("/v1/chat/completions", {"messages": ASK, "tools": [{}]}, 400, "tools[0]"),
        ("/v1/chat/completions", {"messages": ASK, "response_format": {"type": "xml"}}, 400,
         "response_format.type"),
        ("/v1/embeddings", {"input": "x", "model": "none"}, 404, "model"),
        ("/v1/embeddings", {"input": [[99999]]}, 400, "input"),
        ("/v1/embeddings", {"input": [[1]] * 2049}, 400, "input"),
        ("/v1/completions", {"prompt": [1] * 1000, "n": 128, "echo": True, "logprobs": 20}, 400, "prompt"),
        ("/v1/score", {"messages": ASK}, 400, None),
        ("/tokenize", {}, 400, "prompt"),
        ("/detokenize", {"tokens": [99999]}, 400, "tokens"),
        ("/v1/nothing", {}, 404, None),
        ("/v1/models", {}, 405, None),
    ],
)  # fmt: skip
def test_mistakes_are_named(server: Serving, path: str, body: Any, status: int, param: str | None) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with server.client() as client:
        response = client.post(path, content=content, headers={"content-type": "application/json"})
    assert_error(response, status, param)
    server.until_idle()


def test_unknown_fields_are_ignored_with_a_warning(server: Serving) -> None:
    body = {"prompt": "The", "max_tokens": 1, "foo": 1, "user": "me", "bar": None, "b\n\u20acd": {}}
    body["stream_options"] = {"x": 1}
    response = server.post("/v1/completions", body)
    assert response.status_code == 200
    assert response.headers["warning"] == ('199 fledge "ignored fields: bu20acd, foo, stream_options.x"')
    assert "warning" not in server.post("/v1/completions", {"prompt": "The", "max_tokens": 1}).headers


def test_request_ids(server: Serving) -> None:
    with server.client() as client:
        ids = [client.get("/health", headers={"x-request-id": given}).headers["x-request-id"]
               for given in ("mine-7", "x" * 200, "a b", "")]  # fmt: skip
    assert ids[0] == "mine-7"
    assert all(name.startswith("req_") for name in ids[1:]) and len(set(ids)) == 4


def test_the_log_tells_nothing_of_the_contents(server: Serving) -> None:
    server.post(
        "/v1/chat/completions", {"messages": [{"role": "user", "content": "secret words"}], "max_tokens": 3}
    )
    until(lambda: any("/v1/chat/completions" in line for line in server.lines))
    assert not any("secret" in line for line in server.lines)


def test_what_is_no_json_is_refused(server: Serving) -> None:
    with server.client() as client:
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            response = client.post(
                "/v1/completions", content=b'{"prompt": "a"}', headers={"content-type": kind}
            )
            assert_error(response, 415)


def test_other_names_and_other_sites_are_refused(server: Serving) -> None:
    with server.client() as client:
        assert_error(client.get("/v1/models", headers={"host": "evil.example"}), 403)
        assert_error(client.get("/v1/models", headers={"origin": "http://evil.example"}), 403)
        assert_error(client.get("/v1/models", headers={"origin": "http://["}), 403)
        same = client.get("/v1/models", headers={"origin": server.url})
        assert same.status_code == 200
        assert "access-control-allow-origin" not in same.headers


def test_a_site_that_may_ask(directory: Path) -> None:
    with serving(load(directory), origins=("https://good.example",)) as server, server.client() as client:
        found = client.get("/v1/models", headers={"origin": "https://good.example"})
        assert found.headers["access-control-allow-origin"] == "https://good.example"
        preflight = {"origin": "https://good.example", "access-control-request-method": "POST"}
        assert client.options("/v1/completions", headers=preflight).status_code == 200
        missing = client.get("/v1/models/none", headers={"origin": "https://good.example"})
        assert missing.headers["access-control-allow-origin"] == "https://good.example"
        assert_error(client.get("/v1/models", headers={"origin": "https://evil.example"}), 403)


def test_keys(directory: Path) -> None:
    with serving(load(directory), keys=("first-key", "second-key")) as server, server.client() as client:
        for key in ("first-key", "second-key"):
            assert client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
        for value in ("Bearer other-key", "Bearer x", "first-key", "Basic first-key", "Bearer caf\u00e9"):
            response = client.get("/v1/models", headers={"authorization": value.encode()})
            assert_error(response, 401, code="invalid_api_key")
        assert_error(client.get("/metrics"), 401)
        assert_error(client.post("/corrections", json={}), 401)
        assert [client.get(path).status_code for path in ("/health", "/", "/openapi.json")] == [200] * 3


def test_a_long_body_is_refused(server: Serving) -> None:
    body = json.dumps({"prompt": "a" * 200_000}).encode()

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(body), 10_000):
            yield body[start : start + 10_000]

    with server.client() as client:
        for content in (body, pieces()):
            response = client.post(
                "/v1/completions", content=content, headers={"content-type": "application/json"}
            )
            assert_error(response, 413, code="request_too_large")
        big = b"x" * 10_000_000
        assert_error(
            client.post("/v1/completions", content=big, headers={"content-type": "application/json"}), 413
        )
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 1e20, "logit_bias": {"5": -100}, "top_p": 1e-300, "min_p": 1.0},
        {"temperature": 1e-320, "frequency_penalty": -1e20, "repetition_penalty": 1e20},
        {"frequency_penalty": 1e20, "presence_penalty": 1e20, "repetition_penalty": 1e-20, "top_k": 10**20},
        {"repetition_penalty": 1e-20, "frequency_penalty": -1e20, "presence_penalty": 1e20},
        {"seed": -(10**40), "logit_bias": {str(i): 100 for i in range(50)}},
    ],
)
def test_extreme_settings_still_give_tokens(server: Serving, extreme: dict[str, Any]) -> None:
    body = {"prompt": "The cats", "max_tokens": 30, "ignore_eos": True, **extreme}
    response = server.post("/v1/completions", body)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] == 30


def greedy(engine: Engine, prompt: list[int], tokens: int) -> list[int]:
    return engine.generate([prompt], SamplingParams(temperature=0, max_tokens=tokens))[0].ids


def test_many_at_once_get_what_each_gets_alone(server: Serving, tokenizer: Tokenizer) -> None:
    served = server.service.models["tiny"].engine
    assert served is not None
    engine = Engine(served.model, served.eos_ids)
    prompts = [tokenizer.encode("The cats sat; the cats ate. Hello"[i % 13 : 14 + i]) for i in range(24)]

    def ask(i: int) -> list[int]:
        body = {"prompt": prompts[i], "temperature": 0, "max_tokens": 10 + i, "return_token_ids": True}
        if i % 2:
            response = server.post("/v1/completions", {**body, "stream": True})
            found = [json.loads(line)["choices"][0] for line in events(response)[:-1]]
            return [token_id for choice in found for token_id in choice["token_ids"]]
        ids: list[int] = server.post("/v1/completions", body).json()["choices"][0]["token_ids"]
        return ids

    with ThreadPoolExecutor(24) as pool:
        made = list(pool.map(ask, range(24)))
    assert made == [greedy(engine, prompt, 10 + i) for i, prompt in enumerate(prompts)]
    server.until_idle()


def test_health_answers_while_the_model_works(server: Serving) -> None:
    with server.client() as client, client.stream("POST", "/v1/completions", json=LONG) as response:
        lines = response.iter_lines()
        next(lines)
        with server.client() as other:
            for _ in range(20):
                assert other.get("/health").status_code == 200
    server.until_idle()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_place(server: Serving, stream: bool) -> None:
    body = json.dumps({**LONG, "stream": stream, "n": 4}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    before = server.service.metrics.left
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n" % len(body) + body
        )
        until(lambda: server.service.models["tiny"].worker.running == 4)
        if stream:
            assert connection.recv(100)
    server.until_idle()
    until(lambda: server.service.metrics.left == before + 1)


def test_who_does_not_read_or_ends_in_the_middle_harms_nobody(directory: Path) -> None:
    limits = Limits(seconds=3.0, body_seconds=0.5)
    with serving(load(directory, rows=3), limits=limits, idle_seconds=1.0) as server:
        host, port = server.url.removeprefix("http://").split(":")
        body = json.dumps({**LONG, "logprobs": 20, "n": 2}).encode()
        head = (
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n" % len(body)
        )
        sent = [head + body, head + body[:10], head, head[:30], b"\x00\xff" * 20, b""]
        connections = []
        for content in sent:
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((host, int(port)))
            connection.sendall(content)
            connections.append(connection)
        answer = server.post("/v1/completions", {"prompt": "The", "max_tokens": 3, "ignore_eos": True})
        assert answer.json()["usage"]["completion_tokens"] == 3
        server.until_idle(30)
        until(lambda: not server.server.server_state.connections, 30)
        assert b" 408 " in connections[1].recv(1000) and b" 408 " in connections[2].recv(1000)
        for connection in connections:
            connection.close()


def test_a_request_that_takes_too_long(directory: Path) -> None:
    with serving(load(directory), limits=Limits(seconds=0.4)) as server:
        assert_error(server.post("/v1/completions", {**LONG, "stream": False}), 504, code="timeout")
        lines = events(server.post("/v1/completions", LONG))
        assert json.loads(lines[-2])["error"]["code"] == "timeout" and lines[-1] == "[DONE]"
        server.until_idle()


def test_too_many_are_told_to_come_again(directory: Path) -> None:
    with serving(load(directory, rows=2), queue=1) as server, server.client() as client:
        assert_error(server.post("/v1/completions", {**LONG, "n": 4}), 400)
        with client.stream("POST", "/v1/completions", json={**LONG, "n": 3}) as response:
            lines = response.iter_lines()  # kept: without it the answer is closed
            next(lines)
            refused = server.post("/v1/completions", {"prompt": "The", "max_tokens": 2})
            assert_error(refused, 429, code="rate_limit_exceeded")
            assert int(refused.headers["retry-after"]) > 0
        server.until_idle()
        assert server.post("/v1/completions", {"prompt": "The", "max_tokens": 2}).status_code == 200


def test_errors_of_the_model(directory: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    model = save_random_model(tmp_path / "whole", tokenizer, tied=False)
    bad = tokenizer.encode("漢")[-1]
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = float("nan")
    damaged.mkdir()
    save_model(damaged, model, tokenizer, {"stage": "sft"}, [tokenizer.eos_id])
    with serving(load(damaged)) as server:
        # At once: a status. Its neighbours get their answers.
        assert_error(server.post("/v1/completions", {"prompt": [bad]}), 500, code="broken_model")
        # In the middle: an event.
        body = {"prompt": "The", "stream": True, "max_tokens": 5, "logit_bias": {str(bad): 100}}
        lines = events(server.post("/v1/completions", body))
        assert json.loads(lines[-2])["error"]["code"] == "broken_model" and lines[-1] == "[DONE]"
        server.until_idle()


def test_a_fault_of_the_engine_ends_what_runs_and_nothing_else(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(load(directory)) as server:
        scheduler = server.service.models["tiny"].worker.scheduler
        assert scheduler is not None
        with server.client() as client, client.stream("POST", "/v1/completions", json=LONG) as response:
            lines = response.iter_lines()
            next(lines)
            with monkeypatch.context() as patch:
                patch.setattr(scheduler, "_choose", lambda logits: 1 / 0)
                rest = [line for line in lines if line]
                broken = server.post("/v1/completions", {"prompt": "The", "max_tokens": 2})
        assert_error(broken, 500, code="internal_error")
        assert json.loads(rest[-2].removeprefix("data: "))["error"]["type"] == "server_error"
        assert server.post("/v1/completions", {"prompt": "The", "max_tokens": 2}).status_code == 200
    assert "ZeroDivisionError" in capfd.readouterr().err


def refuses(server: Serving) -> bool:
    """Whether nobody new is let in."""
    try:
        with server.client() as other:
            other.get("/health")
    except httpx2.TransportError:
        return True
    return False


@pytest.mark.parametrize("patience", [0.3, 10.0])
def test_a_stop_waits_for_what_runs_and_ends_what_takes_longer(directory: Path, patience: float) -> None:
    threads = set(threading.enumerate())
    with serving(load(directory), stop_seconds=patience) as server:
        tokens = 4000 if patience < 1 else 400
        with server.client() as client:
            body = {**LONG, "max_tokens": tokens}
            with client.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                server.server.should_exit = True
                until(lambda: server.service.stopping)
                until(lambda: refuses(server))
                rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        last = json.loads(rest[-2].removeprefix("data: "))
        if patience < 1:
            assert last["error"]["code"] == "shutting_down"
        else:
            assert last["choices"][0]["finish_reason"] == "length"
        server.thread.join(20)
        assert not server.thread.is_alive()
    assert not [thread for thread in set(threading.enumerate()) - threads if thread.name == "model tiny"]
