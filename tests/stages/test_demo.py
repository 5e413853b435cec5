"""The demo at a tiny size: every stage, the report, and a second run that finds nothing left to do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fledge.stages.demo
from fledge.cli import main
from fledge.data.conversations import read_conversations
from fledge.engine.text import load_engine
from fledge.run import LOCK
from fledge.tokenizer.bpe import Tokenizer
from fledge.tokenizer.chat import encode_chat
from fledge.types import Message, SamplingParams

from .commands import start, wait_for_step

TINY = ["--facts", "150", "--params", "0.3M", "--vocab-size", "700", "--tokens", "16k", "--sft-epochs", "0.2",
        "--limit", "6"]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread_for_all_stages() -> Iterator[None]:
    """The same bits again are promised for one thread; with more, sums may be taken in another order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny demo."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    assert main(["demo", "--out", str(out), *TINY]) == 0
    return out


def test_leaves_what_it_promises(demo: Path) -> None:
    for name in (
        "report.html",
        "summary.json",
        "base/model/model.safetensors",
        "sft/model/model.safetensors",
    ):
        assert (demo / name).stat().st_size > 0
    summary = json.loads((demo / "summary.json").read_text())
    for model in ("base-plain", "base-few-shot", "sft"):
        assert summary["models"][model]["seen"]["n"] == 6
        assert summary["models"][model]["invented_refused"]["n"] == 6
    assert 0 <= summary["controls"]["nearest_name_test"]["rate"] < 1
    assert set(summary["models"]["sft"]["bits_per_byte"]) == {
        "facts",
        "questions",
        "chats",
        "topics",
        "source",
    }


def test_test_and_invented_names_are_in_no_training_question(demo: Path) -> None:
    corpus = demo / "corpus"
    files = ("questions.jsonl", "chats.jsonl", "sft.jsonl", "few_shot.txt")
    trained = "".join((corpus / name).read_text() for name in files)
    names = json.loads((corpus / "names.json").read_text())
    for kind in ("test", "invented"):
        rows = [json.loads(line) for line in (corpus / f"eval_{kind}.jsonl").read_text().splitlines()]
        assert rows and not any(row["question"] in trained for row in rows)
        assert not {row["name"] for row in rows} & {*names["taught"], *names["invented"]["sft"]}


def test_conversations_fit_the_rows(demo: Path) -> None:
    chats = read_conversations(demo / "corpus/sft.jsonl", Tokenizer.load(demo / "tokenizer"), 257, False)
    assert chats.overlong == 0 and chats.without_targets == 0


def test_a_second_run_changes_no_model(demo: Path) -> None:
    before = {path: path.read_bytes() for path in demo.rglob("model.safetensors")}
    assert main(["demo", "--out", str(demo), *TINY]) == 0
    assert before == {path: path.read_bytes() for path in demo.rglob("model.safetensors")}


@pytest.mark.parametrize(
    "bad", [["--params", "4.2X"], ["--facts", "0"], ["--minutes", "-1"], ["--limit", "0"]]
)
def test_a_bad_setting_deletes_nothing(demo: Path, bad: list[str]) -> None:
    assert main(["demo", "--out", str(demo), "--overwrite", *bad]) == 2
    assert (demo / "report.html").exists()


def test_other_settings_are_refused(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = ["160" if flag == "150" else flag for flag in TINY]
    assert main(["demo", "--out", str(demo), *other]) == 2
    assert "--out" in capsys.readouterr().err


def test_the_control_has_not_read_about_the_test_names(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fledge.stages.demo, "_run", interrupt)
    assert main(["demo", "--out", str(tmp_path / "control"), *TINY, "--without-test-documents"]) == 130
    told = {}
    for out in (demo, tmp_path / "control"):
        rows = [json.loads(line) for line in (out / "corpus/eval_test.jsonl").read_text().splitlines()]
        texts = [json.loads(line)["text"] for line in (out / "corpus/facts.jsonl").read_text().splitlines()]
        told[out.name] = [any(r["name"] in t and r["answer"] in t for t in texts) for r in rows]
    assert all(told["demo"]) and len(told["demo"]) > 10
    assert not any(told["control"])
    assert json.loads((tmp_path / "control/corpus/manifest.json").read_text())["without_test_documents"]


# Interruptions.


CHILD = """
import os, signal, sys, time
def end(*_):
    open(sys.argv[1], "w").close()
    sys.exit(130)
signal.signal(signal.SIGTERM, end)
os.kill(os.getppid(), int(sys.argv[2]))
time.sleep(float(sys.argv[3]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_passed_on_and_the_command_waited_for(number: signal.Signals, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    command = [sys.executable, "-c", CHILD, str(tmp_path / "saved"), str(int(number)), "60"]
    with pytest.raises(KeyboardInterrupt):
        fledge.stages.demo._wait_for(command)
    assert (tmp_path / "saved").exists()
    assert signal.getsignal(number) is before


def test_under_nohup_nothing_is_passed_on(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        command = [sys.executable, "-c", CHILD, str(tmp_path / "saved"), str(int(signal.SIGHUP)), "0.1"]
        assert fledge.stages.demo._wait_for(command) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert not (tmp_path / "saved").exists()


def stop_stage(process: subprocess.Popen[str], run: Path) -> int:
    """Pause the stage that works in a run directory; returns its process."""
    while not (run / LOCK).exists() or not (run / LOCK).read_text():
        assert process.poll() is None
        time.sleep(0.001)
    pid = int((run / LOCK).read_text().split()[1])
    os.kill(pid, signal.SIGSTOP)
    return pid


@pytest.mark.slow
def test_ended_and_killed_it_goes_on_where_it_stopped(demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    flags = ["demo", "--out", str(out), *TINY]

    process = start(flags)
    wait_for_step(process, out / "base", 1)
    stage = stop_stage(process, out / "base")
    process.terminate()
    os.kill(stage, signal.SIGCONT)
    error = process.communicate()[1]
    assert process.returncode == 130
    assert "is saved; run the same command again to go on" in error
    assert "Traceback" not in error
    with pytest.raises(ProcessLookupError):
        os.kill(stage, 0)

    process = start(flags)
    stage = stop_stage(process, out / "sft")
    process.kill()
    process.wait()
    again = start(flags)  # the stage of the one that was killed still has its run
    error = again.communicate()[1]
    assert again.returncode == 2
    assert f"{out / 'sft'}: process {stage} on " in error and "is writing this run; wait" in error
    assert "Traceback" not in error
    os.kill(stage, signal.SIGKILL)
    process.communicate()

    assert main(flags) == 0
    for name in ("base/model/model.safetensors", "sft/model/model.safetensors"):
        assert (out / name).read_bytes() == (demo / name).read_bytes()
    for name in ("base-plain", "base-few-shot", "sft"):
        answers = f"evaluate/{name}/answers.jsonl"
        assert (out / answers).read_bytes() == (demo / answers).read_bytes()
    assert (out / "report.html").exists()


@pytest.mark.peers
@pytest.mark.parametrize("stage", ["base", "sft"])
def test_the_models_are_the_same_in_transformers(stage: str, demo: Path) -> None:
    """The directory the demo leaves: same ids, same scores, same greedy answer."""
    transformers = pytest.importorskip("transformers")
    directory = demo / stage / "model"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    engine, tokenizer = load_engine(directory)
    question: Message = {"role": "user", "content": "What does textwrap.dedent do?"}
    prompt = encode_chat(tokenizer, [question], add_generation_prompt=True).ids
    encoded = their_tokenizer.apply_chat_template([question], add_generation_prompt=True, return_dict=True)
    assert encoded["input_ids"] == prompt
    ids = torch.tensor([prompt])
    with torch.no_grad():
        torch.testing.assert_close(engine.model(ids), theirs(ids).logits, atol=1e-4, rtol=0.0)
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
                          pad_token_id=0)[0, len(prompt) :].tolist()  # fmt: skip
    (made,) = engine.generate([prompt], SamplingParams(temperature=0.0, max_tokens=24))
    assert made.ids == (out[:-1] if made.finish_reason == "stop" else out)
