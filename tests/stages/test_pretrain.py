"""`fledge pretrain` as a user meets it: what it writes, what it refuses, and that nothing ever gets lost."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import fledge.stages.pretrain
import fledge.train.checkpoints
from fledge import cli
from fledge.data.sources import parse_sources, read_documents, split_documents
from fledge.device import can_compile
from fledge.model.checkpoint import load_model
from fledge.run import LOCK, Run
from fledge.tokenizer.bpe import Tokenizer
from fledge.train.losses import Forward, Term, next_token_loss
from fledge.types import Batch

from .commands import changed, metrics, snapshot, start, wait_for_step, weights, without

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def flags(corpus: Path, tokenizer_directory: Path, tiny: list[str], tmp_path: Path) -> list[str]:
    """24 steps, saved and evaluated after every sixth, in `tmp_path/run`."""
    return [
        "pretrain", "--data", str(corpus / "words.txt"), "--tokenizer", str(tokenizer_directory), *tiny,
        "--tokens", str(24 * 512), "--evaluations", "4", "--out", str(tmp_path / "run"),
        "--shards", str(corpus.parent / "shards"),
    ]  # fmt: skip


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on stderr, which must be the only error."""
    printed = capsys.readouterr().err
    assert printed.count("error:") == 1
    assert "Traceback" not in printed
    return printed.splitlines()[-1]


# What it does.


def test_what_is_written(base_run: Path, tokenizer_directory: Path, corpus: Path) -> None:
    assert {path.name for path in base_run.iterdir()} == {
        LOCK, "config.toml", "environment.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "model",
        "summary.json",
    }  # fmt: skip
    summary = json.loads((base_run / "summary.json").read_text())
    model = load_model(base_run / "model")
    rows = metrics(base_run)
    assert summary["stage"] == "pretrain"
    assert summary["parameters"] == model.num_parameters()
    assert summary["steps"] == round(30_000 / 512) == rows[-1]["step"]
    assert summary["tokens"] == summary["steps"] * 512
    assert summary["skipped_steps"] == 0
    assert summary["bits_per_byte"] == {"words": rows[-1]["validation/words"]}
    (source,) = parse_sources([str(corpus / "words.txt")])
    texts, held_out = split_documents(list(read_documents(source)), 0.01)
    size = sum(map(len, Tokenizer.load(tokenizer_directory).encode_batch(texts))) + len(texts)
    assert summary["epochs"] == {"words": pytest.approx(summary["tokens"] / size, abs=1e-3)}
    account = summary["sources"]["words"]
    assert account["tokenised"] == size + account["held_out"]
    assert account["documents"] == len(texts) + len(held_out)
    assert (account["trained"], account["dropped"], account["unused"]) == (size, 0, 0)
    assert (account["seen"], account["share"]) == (summary["tokens"], 1.0)
    lineage = json.loads((base_run / "model" / "lineage.json").read_text())
    assert (lineage["stage"], lineage["parent"], lineage["tokens"]) == ("pretrain", None, summary["tokens"])
    assert lineage["tokenizer"] == Tokenizer.load(base_run / "model").fingerprint()
    assert lineage["data"].keys() == {"words"}
    samples = [json.loads(line) for line in (base_run / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [row["step"] for row in rows if "lr" not in row]
    assert {row["prompt"] for row in samples} == {"the quick"}


def test_it_learns(base_run: Path) -> None:
    """19 words drawn at random have 4.25 bits each, 0.84 a byte; without learning it is over 3."""
    evaluations = [row for row in metrics(base_run) if "validation" in row]
    assert evaluations[0]["validation"] > 3
    assert 0.7 < evaluations[-1]["validation"] < 1.2


def test_every_checkpoint_is_a_model_directory(base_run: Path) -> None:
    paths = [checkpoint.path for checkpoint in Run(base_run).checkpoints()]
    assert len(paths) >= 2
    for path in paths:
        assert load_model(path).num_parameters() == load_model(base_run / "model").num_parameters()
        Tokenizer.load(path)
        assert json.loads((path / "lineage.json").read_text())["tokens"] == int(path.name[5:]) * 512
    final, last = (
        load_file(base_run / "model" / "model.safetensors"),
        load_file(paths[-1] / "model.safetensors"),
    )
    assert all(torch.equal(final[name], last[name]) for name in final)


@pytest.mark.parametrize(
    "more",
    [
        ["--model-type", "llama"],
        ["--optimizer", "adamw", "--adam-lr", "0.003"],
        ["--isolate-documents"],
        ["--packing", "best-fit"],
        ["--packing", "best-fit", "--isolate-documents"],
        ["--micro-batch-tokens", "64"],
        ["--compute", "bf16"],
        ["--weight-decay", "0.1"],
    ],
)
def test_variants_learn_too(more: list[str], flags: list[str], tmp_path: Path) -> None:
    assert cli.main(changed(flags, *more)) == 0
    evaluations = [row["validation"] for row in metrics(tmp_path / "run") if "validation" in row]
    assert evaluations[-1] < 0.7 * evaluations[0]


def test_micro_batches_change_nothing_but_memory(flags: list[str], tmp_path: Path) -> None:
    losses = []
    for size in ("64", "192", "16384"):
        out = tmp_path / size
        assert (
            cli.main(changed(flags, "--tokens", "2048", "--micro-batch-tokens", size, "--out", str(out))) == 0
        )
        losses.append([row["loss"] for row in metrics(out) if "loss" in row])
    assert losses[0] == pytest.approx(losses[2], abs=1e-4)
    assert losses[1] == pytest.approx(losses[2], abs=1e-4)


def test_sources_are_mixed_by_their_weights(flags: list[str], corpus: Path, tmp_path: Path) -> None:
    data = [f"[/w]={corpus / 'words.txt'}:3", f"n={corpus / 'numbers.jsonl'}:1"]  # no markup to rich
    assert cli.main(changed(flags, "--data", *data)) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["bits_per_byte"].keys() == {"[/w]", "n"}
    last = metrics(tmp_path / "run")[-1]
    assert last["validation"] == pytest.approx(0.75 * last["validation/[/w]"] + 0.25 * last["validation/n"])


def test_minutes_set_the_number_of_steps_once(flags: list[str], tmp_path: Path) -> None:
    assert cli.main([*without(flags, "--tokens"), "--minutes", "0.02"]) == 0
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["total_steps"] == json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] > 5


MIXTURE = """\
[sources.words]
path = "words.txt"
weight = 3
max_epochs = {most}

[sources.numbers]
path = "numbers.jsonl"
weight = 1
"""


@pytest.fixture
def mixture(corpus: Path, tmp_path: Path) -> Path:
    for name in ("words.txt", "numbers.jsonl"):
        (tmp_path / name).write_bytes((corpus / name).read_bytes())
    path = tmp_path / "mixture.toml"
    path.write_text(MIXTURE.format(most=1.5))
    return path


def test_a_mixture_file_is_what_its_sources_are_as_flags(
    flags: list[str], mixture: Path, tmp_path: Path
) -> None:
    assert cli.main(changed(flags, "--data", str(mixture))) == 0
    data = [f"words={tmp_path / 'words.txt'}:3", f"numbers={tmp_path / 'numbers.jsonl'}:1"]
    other = tmp_path / "other"
    assert cli.main(changed(flags, "--data", *data, "--out", str(other))) == 0
    assert metrics(tmp_path / "run") == metrics(other)
    assert weights(tmp_path / "run") == weights(other)


def test_weights_of_flags_win(flags: list[str], mixture: Path, tmp_path: Path) -> None:
    assert cli.main(changed(flags, "--data", str(mixture), "--weights", "numbers=3")) == 0
    sources = json.loads((tmp_path / "run" / "summary.json").read_text())["sources"]
    assert sources["words"]["share"] == sources["numbers"]["share"] == 0.5


def test_a_maximum_of_epochs_is_kept(
    flags: list[str], mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By --tokens it is refused before anything is written; --minutes stop there."""
    command = changed(flags, "--data", str(mixture), "--tokens", "200k")
    assert cli.main(command) == 2
    error = error_of(capsys)
    assert "source 'words' would be seen" in error
    assert not (tmp_path / "run").exists()
    most = error.split("--tokens ")[1].split(",")[0]
    assert cli.main(changed(command, "--tokens", str(int(most) + 500), "--out", str(tmp_path / "other"))) == 0
    assert cli.main(changed(command, "--tokens", most)) == 0
    epochs = json.loads((tmp_path / "run" / "summary.json").read_text())["epochs"]
    assert 1.4 < epochs["words"] <= 1.5
    timed = [*without(changed(flags, "--data", str(mixture)), "--tokens"), "--minutes", "1"]
    assert cli.main(changed(timed, "--out", str(tmp_path / "timed"))) == 0
    epochs = json.loads((tmp_path / "timed" / "summary.json").read_text())["epochs"]
    assert 1.4 < epochs["words"] <= 1.5


def test_rows_may_be_as_long_as_the_context(flags: list[str], tmp_path: Path, corpus: Path) -> None:
    """Held-out documents fill whole rows, and are scored all the same."""
    long = tmp_path / "long.txt"
    text = (corpus / "words.txt").read_text().replace("\n<|endoftext|>\n", " ")
    long.write_text("\n<|endoftext|>\n".join(text[i : i + 2000] for i in range(0, 30_000, 2000)))
    assert cli.main(changed(flags, "--data", str(long), "--row-tokens", "128", "--context", "128")) == 0


def test_a_mixture_smaller_than_a_batch_is_refused(
    flags: list[str], mixture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(changed(flags, "--data", str(mixture), "--batch-tokens", "640000")) == 2
    assert "fewer than one batch of 640,000" in error_of(capsys)


def test_bad_lines_can_be_skipped(
    flags: list[str], mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "numbers.jsonl").open("a") as file:
        file.write('\n{"text": 3}\n{"text"\n')
    command = changed(flags, "--data", str(mixture))
    assert cli.main(command) == 2
    assert "--skip-bad-lines" in error_of(capsys)
    assert cli.main([*command, "--skip-bad-lines"]) == 0
    sources = json.loads((tmp_path / "run" / "summary.json").read_text())["sources"]
    assert (sources["numbers"]["skipped_lines"], sources["words"]["skipped_lines"]) == (2, 0)
    assert "2 lines could not be read and were skipped" in capsys.readouterr().err


def test_a_source_that_vanishes_or_changes_is_named(
    flags: list[str], mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(changed(flags, "--data", str(mixture))) == 0
    (tmp_path / "run" / "summary.json").unlink()  # so it is not finished
    kept = (tmp_path / "numbers.jsonl").read_text()
    (tmp_path / "numbers.jsonl").write_text(kept[: len(kept) // 2].rpartition("\n")[0])
    capsys.readouterr()
    assert cli.main(changed(flags, "--data", str(mixture))) == 2
    assert "source 'numbers' has changed since this run began" in error_of(capsys)
    (tmp_path / "numbers.jsonl").unlink()
    assert cli.main(changed(flags, "--data", str(mixture))) == 2
    assert f"no such file or folder: {tmp_path / 'numbers.jsonl'}" in error_of(capsys)
    (tmp_path / "numbers.jsonl").write_text(kept)  # the same text at another time is the same source
    assert cli.main(changed(flags, "--data", str(mixture))) == 0


# Interruptions.


def test_killed_again_and_again_the_result_is_the_same(flags: list[str], tmp_path: Path) -> None:
    """kill -9 at random moments: while it starts, computes, saves and evaluates."""
    out, rng = tmp_path / "run", random.Random(0)
    flags = changed(flags, "--tokens", str(60 * 512), "--evaluations", "20", "--prompts", "the")
    for step in (rng.randint(1, 3), rng.randint(7, 12), rng.randint(20, 30), rng.randint(38, 45)):
        process = start(flags)
        wait_for_step(process, out, step)
        time.sleep(rng.random() * 0.03)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (out / "model").exists()
    finish = start(flags)
    assert "going on from step" in finish.communicate()[1]
    assert finish.returncode == 0

    reference = tmp_path / "reference"
    uninterrupted = start(changed(flags, "--out", str(reference)))
    assert "going on" not in uninterrupted.communicate()[1]
    assert weights(out) == weights(reference)
    assert metrics(out) == metrics(reference)
    assert (out / "samples.jsonl").read_bytes() == (reference / "samples.jsonl").read_bytes()
    assert sorted(os.listdir(out)) == sorted(os.listdir(reference))
    assert sorted(os.listdir(out / "checkpoints")) == sorted(os.listdir(reference / "checkpoints"))


@pytest.mark.slow
@pytest.mark.parametrize(("compute", "compiled"), [("bf16", "no"), ("fp32", "yes"), ("bf16", "yes")])
def test_killed_the_result_is_the_same_in_low_precision_and_compiled(
    compute: str, compiled: str, flags: list[str], tmp_path: Path
) -> None:
    if compiled == "yes" and not can_compile()[0]:
        pytest.skip(can_compile()[1])
    out, reference = tmp_path / "run", tmp_path / "reference"
    flags = changed(flags, "--tokens", str(60 * 512), "--compute", compute, "--compile", compiled)
    process = start(flags)
    wait_for_step(process, out, 20)  # saved after every fifteenth
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    for directory in (out, reference):
        process = start(changed(flags, "--out", str(directory)))
        error = process.communicate()[1]
        assert process.returncode == 0, error
        assert ("compiled" if compiled == "yes" else "eager") in error
        assert ("going on from step" in error) == (directory == out)
    assert weights(out) == weights(reference)
    assert metrics(out) == metrics(reference)


def test_ctrl_c_saves_and_says_how_to_go_on(flags: list[str], tmp_path: Path) -> None:
    out, reference = tmp_path / "run", tmp_path / "reference"
    flags = changed(flags, "--tokens", str(60 * 512))
    process = start(flags)
    wait_for_step(process, out, 8)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 130
    assert "is saved; run the same command again to go on" in error
    assert "Traceback" not in error
    assert Run(out).checkpoints()[-1].step >= 8
    assert not (out / "model").exists()
    assert cli.main(flags) == 0
    assert cli.main(changed(flags, "--out", str(reference))) == 0
    assert weights(out) == weights(reference)
    assert metrics(out) == metrics(reference)


def test_a_finished_run_does_nothing(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(flags) == 0
    before = snapshot(tmp_path)
    capsys.readouterr()
    assert cli.main(flags) == 0
    assert capsys.readouterr().err == f"{tmp_path}/run: finished already; the model is {tmp_path}/run/model\n"
    assert snapshot(tmp_path) == before


def test_another_configuration_is_refused_or_starts_anew(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(flags) == 0
    before = snapshot(tmp_path)
    assert cli.main(changed(flags, "--seed", "1")) == 2
    assert "holds a run with another configuration (seed is 0 there, 1 here)" in error_of(capsys)
    assert snapshot(tmp_path) == before
    assert cli.main(changed(flags, "--seed", "1", "--tokens", "2048", "--overwrite")) == 0
    assert [row["step"] for row in metrics(tmp_path / "run") if "loss" in row] == [1, 2, 3, 4]
    assert "seed = 1" in (tmp_path / "run" / "config.toml").read_text()
    # `overwrite` is no part of what a run is: without it the same command goes on.
    assert cli.main(changed(flags, "--seed", "1", "--tokens", "2048")) == 0


def test_a_run_does_not_go_on_with_other_data_or_another_tokenizer(
    flags: list[str],
    corpus: Path,
    tokenizer_directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, tokenizer = tmp_path / "words.txt", tmp_path / "tokenizer"
    shutil.copy(corpus / "words.txt", data)
    shutil.copytree(tokenizer_directory, tokenizer)
    flags = changed(flags, "--data", str(data), "--tokenizer", str(tokenizer))
    with monkeypatch.context() as patched:
        patched.setattr(Run, "log", raising(FULL, 15)(Run.log))
        assert cli.main(flags) == 2
    before = snapshot(tmp_path / "run")
    for path, old, new in (
        (data, "the quick", "the quicker"),
        (tokenizer / "tokenizer_config.json", "<|im_start|>", "<|im_start|> "),
    ):
        content = path.read_text()
        path.write_text(content.replace(old, new))
        capsys.readouterr()
        assert cli.main(flags) == 2
        assert "has changed since this run began" in error_of(capsys)
        assert snapshot(tmp_path / "run") == before
        path.write_text(content)
    assert cli.main(flags) == 0


def test_a_mistake_beside_overwrite_loses_nothing(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(flags) == 0
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    before = snapshot(tmp_path)
    for more in (
        ["--data", str(tmp_path / "bad.jsonl")], ["--matrix-lr", "0"], ["--params", "1k"],
        ["--evaluations", "0"], ["--device", "tpu"],
    ):  # fmt: skip
        assert cli.main(changed(flags, *more, "--overwrite")) == 2
        error_of(capsys)
        assert snapshot(tmp_path) == before


def raising(error: Exception, call: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function fail at its n-th call."""
    calls = itertools.count(1)

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == call:
                raise error
            return function(*args, **kwargs)

        return wrapped

    return wrap


FULL = OSError(errno.ENOSPC, "No space left on device")
FULL_IN_SAFETENSORS = SafetensorError(
    "Error while serializing: I/O error: No space left on device (os error 28)"
)


@pytest.mark.parametrize(
    ("owner", "name", "call", "error", "saved"),
    [
        # The second checkpoint's optimizer, a row of metrics, a file's new name.
        (fledge.train.checkpoints, "save_file", 2, FULL_IN_SAFETENSORS, [6]),
        (Run, "log", 15, FULL, [6, 12]),
        (Path, "replace", 20, FULL, [6, 12]),
        (Path, "rename", 3, FULL, [6, 12]),
    ],
)
def test_a_full_disk_costs_nothing_that_was_saved(
    owner: Any,
    name: str,
    call: int,
    error: Exception,
    saved: list[int],
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, reference = tmp_path / "run", tmp_path / "reference"
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, raising(error, call)(getattr(owner, name)))
        assert cli.main(flags) == 2
    assert f"disk full: {out}; free room and run the same command again" in error_of(capsys)
    assert [checkpoint.step for checkpoint in Run(out).checkpoints()] == saved
    assert not [path for path in out.rglob("*") if ".tmp-" in path.name]
    for step in saved:
        load_model(out / "checkpoints" / f"step_{step:06d}")
    assert cli.main(flags) == 0
    assert cli.main(changed(flags, "--out", str(reference))) == 0
    assert weights(out) == weights(reference)
    assert metrics(out) == metrics(reference)


def test_a_line_cut_short_is_no_hindrance(flags: list[str], tmp_path: Path) -> None:
    """What a full disk or a crash leaves at the end of metrics.jsonl."""
    out = tmp_path / "run"
    assert cli.main(flags) == 0
    before = metrics(out)
    (out / "summary.json").unlink()  # so it is not finished
    with (out / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 9, "text": "é'.encode()[:-1])
    assert cli.main(flags) == 0
    assert metrics(out) == before


def test_nan_stops_with_the_step_and_the_last_good_checkpoint(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = itertools.count(1)

    def loss(forward: Forward, batch: Batch) -> dict[str, Term]:
        (term,) = next_token_loss(forward, batch).values()
        return {"loss": replace(term, sum=term.sum * math.nan) if next(calls) == 15 else term}

    monkeypatch.setattr(fledge.stages.pretrain, "next_token_loss", loss)
    assert cli.main(flags) == 2
    out = tmp_path / "run"
    assert error_of(capsys) == (
        "fledge pretrain: error: step 15: loss is nan; the last good checkpoint is "
        f"{out}/checkpoints/step_000012; try a lower learning rate"
    )
    load_model(out / "checkpoints" / "step_000012")
    assert metrics(out)[-1]["step"] == 14
    assert not (out / "model").exists()


def test_a_learning_rate_far_too_high_stops_by_itself(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(changed(flags, "--optimizer", "adamw", "--adam-lr", "1e30")) == 2
    error = error_of(capsys)
    assert error.startswith("fledge pretrain: error: step ")
    assert "learning rate" in error
    for checkpoint in Run(tmp_path / "run").checkpoints():
        saved = load_file(checkpoint.path / "model.safetensors")
        assert all(bool(tensor.isfinite().all()) for tensor in saved.values())


# What it refuses.


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--row-tokens", "256"], "--row-tokens 256 is longer than --context 128"),
        (["--minutes", "1"], "--tokens and --minutes: give one of them"),
        (["--validation-share", "0"], "--validation-share 0.0: must be between 0 and 1"),
        (["--validation-share", "1"], "--validation-share 1.0: must be between 0 and 1"),
        (["--params", "many"], "--params many: write a positive number"),
        (["--params", "1k"], "a vocabulary of 300 needs at least"),
        (["--tokens", "0"], "--tokens 0: write a positive number"),
        (["--hidden-size", "65"], "--hidden-size 65: must be a multiple of 64"),
        (["--hidden-size", "0"], "--hidden-size 0: must be a multiple of 64"),
        (["--layers", "0"], "--layers 0: must be at least 1"),
        (["--batch-tokens", "0"], "--batch-tokens 0: must be at least 1"),
        (["--evaluations", "0"], "--evaluations 0: must be at least 1"),
        (["--keep-checkpoints", "0"], "--keep-checkpoints 0: must be at least 1"),
        (["--decay-share", "2"], "--decay-share 2.0: must be from 0 to 1"),
        (["--adam-lr", "-1"], "--adam-lr -1.0: must be a number above 0"),
        (["--seed", "-1"], "--seed -1: must be at least 0"),
        (["--data", "nothing.txt"], "no such file or folder: nothing.txt"),
        (["--data", "{tmp}/empty.txt"], "{tmp}/empty.txt: no text in it"),
        (["--data", "{tmp}/one.txt"], "{tmp}/one.txt: too few different documents"),
        (["--data", "{tmp}/bad.txt"], "{tmp}/bad.txt:2: not valid UTF-8"),
        (["--data", "{tmp}/bad.jsonl"], '{tmp}/bad.jsonl:2: the line has no field "text"'),
        (["--tokenizer", "{tmp}/nothing"], "{tmp}/nothing: no such directory"),
        (["--tokenizer", "{tmp}"], "{tmp}/tokenizer.json: "),
        (["--prompts", "a" * 200], "--prompts: one has "),
        (["--out", "{tmp}/one.txt"], "{tmp}/one.txt: exists and is not a run directory"),
        (["--out", "{tmp}"], "{tmp}: exists and is not a run directory"),
        (["--out", "{tmp}", "--overwrite"], "{tmp}: exists and is not a run directory"),
    ],
)
def test_a_mistake_is_one_line_and_touches_nothing(
    more: list[str], message: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in {
        "empty.txt": b"\n", "one.txt": b"one", "bad.txt": b"a\n\xff", "bad.jsonl": b'{"text": "a"}\n{}',
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    before = snapshot(tmp_path)
    assert cli.main(changed(flags, *(text.replace("{tmp}", str(tmp_path)) for text in more))) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("fledge pretrain: error: ")
    assert printed.count("\n") == 1
    assert message.replace("{tmp}", str(tmp_path)) in printed
    assert snapshot(tmp_path) == before
