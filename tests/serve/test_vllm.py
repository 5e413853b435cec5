"""vLLM as a process behind ours. vLLM itself needs a GPU: a stand-in takes its place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from fledge.errors import UserError
from fledge.serve import tied, vllm
from fledge.serve.relay import Relay
from fledge.serve.vllm import (
    VllmProcess,
    Wishes,
    check_directory,
    close_all,
    environment_for,
    find_program,
    flags_for,
)

from .real import Serving, events, make_tokenizer, save_random_judge, save_random_model, serving
from .stand_in_vllm import parser
from .vllm_programs import ROOT, is_there, program, stand_in

ASK = [{"role": "user", "content": "The cats sat"}]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the signal at a parent's end is Linux's")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "far"
    save_random_model(path, make_tokenizer())
    return path


def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.02)


def test_wishes_as_flags(directory: Path, tmp_path: Path) -> None:
    bare = parser().parse_args(flags_for("far", directory, Wishes(program="vllm"), tmp_path / "socket"))
    assert (bare.model_tag, bare.served_model_name) == (str(directory.resolve()), ["far"])
    assert bare.uds == str(tmp_path / "socket") and bare.generation_config == "vllm"
    assert (bare.dtype, bare.max_model_len, bare.max_num_seqs) == ("auto", None, 256)
    assert bare.enable_auto_tool_choice and bare.tool_call_parser == "hermes"
    assert (bare.gpu_memory_utilization, bare.override_generation_config) == (0.92, {})
    wishes = Wishes(
        program="vllm", weights="bf16", context=512, rows=8, answer_tokens=20, share=3, flags="-tp 4"
    )
    asked = parser().parse_args(flags_for("far", directory, wishes, tmp_path / "socket"))
    assert (asked.dtype, asked.max_model_len, asked.max_num_seqs) == ("bfloat16", 512, 8)
    assert asked.override_generation_config == {"max_new_tokens": 20}
    assert asked.tensor_parallel_size == 4 and 3 * asked.gpu_memory_utilization <= 0.92
    for dtype in ("fp32", "fp16"):
        flags = flags_for("far", directory, Wishes(program="vllm", weights=dtype), tmp_path / "socket")
        assert parser().parse_args(flags).dtype == {"fp32": "float32", "fp16": "float16"}[dtype]


def test_a_template_without_tools(directory: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((directory / name).read_text())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    flags = flags_for("far", tmp_path, Wishes(program="vllm"), tmp_path / "socket")
    assert not {"--enable-auto-tool-choice", "--tool-call-parser"} & set(flags)


@pytest.mark.parametrize("flags", ["--api-key k", "--api_key=k", "--port=1", "--uds x", "--config f", "'"])
def test_flags_that_are_refused(directory: Path, tmp_path: Path, flags: str) -> None:
    with pytest.raises(UserError, match="--vllm-flags"):
        flags_for("far", directory, Wishes(program="vllm", flags=flags), tmp_path / "socket")


def test_its_environment() -> None:
    mine = {"PATH": "/bin", "VLLM_API_KEY": "mine"}
    made = environment_for("random", "auto", mine)
    assert (made["VLLM_API_KEY"], made["PATH"], made["VLLM_NO_USAGE_STATS"]) == ("random", "/bin", "1")
    assert environment_for("k", "cuda", {"VLLM_NO_USAGE_STATS": "0"})["VLLM_NO_USAGE_STATS"] == "0"
    assert environment_for("k", "cuda:3", {})["CUDA_VISIBLE_DEVICES"] == "3"
    assert environment_for("k", "cuda:1", {"CUDA_VISIBLE_DEVICES": "4,5"})["CUDA_VISIBLE_DEVICES"] == "5"
    for device in ("cpu", "mps", "cuda:", "cuda:2", "cuda:x"):
        with pytest.raises(UserError, match=f"--device {device}: "):
            environment_for("k", device, {"CUDA_VISIBLE_DEVICES": "4,5"})


def test_directories_that_it_cannot_serve(directory: Path, tmp_path: Path) -> None:
    assert check_directory("far", directory) == ["head_dim 8: FlashAttention has 32, 64, 96, 128, 160, 192, "
                                                 "224, 256; others need a slower kernel"]  # fmt: skip
    counts, judge, adapter = tmp_path / "counts", tmp_path / "judge", tmp_path / "adapter"
    for path in (counts, adapter):
        path.mkdir()
    (counts / "config.json").write_text(json.dumps({"model_type": "ngram"}))
    save_random_judge(judge, make_tokenizer())
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "base_model_name_or_path": "there"}
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": ["q_proj"]}))
    for path, why in ((counts, "n-gram"), (judge, "reward model"), (adapter, "fledge merge")):
        with pytest.raises(UserError, match=f"--model far: vLLM cannot serve .*{why}"):
            check_directory("far", path)


def test_finding_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"pip install 'fledge\[vllm\]'.*--vllm"):
        find_program("stand-in-of-vllm")
    path = program(tmp_path, "", "stand-in-of-vllm")
    assert find_program("stand-in-of-vllm") == find_program(str(path)) == str(path)
    with pytest.raises(UserError, match="no program"):
        find_program(str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))  # the extra's place, without a PATH
    monkeypatch.setenv("PATH", "")
    assert find_program("stand-in-of-vllm") == str(path)


def start(directory: Path, path: Path, told: list[str] | None = None) -> VllmProcess:
    return VllmProcess("far", directory, Wishes(program=str(path)), ([] if told is None else told).append)


def test_one_that_dies_at_once(directory: Path, tmp_path: Path) -> None:
    code = "print('loading', flush=True)\nsys.exit('ValueError: no GPU')"
    told: list[str] = []
    process = start(directory, program(tmp_path, code), told)
    with pytest.raises(UserError, match=r"--model far: vLLM ended with exit code 1: loading / .* no GPU"):
        process.ready(20)
    assert told == ["far: loading", "far: ValueError: no GPU"]
    process.close()
    assert not process.place.exists()


def test_one_that_never_serves(directory: Path, tmp_path: Path) -> None:
    process = start(directory, program(tmp_path, "import time\ntime.sleep(60)"))
    with pytest.raises(UserError, match=r"--start-seconds 0.2: vLLM has not begun to serve far"):
        process.ready(0.2)
    assert not process.has_ended and os.stat(process.place).st_mode & 0o077 == 0
    close_all([process])
    assert process.has_ended


def test_one_that_does_not_want_to_end(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import signal, subprocess, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen(['sleep', '60'])\nprint(child.pid, flush=True)\ntime.sleep(60)"
    )
    monkeypatch.setattr(vllm, "END_SECONDS", 0.2)
    told: list[str] = []
    process = start(directory, program(tmp_path, code), told)
    until(lambda: bool(told))
    child = int(told[0].removeprefix("far: "))
    assert is_there(child)
    process.close()
    assert process.process.returncode == -signal.SIGKILL and "by force" in told[1]
    until(lambda: not is_there(child))


@linux_only
def test_it_ends_with_us_even_if_we_are_killed(directory: Path, tmp_path: Path) -> None:
    path = program(tmp_path, "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)")
    code = (
        "import time\nfrom pathlib import Path\nfrom fledge.serve.vllm import VllmProcess, Wishes\n"
        f"it = VllmProcess('far', Path({str(directory)!r}), Wishes(program={str(path)!r}), "
        "lambda line: print(line, flush=True))\ntime.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    environment["TMPDIR"] = str(tmp_path)  # for what a killed process leaves behind
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline().removeprefix("far: "))
        assert is_there(child)
        parent.kill()
    until(lambda: not is_there(child))


def test_it_does_not_start_for_one_that_has_ended() -> None:
    command = [sys.executable, tied.__file__, "999999999", "/bin/echo", "started"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 1 and not found.stdout and "has ended" in found.stderr


@pytest.fixture(scope="module")
def told() -> list[str]:
    return []


@pytest.fixture(scope="module")
def running(
    directory: Path, tmp_path_factory: pytest.TempPathFactory, told: list[str]
) -> Iterator[VllmProcess]:
    path = stand_in(tmp_path_factory.mktemp("bin"))
    wishes = Wishes(program=str(path), weights="fp32", context=512, answer_tokens=12)
    process = VllmProcess("far", directory, wishes, told.append)
    yield process
    process.close()


@pytest.fixture
def near(running: VllmProcess) -> Iterator[Serving]:
    with serving(relay=Relay(running.ready(60))) as server:
        yield server


@pytest.mark.slow
def test_its_models_are_ours(near: Serving, running: VllmProcess, directory: Path) -> None:
    with near.client() as client:
        (model,) = client.get("/v1/models").json()["data"]
        assert (model["id"], model["max_model_len"]) == ("far", 512)
        assert "<html" in client.get("/").text
    body = {"messages": ASK, "temperature": 0, "max_tokens": 100}
    answer = near.post("/v1/chat/completions", body).json()  # the only model needs no name
    assert answer["usage"]["completion_tokens"] == 12 and answer["model"] == "far"
    streamed = near.post("/v1/chat/completions", {**body, "model": "far", "stream": True})
    pieces = [json.loads(line)["choices"][0]["delta"].get("content") for line in events(streamed)[:-1]]
    assert "".join(filter(None, pieces)) == answer["choices"][0]["message"]["content"]
    text = near.post("/v1/completions", {"model": "far", "prompt": "The cats", "max_tokens": 3}).json()
    assert text["usage"]["completion_tokens"] == 3
    refused = near.post("/v1/completions", {"model": "none", "prompt": "The"})
    assert refused.status_code == 404


@pytest.mark.slow
def test_its_key_is_ours_alone(near: Serving, running: VllmProcess, told: list[str]) -> None:
    called = json.loads(told[0].removeprefix("far: "))
    assert called["reports"] == "1" and running.key not in told[0] and len(running.key) > 40
    transport = httpx2.HTTPTransport(uds=str(running.socket_file))
    with httpx2.Client(base_url="http://vllm", transport=transport) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/v1/models").status_code == 401
    if sys.platform == "linux":
        command = Path(f"/proc/{running.process.pid}/cmdline").read_text()
        assert "stand-in" in command or "vllm" in command
        assert running.key not in command


@pytest.mark.slow
def test_several_beside_each_other(directory: Path, tmp_path: Path, running: VllmProcess) -> None:
    other = VllmProcess(
        "other", directory, Wishes(program=str(stand_in(tmp_path)), answer_tokens=5), [].append
    )
    try:
        first, second = running.ready(60), other.ready(60)
        with pytest.raises(UserError, match="'far' is also a model of"):
            Relay(first, second, first)
        with serving(relay=Relay(first, second)) as near:
            with near.client() as client:
                assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["far", "other"]
            body = {"prompt": "The cats sat", "temperature": 0, "max_tokens": 50, "ignore_eos": True}
            for name, length in (("far", 12), ("other", 5), (None, 12)):
                made = near.post("/v1/completions", body | ({"model": name} if name else {})).json()
                assert (made["model"], made["usage"]["completion_tokens"]) == (name or "far", length)
            ended: list[bool] = []
            other.when_ended = lambda: ended.append(True)
            os.kill(other.process.pid, signal.SIGKILL)
            until(lambda: bool(ended))
            assert "ended by signal 9" in str(other.ended())
            lost = near.post("/v1/completions", {**body, "model": "other"})
            assert lost.status_code == 502 and lost.json()["error"]["code"] == "bad_gateway"
            assert near.post("/v1/completions", {**body, "model": "far"}).status_code == 200
    finally:
        other.close()
