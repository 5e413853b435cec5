"""`fledge serve` through the real command line."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import numpy as np
import pytest

from fledge import cli
from fledge.model.ngram import NgramConfig, NgramModel
from fledge.tokenizer.bpe import train_bpe

from ..models import save_chain_model
from ..serve.real import load, serving
from ..serve.vllm_programs import ROOT, is_there, program, stand_in

TEXT = "\nabcdefghijk"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "alphabet" / "model"
    directory.parent.mkdir()
    save_chain_model(directory, train_bpe([TEXT], 280), "abcdefghijk")
    return directory


def mistake(capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    assert cli.main(["serve", *map(str, flags)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("fledge serve: error: ")
    return error


def test_mistakes(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "NAME=DIR" in mistake(capsys, "--model", model, model)
    assert "no directory" in mistake(capsys, "--model", f"a={tmp_path / 'none'}")
    assert "NAME=DIR" in mistake(capsys, "--model", f"={model}")
    assert "--key-file" in mistake(capsys, "--model", model, "--host", "0.0.0.0")
    assert "FLEDGE_TEST_KEY" in mistake(capsys, "--model", model, "--key-variable", "FLEDGE_TEST_KEY")
    monkeypatch.setenv("FLEDGE_TEST_KEY", "short")
    assert "8 ASCII" in mistake(capsys, "--model", model, "--key-variable", "FLEDGE_TEST_KEY")
    keys = tmp_path / "keys"
    keys.write_text("# nobody yet\n")
    assert "no keys" in mistake(capsys, "--model", model, "--key-file", keys)
    assert "--context 4096" in mistake(capsys, "--model", model, "--context", 4096, "--port", 0)
    assert "--body-mb" in mistake(capsys, "--model", model, "--body-mb", 0)
    assert "--at-once" in mistake(capsys, "--model", model, "--at-once", 0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "cannot listen" in mistake(capsys, "--model", model, "--port", port)


@contextmanager
def started(*flags: object) -> Iterator[tuple[subprocess.Popen[str], httpx2.Client]]:
    """The command as a process, and a client of the address that it prints."""
    paths = os.pathsep.join([str(ROOT), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "fledge", "serve", *map(str, flags), "--port", "0"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            line = process.stdout.readline().split()
            assert line[::2] == ["page", "API"], process.stderr and process.stderr.read()
            with httpx2.Client(base_url=line[1], timeout=30) as client:
                yield process, client
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_it_is_told_to_end(model: Path, tmp_path: Path, number: int) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# for the test\nthe-only-key\n")
    flags = ["--model", model, f"other={model}", "--key-file", keys, "--max-tokens", 5]
    with started(*flags) as (process, client):
        assert client.get("/v1/models").status_code == 401
        assert "<html" in client.get("/").text
        client.headers["authorization"] = "Bearer the-only-key"
        names = [one["id"] for one in client.get("/v1/models").json()["data"]]
        assert names == ["alphabet", "other"]
        body = {"messages": [{"role": "user", "content": "Say it"}], "temperature": 0, "max_tokens": 50}
        answer = client.post("/v1/chat/completions", json=body).json()["choices"][0]
        assert (answer["message"]["content"], answer["finish_reason"]) == ("abcde", "length")
        process.send_signal(number)
        error = process.communicate(timeout=30)[1]
        assert process.returncode == (130 if number == signal.SIGINT else 0)
    assert "Traceback" not in error
    assert "alphabet: " in error
    assert "POST /v1/chat/completions alphabet 200" in error
    assert "Say it" not in error and "the-only-key" not in error


def test_mistakes_with_vllm(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--model", model, "--port", 0, "--engine", "vllm", "--vllm"]
    assert "pip install 'fledge[vllm]'" in mistake(capsys, *asked, "no-such-vllm")
    path = program(tmp_path, "sys.exit('RuntimeError: no GPU')")
    assert "ended with exit code 1: RuntimeError: no GPU" in mistake(capsys, *asked, path)
    for flags in (["--quantize", "int8"], ["--queue", 3], ["--device", "cpu"], ["--vllm-flags=--port 1"]):
        assert f"{str(flags[0]).partition('=')[0]}" in mistake(capsys, *asked, path, *flags)
    assert "--vllm: it is for --engine vllm" in mistake(capsys, "--model", model, "--vllm", path)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((model / name).read_text())
    assert "vLLM cannot serve" in mistake(capsys, "--engine", "vllm", "--vllm", path, "--model", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_vllm_behind_our_page(model: Path, tmp_path: Path, number: int) -> None:
    """For SIGKILL it is one of its processes that is killed."""
    flags = ["--engine", "vllm", "--vllm", stand_in(tmp_path), "--weights", "fp32", "--max-tokens", 5]
    with started("--model", f"first={model}", f"second={model}", *flags) as (process, client):
        assert "<html" in client.get("/").text
        names = [one["id"] for one in client.get("/v1/models").json()["data"]]
        assert names == ["first", "second"]
        body = {"messages": [{"role": "user", "content": "Say it"}], "temperature": 0}
        for name in names:
            answer = client.post("/v1/chat/completions", json={**body, "model": name}).json()
            assert answer["choices"][0]["message"]["content"] == "abcde"
        assert process.stderr is not None
        said = (line.partition(": ")[2] for line in process.stderr)
        children = [json.loads(next(one for one in said if one.startswith("{"))) for _ in names]
        shares = [one["called"][one["called"].index("--gpu-memory-utilization") + 1] for one in children]
        assert shares == ["0.450", "0.450"]
        if number == signal.SIGKILL:
            os.kill(children[1]["process"], number)
        else:
            process.send_signal(number)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == (130 if number == signal.SIGINT else 2)
    assert not any(is_there(one["process"]) for one in children)
    assert "Traceback" not in error
    if number == signal.SIGKILL:
        assert error.splitlines()[-1].startswith(
            "fledge serve: error: --model second: vLLM was ended by signal 9"
        )


@pytest.mark.slow
def test_an_end_while_vllm_loads(model: Path, tmp_path: Path) -> None:
    path = program(tmp_path, "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)")
    command = [sys.executable, "-m", "fledge", "serve", "--model", str(model), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    with subprocess.Popen(
        [*command, "--engine", "vllm", "--vllm", str(path)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        child = int(next(one for one in process.stderr if one.split()[-1].isdecimal()).split()[-1])
        assert is_there(child)
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == 0 and not is_there(child)


def talk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lines: str, *flags: object
) -> tuple[int, str, str]:
    """`fledge chat` with lines on stdin: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    code = cli.main(["chat", *map(str, flags)])
    return code, *capsys.readouterr()


def test_chat_with_a_model_behind_an_address(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(load(model, "alphabet"), keys=("the-only-key",)) as server:
        flags = ["--endpoint", f"{server.url}/v1", "--model", "alphabet", "--temperature", 0]
        monkeypatch.setenv("FLEDGE_TEST_KEY", "the-only-key")
        keyed = [*flags, "--endpoint-key", "FLEDGE_TEST_KEY"]
        assert talk(monkeypatch, capsys, "Hi\nAgain\n", *keyed) == (0, "abcdefghijk\nabcdefghijk\n", "")
        code, out, error = talk(monkeypatch, capsys, "Hi\n", *keyed, "--max-tokens", 3)
        assert (code, out) == (0, "abc\n") and "cut off" in error
        code, out, error = talk(monkeypatch, capsys, "Hi\n", *flags)
        assert (code, out) == (0, "\n") and "401" in error and "give a key" in error
        code, out, error = talk(monkeypatch, capsys, "x" * 4000 + "\nHi\n", *keyed)
        assert (code, out) == (0, "\nabcdefghijk\n") and "context" in error
        missing = [*flags, "--endpoint-key", "FLEDGE_NO_SUCH_KEY"]
        assert talk(monkeypatch, capsys, "", *missing)[0] == 2
        assert "--top-k" in talk(monkeypatch, capsys, "", *keyed, "--top-k", 3)[2]


def test_ends_that_are_ignored(model: Path) -> None:
    with serving(load(model, "alphabet")) as server:
        body = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 20}
        made = server.post("/v1/chat/completions", body).json()
        assert (made["usage"]["completion_tokens"], made["choices"][0]["finish_reason"]) == (11, "stop")
        made = server.post("/v1/chat/completions", {**body, "ignore_eos": True}).json()
        assert (made["usage"]["completion_tokens"], made["choices"][0]["finish_reason"]) == (20, "length")
        assert made["choices"][0]["message"]["content"] == "abcdefghijk"  # an end has no text
        stopped = server.post("/v1/chat/completions", {**body, "ignore_eos": True, "stop": "e"}).json()
        assert stopped["choices"][0]["message"]["content"] == "abcd"


def test_a_model_of_counts(tmp_path: Path) -> None:
    tokenizer = train_bpe([TEXT], 280)
    documents = [np.array([tokenizer.eos_id, *tokenizer.encode("abc abd abc")])] * 3
    counts = NgramModel.count(documents, tokenizer.eos_id, NgramConfig(tokenizer.vocab_size, 3, 64))
    (tmp_path / "counts").mkdir()
    counts.save(tmp_path / "counts", tokenizer, {"stage": "pretrain"}, tokenizer.eos_id)
    with serving(load(tmp_path / "counts", "counts")) as server:
        body = {"prompt": "ab", "max_tokens": 5, "temperature": 0, "logprobs": 1, "echo": True}
        made = server.post("/v1/completions", body).json()["choices"][0]
        assert made["text"].startswith("abc ab")
        assert server.post("/v1/embeddings", {"input": "ab"}).status_code == 400
