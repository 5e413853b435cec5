"""The demo at a tiny size: every stage, the report, and a second run that finds nothing left to do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import fledge.commands
import fledge.stages.demo
from fledge.cli import main
from fledge.data.conversations import read_conversations
from fledge.data.fact_texts import answer, questions, tokens
from fledge.engine.text import load_engine
from fledge.evals.demo_alignment import is_held_out, make_preferences
from fledge.files import remove
from fledge.model.transformer import CausalLM
from fledge.run import LOCK
from fledge.tokenizer.bpe import Tokenizer
from fledge.tokenizer.chat import encode_chat
from fledge.train.recipe import adapted, model_config, parse_count, recipe_for
from fledge.types import Message, SamplingParams

from .commands import start, wait_for_step

TINY = ["--facts", "150", "--params", "0.3M", "--vocab-size", "700", "--tokens", "16k", "--sft-epochs", "0.2",
        "--limit", "6"]  # fmt: skip
ALIGNED = [*TINY, "--align", "dpo"]


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
    assert main(["demo", "--out", str(out), *ALIGNED]) == 0
    return out


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def until_pretraining(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Let demos run until pretraining is to begin; returns what stages are asked for, by their verbs."""
    asked: dict[str, dict[str, Any]] = {}
    run = fledge.stages.demo.run_verb

    def note(console: Console, verb: str, **settings: Any) -> None:
        asked[verb] = settings
        if verb == "pretrain":
            raise KeyboardInterrupt
        run(console, verb, **settings)

    monkeypatch.setattr(fledge.stages.demo, "run_verb", note)
    return asked


def copied(demo: Path, out: Path, *without: str, align: str = "dpo") -> Path:
    """The demo elsewhere, as if it had been stopped before `without` were made."""
    shutil.copytree(demo, out, ignore=shutil.ignore_patterns("report.html", "summary.json", ".lock"))
    for path in demo.rglob("summary.json"):
        if path.parent != demo:
            shutil.copy(path, out / path.relative_to(demo))
    for name in without:
        remove(out / name)
    config = (demo / "config.toml").read_text().replace(str(demo), str(out)).replace('"dpo"', f'"{align}"')
    (out / "config.toml").write_text(config)
    return out


def without_commands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the demo run no command; returns the verbs that it would have run."""
    ran: list[str] = []
    monkeypatch.setattr(fledge.stages.demo, "run_verb", lambda console, verb, **settings: ran.append(verb))
    return ran


def test_leaves_what_it_promises(demo: Path) -> None:
    for name in (
        "report.html",
        "summary.json",
        "base/model/model.safetensors",
        "sft/model/model.safetensors",
        "preferences/train.jsonl",
        "reward/model/model.safetensors",
        "dpo/model/model.safetensors",
    ):
        assert (demo / name).stat().st_size > 0
    summary = json.loads((demo / "summary.json").read_text())
    for model in ("base-plain", "base-few-shot", "sft", "aligned"):
        assert summary["models"][model]["seen"]["n"] == 6
        assert summary["models"][model]["invented_refused"]["n"] == 6
        assert summary["models"][model]["invented_as_asked"]["n"] == 6
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


def test_refusals_break_names_off_between_tokens(demo: Path) -> None:
    tokenizer = Tokenizer.load(demo / "tokenizer")
    names = json.loads((demo / "corpus/names.json").read_text())
    known = {start for name in names["real"] for start in accumulate(tokens(tokenizer, name))}
    asked = {question: name for name in names["invented"]["sft"] for question in questions(name)}
    checked = 0
    for source in ("chats", "sft"):
        for row in rows_of(demo / f"corpus/{source}.jsonl"):
            for question, said in zip(row["messages"][::2], row["messages"][1::2], strict=True):
                if question["content"] in asked and "...?" in said["content"]:
                    starts = list(accumulate(tokens(tokenizer, asked[question["content"]])))
                    read = [start for start in starts if start in known]
                    assert read == starts[: len(read)]
                    assert said["content"].split("...?")[0] == read[-1].rstrip("._")
                    checked += 1
    assert checked > 50


@pytest.mark.parametrize("name", ["zlib", "os.path.is_file", "typing.NamedTuple", "re", "poplib.POP3.pass_"])
def test_the_tokens_of_a_name_make_it_up(name: str, demo: Path) -> None:
    tokenizer = Tokenizer.load(demo / "tokenizer")
    found = tokens(tokenizer, name)
    assert "".join(found) == name
    in_an_answer = [tokenizer.decode([i]) for i in tokenizer.encode(answer(name, "Does it."))]
    assert found[:-1] == in_an_answer[: len(found) - 1]


def test_no_test_name_is_in_a_preference(demo: Path) -> None:
    names = json.loads((demo / "corpus/names.json").read_text())
    test = {name for name, split in names["real"].items() if split == "test"} | set(names["invented"]["test"])
    assert len(test) > 20
    asked = rows_of(demo / "corpus/preference.jsonl")
    assert {row["split"] for row in asked} == {"sft", "preference", "invented"}
    assert not {row["name"] for row in asked} & test
    names_of = {row["question"]: row["name"] for row in asked}
    files = [demo / "preferences" / f"{name}.jsonl" for name in ("train", "held_out", "prompts")]
    found = [names_of[row["prompt"]] for path in files for row in rows_of(path)]
    assert found and not set(found) & test


def test_preferences_are_simulated_limited_and_apart_by_name(demo: Path) -> None:
    train, held = (rows_of(demo / "preferences" / f"{name}.jsonl") for name in ("train", "held_out"))
    assert train and all(row["simulated"] is True and row["labeler"] == "rule" for row in [*train, *held])
    by_question = {row["question"]: row for row in rows_of(demo / "corpus/preference.jsonl")}
    for rows, side in ((train, False), (held, True)):
        assert all(is_held_out(by_question[row["prompt"]]["name"]) is side for row in rows)
    prompts = {row["prompt"] for row in rows_of(demo / "preferences/prompts.jsonl")}
    assert prompts >= {row["prompt"] for row in train} and not prompts & {row["prompt"] for row in held}
    asked = json.loads((demo / "preferences/summary.json").read_text())
    assert 6 < asked["questions"] <= 18 and asked["questions"] >= asked["train"]["questions"] == len(prompts)


def test_alignment_is_measured(demo: Path) -> None:
    alignment = json.loads((demo / "summary.json").read_text())["alignment"]
    assert alignment["method"] == "dpo"
    curve = alignment["best_of"]["curve"]
    assert [point["n"] for point in curve] == [1, 2, 4, 8, 16] and alignment["best_of"]["prompts"] == 12
    assert all(a["reward"] < b["reward"] for a, b in pairwise(curve))
    assert all(-1 <= point["gold"] <= 1 for point in curve)
    comparison = alignment["comparison"]
    sft, aligned = (rows_of(demo / f"evaluate/{name}/answers.jsonl") for name in ("sft", "dpo"))
    for rows, key in ((sft, "before"), (aligned, "after")):
        test = [row for row in rows if row["set"] == "eval_test"]
        assert comparison["test_right"][key] == sum(row["f1"] >= 0.8 for row in test) / len(test)
        invented = [row for row in rows if row["set"] == "eval_invented"]
        answered = sum(not row["refused"] for row in invented) / len(invented)
        assert comparison["invented_answered"][key] == answered
    assert comparison["kl"]["n"] == 12 and comparison["kl"]["low"] <= comparison["kl"]["mean"]


def test_without_an_alignment_it_stops_after_fine_tuning(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = ("preferences", "reward", "dpo", "evaluate/dpo", "best_of.json", "comparison_dpo.json")
    out = copied(demo, tmp_path / "demo", *made, align="none")
    ran = without_commands(monkeypatch)
    assert main(["demo", "--out", str(out), *TINY, "--align", "none"]) == 0
    assert ran == ["pretrain", "sft"] and not [name for name in made if (out / name).exists()]
    summary = json.loads((out / "summary.json").read_text())
    assert "alignment" not in summary and "aligned" not in summary["models"]
    said = capsys.readouterr().err
    assert f"chat --model {out / 'sft/model'}" in said
    assert f"serve --model base={out / 'base/model'} sft={out / 'sft/model'}" in said


def test_the_parts_that_are_done_are_not_done_again(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped between two parts, the next run makes what is missing as it would have been."""
    out = copied(demo, tmp_path / "demo", "comparison_dpo.json")
    marked = json.loads((demo / "best_of.json").read_text()) | {"seconds": 12345.0}
    (out / "best_of.json").write_text(json.dumps(marked))
    ran = without_commands(monkeypatch)
    assert main(["demo", "--out", str(out), *ALIGNED]) == 0
    assert ran == ["pretrain", "sft", "reward", "dpo"]  # whose runs are finished: they say so and end
    assert json.loads((out / "best_of.json").read_text())["seconds"] == 12345.0
    again, first = (json.loads((run / "comparison_dpo.json").read_text()) for run in (out, demo))
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    assert f"chat --model {out / 'dpo/model'}" in capsys.readouterr().err


def test_preferences_are_the_same_again(demo: Path, tmp_path: Path) -> None:
    """A run that is killed while it asks leaves no preferences; the next one makes the same."""
    again = tmp_path / "preferences"
    make_preferences(demo / "sft/model", demo / "corpus/preference.jsonl", again, 0, 6)
    for name in ("train.jsonl", "held_out.jsonl", "prompts.jsonl"):
        assert (again / name).read_bytes() == (demo / "preferences" / name).read_bytes()


def moved(demo: Path, out: Path) -> Path:
    """The same demo elsewhere, in all of its configurations."""
    shutil.copytree(demo, out, ignore=shutil.ignore_patterns(".lock"))
    for path in out.rglob("config.toml"):
        path.write_text(path.read_text().replace(str(demo), str(out)))
    return out


def test_a_finished_demo_is_aligned_later(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that stopped after fine-tuning goes on from there, and so does one that was aligned otherwise."""
    out = copied(demo, tmp_path / "demo", align="none")
    ran = without_commands(monkeypatch)
    plain, aligned = ["demo", "--out", str(out), *TINY], ["demo", "--out", str(out), *ALIGNED]
    assert main(plain) == 0
    assert "alignment" not in json.loads((out / "summary.json").read_text())
    assert main(aligned) == 0
    assert ran == ["pretrain", "sft", "pretrain", "sft", "reward", "dpo"]
    assert json.loads((out / "summary.json").read_text())["alignment"]["method"] == "dpo"
    assert "After DPO" in (out / "report.html").read_text()
    ran.clear()
    capsys.readouterr()
    assert main(aligned) == main(plain) == 0 and ran == []
    assert capsys.readouterr().err.count(f"chat --model {out / 'dpo/model'}") == 2
    assert main([*plain, "--seed", "1"]) == 2, "another configuration all the same"


@pytest.mark.slow
def test_aligned_by_both(demo: Path, tmp_path: Path) -> None:
    """PPO after DPO, from the same preferences and reward model; the report is about what was asked last."""
    out = moved(demo, tmp_path / "demo")
    reward = (out / "reward/model/model.safetensors").read_bytes()
    assert main(["demo", "--out", str(out), *TINY, "--align", "ppo"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["alignment"]["method"] == "ppo" and summary["models"]["aligned"]["seen"]["n"] == 6
    assert "After PPO" in (out / "report.html").read_text()
    weights = [(out / f"{name}/model/model.safetensors").read_bytes() for name in ("sft", "dpo", "ppo")]
    assert len(set(weights)) == 3
    assert (out / "reward/model/model.safetensors").read_bytes() == reward
    assert main(["demo", "--out", str(out), *ALIGNED]) == 0
    assert json.loads((out / "summary.json").read_text())["alignment"]["method"] == "dpo"


def test_conversations_fit_the_rows(demo: Path) -> None:
    chats = read_conversations(demo / "corpus/sft.jsonl", Tokenizer.load(demo / "tokenizer"), 257, False)
    assert chats.overlong == 0 and chats.without_targets == 0


def test_a_second_run_changes_no_model(demo: Path) -> None:
    before = {path: path.read_bytes() for path in demo.rglob("model.safetensors")}
    assert main(["demo", "--out", str(demo), *ALIGNED]) == 0
    assert before == {path: path.read_bytes() for path in demo.rglob("model.safetensors")}


@pytest.mark.parametrize(
    "bad", [["--params", "4.2X"], ["--facts", "0"], ["--minutes", "-1"], ["--limit", "0"]]
)
def test_a_bad_setting_deletes_nothing(demo: Path, bad: list[str]) -> None:
    assert main(["demo", "--out", str(demo), "--overwrite", *bad]) == 2
    assert (demo / "report.html").exists()


def test_other_settings_are_refused(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = ["160" if flag == "150" else flag for flag in ALIGNED]
    assert main(["demo", "--out", str(demo), *other]) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "layers"), [([], 8), (["--params", "4.2M"], None)])
def test_the_model_is_deep_unless_its_size_is_asked_for(
    flags: list[str], layers: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = until_pretraining(monkeypatch)
    size = ["--facts", "150", "--vocab-size", "700"]
    assert main(["demo", "--out", str(tmp_path / "demo"), *size, *flags]) == 130
    assert asked["pretrain"].get("layers") == layers


def test_the_default_shape_has_the_size_it_says() -> None:
    shape = fledge.stages.demo.SHAPE
    recipe = recipe_for(parse_count(shape["params"], "params"), 4096)
    recipe = adapted(recipe, 512, shape["hidden_size"], layers=shape["layers"])
    parameters = CausalLM(model_config(recipe, "qwen3", 4096, 1024)).num_parameters()
    assert parameters == pytest.approx(parse_count(shape["params"], "params"), rel=0.02)


def test_the_control_has_not_read_about_the_test_names(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    until_pretraining(monkeypatch)
    assert main(["demo", "--out", str(tmp_path / "control"), *ALIGNED, "--without-test-documents"]) == 130
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
        fledge.commands.wait_for(command)
    assert (tmp_path / "saved").exists()
    assert signal.getsignal(number) is before


def test_under_nohup_nothing_is_passed_on(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        command = [sys.executable, "-c", CHILD, str(tmp_path / "saved"), str(int(signal.SIGHUP)), "0.1"]
        assert fledge.commands.wait_for(command) == 0
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
    flags = ["demo", "--out", str(out), *ALIGNED]

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

    process = start(flags)
    stage = stop_stage(process, out / "reward")  # the preferences are made before
    process.terminate()
    os.kill(stage, signal.SIGCONT)
    process.communicate()
    assert process.returncode == 130

    assert main(flags) == 0
    for name in ("base", "sft", "reward", "dpo"):
        weights = f"{name}/model/model.safetensors"
        assert (out / weights).read_bytes() == (demo / weights).read_bytes()
    for name in ("preferences/train.jsonl", "preferences/held_out.jsonl", "preferences/prompts.jsonl"):
        assert (out / name).read_bytes() == (demo / name).read_bytes()
    for name in ("base-plain", "base-few-shot", "sft", "dpo"):
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
