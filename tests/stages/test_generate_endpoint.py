"""`fledge generate --endpoint`: the same texts as of the directory, and mistakes named."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fledge.cli import main

from ..on_a_port import on_a_port
from .conftest import KEY

Capture = pytest.CaptureFixture[str]


def generate(*flags: object) -> int:
    return main(["generate", *map(str, flags)])


@pytest.mark.parametrize("how", [[], ["--chat"], ["--echo", "--stop", "e", "\n"], ["--n", "3"]])
def test_the_texts_are_those_of_the_directory(
    how: list[str], far_model: Path, far: list[str], capsys: Capture
) -> None:
    flags = [
        "--prompt",
        "The cats",
        "",
        "Hello, 漢字 <|im_end|>",
        *how,
        "--temperature",
        0,
        "--max-tokens",
        12,
    ]
    assert generate("--model", far_model, *flags) == 0
    here = capsys.readouterr()
    assert generate(*far, *flags) == 0
    there = capsys.readouterr()
    assert there.out == here.out and len(there.out.splitlines()) >= 3
    assert "--- 2 of " in there.err and " tokens, " in there.err
    tokens = here.err.splitlines()[-1].split(" tokens")[0]
    assert there.err.splitlines()[-1].startswith(f"{tokens} tokens, ")


def test_a_text_appears_on_a_terminal_as_it_is_made(
    far_model: Path, far: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"The cats\n")))
    flags = ["--temperature", 0, "--max-tokens", 20]
    assert generate(*far, "--prompt", "-", *flags) == 0
    there = capsys.readouterr()
    assert generate("--model", far_model, "--prompt", "The cats", *flags) == 0
    assert there.out == capsys.readouterr().out and "cut off" in there.err


def test_a_batch_is_that_of_the_directory(
    far_model: Path, far: list[str], tmp_path: Path, capsys: Capture
) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"The cats {i}", "n": i % 3 + 1} for i in range(40)]
    rows += [
        {"messages": [{"role": "user", "content": "Well?"}], "stop": ["e", "\n"], "id": 7},
        {"prompt": "x " * 3000},
        {"prompt": "a", "top_k": 3},
        {"prompt": "a", "top_k": None, "seed": 4},
        {"prompt": "a", "temprature": 3},
        {"question": "?"},
        {"prompt": "a", "n": 0},
        {"messages": [{"role": "user", "content": "Well?"}], "tools": [{"type": "function"}]},
        {"prompt": "caf\udce9"},
    ]
    source, here, there = (tmp_path / name for name in ("in.jsonl", "here.jsonl", "there.jsonl"))
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n{\n")
    flags = ["--batch", source, "--temperature", 0, "--max-tokens", 9]
    assert generate("--model", far_model, *flags, "--out", here) == 0
    assert generate(*far, *flags, "--out", there) == 0
    assert "50 rows, 8 with an error" in capsys.readouterr().err.splitlines()[-1]
    expected, made = ([json.loads(line) for line in path.read_text().splitlines()] for path in (here, there))
    assert made[:41] == expected[:41] and made[43] == {**expected[43], "top_k": None}
    messages = {
        41: "context", 42: "top_k goes with a local model", 44: "'temperature'", 45: 'either "prompt"',
        46: "n 0 is below 1", 47: '"tools" go with a local model', 48: "surrogate", 49: "not valid JSON",
    }  # fmt: skip
    for i, message in messages.items():
        assert message in made[i]["error"] and "completions" not in made[i]
    assert [{k: row.get(k) for k in given} for row, given in zip(made, rows[:48], strict=False)] == rows[:48]
    assert generate(*far, *flags, "--out", there) == 2 and "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(("row", "message"), [('{"prompt": "a", "ban": "b"}', "ban"), (None, "context")])
def test_strict_ends_at_the_first_bad_row(
    row: str | None, message: str, far: list[str], tmp_path: Path, capsys: Capture
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a"}\n' + (row or json.dumps({"prompt": "x " * 3000})) + "\n")
    assert generate(*far, "--batch", source, "--out", tmp_path / "out.jsonl", "--strict") == 2
    error = capsys.readouterr().err
    assert f"{source}:2: " in error and message in error and not (tmp_path / "out.jsonl").exists()


def test_samples_differ_and_come_again(far: list[str], tmp_path: Path, capsys: Capture) -> None:
    flags = [*far, "--max-tokens", 8, "--temperature", 1]
    for _ in range(2):
        assert generate(*flags, "--prompt", "The", "The", "--n", 2) == 0
    texts = capsys.readouterr().out.splitlines(keepends=True)
    half = len(texts) // 2
    assert texts[:half] == texts[half:] and len(set(texts)) > 1
    # The rows of a batch get what the same prompts get as flags.
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "The"}\n' * 2)
    assert generate(*flags, "--batch", source, "--out", out, "--n", 2) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    made = [one["text"] + "\n" for row in rows for one in row["completions"]]
    assert len(made) == 4 and "".join(made) == "".join(texts[:half])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top-k", "3"], "--top-k goes with a local model"),
        (["--min-p", "0.1"], "--min-p goes with a local model"),
        (["--grammar", "a.lark"], "--grammar goes with a local model"),
        (["--choices", "a", "b"], "--choices goes with a local model"),
        (["--show-logprobs", "2"], "--show-logprobs goes with a local model"),
        (["--beams", "2"], "--beams goes with a local model"),
        (["--strategy", "exact"], "--strategy goes with a local model"),
        (["--best-of", "2"], "--best-of goes with a local model"),
        (["--speculate", "lookup"], "--speculate goes with a local model"),
        (["--weights", "bf16"], "--weights goes with a local model"),
        (["--device", "cpu"], "--device goes with a local model"),
        (["--temperature", "-1"], "temperature"),
        (["--model", "none"], "404: the model 'none' does not exist"),
        (["--endpoint-key", "FLEDGE_NO_SUCH_KEY"], "no such environment variable"),
        (["--endpoint-key", "FLEDGE_WRONG_KEY"], "401"),
        (["--endpoint", "nowhere"], "not an address"),
        (["--endpoint", "http://127.0.0.1:9/v1"], "nobody answers there"),
        (["--prompt", "x " * 3000], "context"),
        (["--echo", "--batch", "FOLDER/b.jsonl", "--out", "FOLDER/o.jsonl"], "--echo goes with a local"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], message: str, far: list[str], tmp_path: Path, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("FLEDGE_WRONG_KEY", "the-wrong-key")
    (tmp_path / "b.jsonl").write_text('{"prompt": "a"}\n')
    flags = [flag.replace("FOLDER", str(tmp_path)) for flag in flags]
    given = dict(zip(far[::2], far[1::2], strict=True))
    kept = [word for flag, value in given.items() if flag not in flags for word in (flag, value)]
    prompt = [] if "--prompt" in flags or "--batch" in flags else ["--prompt", "a"]
    assert generate(*kept, *prompt, *flags) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("fledge generate: error: ")
    assert message in printed.err and printed.err.count("\n") == 1
    assert KEY not in printed.err and "the-wrong-key" not in printed.err


def test_a_key_wants_an_endpoint(far_model: Path, capsys: Capture) -> None:
    assert generate("--model", far_model, "--prompt", "a", "--endpoint-key", "KEY") == 2
    assert "--endpoint-key goes with --endpoint" in capsys.readouterr().err


def answering(respond: Any) -> Starlette:
    return Starlette(routes=[Route("/v1/completions", respond, methods=["POST"])])


def test_a_stream_that_breaks_off(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    async def half(request: Request) -> Response:
        event = {"choices": [{"text": "Hi", "finish_reason": None}]}
        return Response(f"data: {json.dumps(event)}\n\n", media_type="text/event-stream")

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with on_a_port(answering(half)) as url:
        assert generate("--model", "m", "--endpoint", f"{url}/v1", "--prompt", "a") == 2
    printed = capsys.readouterr()
    assert printed.out.startswith("Hi") and "broke off" in printed.err and printed.err.count("\n") == 1


def batch_of(path: Path, rows: list[dict[str, Any]]) -> list[object]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--batch", path, "--out", path.with_suffix(".out")]


def texts_of(path: Path) -> list[list[str]]:
    rows = [json.loads(line) for line in path.with_suffix(".out").read_text().splitlines()]
    return [[one["text"] for one in row.get("completions", [])] for row in rows]


@pytest.mark.parametrize("parallel", [1, 5])
def test_an_endpoint_that_goes_leaves_what_is_done(
    parallel: int, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It refuses everything for a moment, twice; the same command, be it with another key, goes on with what
    is left: nothing that was answered is asked again."""
    refusing, asked = {"p11", "p22"}, list[str]()

    async def some(request: Request) -> Response:
        prompt = (await request.json())["prompt"]
        if prompt in refusing:
            refusing.remove(prompt)
            return JSONResponse({"error": {"message": "paid for no more"}}, 403)
        if prompt in ("p10", "p12"):  # under way with p11, and answered later
            await asyncio.sleep(0.3)
        asked.append(prompt)
        return JSONResponse({"choices": [{"text": prompt.upper(), "finish_reason": "stop"}]})

    source, prompts = tmp_path / "in.jsonl", [f"p{i}" for i in range(30)]
    with on_a_port(answering(some)) as url:
        flags = ["--model", "m", "--endpoint", f"{url}/v1", "--batch-size", parallel]
        flags += batch_of(source, [{"prompt": prompt} for prompt in prompts])
        for name in ("FIRST", "SECOND"):
            monkeypatch.setenv(name, KEY)
            assert generate(*flags, "--endpoint-key", name) == 2
            error = capsys.readouterr().err
            assert "403: paid for no more" in error and error.count("\n") == 1
            assert not source.with_suffix(".out").exists()
        kept = len(asked)
        assert generate(*flags) == 0
        error = capsys.readouterr().err
        assert f"30 rows, {kept} of them from before; {tmp_path}" in error  # no tokens: they are not counted
    assert sorted(asked) == sorted(prompts) and texts_of(source) == [[prompt.upper()] for prompt in prompts]


def test_a_refused_row_costs_nothing_more(tmp_path: Path, capsys: Capture) -> None:
    """Neither its other samples, nor with --strict those of others: they end, and are kept."""
    asked = list[str]()

    async def some(request: Request) -> Response:
        prompt = (await request.json())["prompt"]
        asked.append(prompt)
        if prompt == "bad":
            return JSONResponse({"error": {"message": "no such text"}}, 400)
        await asyncio.sleep(0.2 if prompt == "slow" else 0)
        return JSONResponse({"choices": [{"text": prompt.upper(), "finish_reason": "stop"}]})

    source = tmp_path / "in.jsonl"
    rows = [{"prompt": "slow"}, {"prompt": "bad", "n": 200}, *[{"prompt": "a"}] * 40]
    with on_a_port(answering(some)) as url:
        flags = ["--model", "m", "--endpoint", f"{url}/v1", "--batch-size", 2, *batch_of(source, rows)]
        assert generate(*flags, "--strict") == 2
        error = capsys.readouterr().err
        assert f"{source}:2: " in error and "400: no such text" in error and error.count("\n") == 1
        assert sorted(asked) == ["bad", "slow"]
        journal = Path(f"{source.with_suffix('.out')}.partial").read_text().splitlines()
        assert [json.loads(line)["row"] for line in journal[1:]] == [0]
        assert generate(*flags) == 0
        assert "42 rows, 1 of them from before, 1 with an error" in capsys.readouterr().err
    assert texts_of(source) == [["SLOW"], [], *[["A"]] * 40]
    assert 2 <= asked.count("bad") < 100 and (asked.count("slow"), asked.count("a")) == (1, 40)


def test_tools_of_a_chat_are_refused(far: list[str], tmp_path: Path, capsys: Capture) -> None:
    source = tmp_path / "in.jsonl"
    flags = batch_of(source, [{"prompt": "Well?", "tools": [{"type": "function"}]}])
    assert generate(*far, *flags, "--chat", "--strict") == 2
    assert '"tools" go with a local model' in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_ends_a_batch_whose_requests_hang(tmp_path: Path) -> None:
    waiting, left = threading.Semaphore(0), threading.Event()

    async def hang(request: Request) -> Response:
        waiting.release()
        while not await request.is_disconnected():
            await asyncio.sleep(0.02)
        left.set()
        return Response()

    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a"}\n' * 50)
    with on_a_port(answering(hang)) as url:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        flags = ["--model", "m", "--endpoint", f"{url}/v1", "--batch", source, "--out", tmp_path / "o.jsonl"]
        command = [sys.executable, "-m", "fledge", "generate", *map(str, flags)]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        try:
            for _ in range(16):
                assert waiting.acquire(timeout=60)
            assert not waiting.acquire(timeout=0.2)  # no more at once
            process.send_signal(signal.SIGINT)
            error = process.communicate(timeout=20)[1]
        finally:
            process.kill()
        assert process.returncode == 130 and error.splitlines()[-1] == "fledge generate: interrupted"
        assert left.wait(10)
