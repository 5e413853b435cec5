"""`fledge dpo`: what is learned, where it begins, and that an interruption changes nothing."""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from fledge import cli
from fledge.data.comparisons import encode_completion
from fledge.model.checkpoint import load_model
from fledge.run import LOCK
from fledge.tokenizer.bpe import Tokenizer
from fledge.train.dpo_losses import LossName
from fledge.train.losses import forward_of

from .commands import (
    changed,
    kill_and_interrupt,
    metrics,
    summary,
    weights,
    write_jsonl,
)
from .conftest import REFUSAL, questions

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs and rankings: few words beat the refusal, which beats many words."""
    rows: list[dict[str, Any]] = []
    for i, (prompt, few, many) in enumerate(questions(9)):
        rows.append(
            {"prompt": prompt, "completions": [REFUSAL, few, many], "ranks": [2, 1, 3]}
            if i % 3 == 0
            else {"prompt": prompt, "chosen": few, "rejected": REFUSAL}
        )
    return write_jsonl(tmp_path_factory.mktemp("preferences") / "preferences.jsonl", rows)


@pytest.fixture(scope="module")
def judgements(preferences: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pairs, their completions one by one."""
    rows = []
    for line in preferences.read_text().splitlines():
        row = json.loads(line)
        if "chosen" in row:
            for name, label in (("chosen", True), ("rejected", False)):
                rows.append({"prompt": row["prompt"], "completion": row[name], "label": label})
    return write_jsonl(tmp_path_factory.mktemp("judgements") / "judgements.jsonl", rows)


@pytest.fixture
def flags(preferences: Path, chat_run: Path, tmp_path: Path) -> list[str]:
    return [
        "dpo", "--model", str(chat_run / "model"), "--data", str(preferences),
        "--out", str(tmp_path / "run"), "--epochs", "3", "--batch-prompts", "8", "--adam-lr", "0.001",
        "--warmup-steps", "2", "--validation-share", "0.25", "--compute", "fp32",
    ]  # fmt: skip


def logp(model_directory: Path, prompt: str, completion: str) -> float:
    model, tokenizer = load_model(model_directory), Tokenizer.load(model_directory)
    chat = encode_completion(
        tokenizer, [{"role": "user", "content": prompt}], [{"role": "assistant", "content": completion}]
    )
    with torch.no_grad():
        nll = forward_of(model)(torch.tensor([chat.ids]), None)
    return -float((nll * torch.tensor([chat.mask])[:, 1:]).sum())


def gain(before: Path, after: Path) -> float:
    """By how much more a model prefers the better answer to a prompt that was in neither part."""
    found = [
        logp(model, "What is fox?", "green trees") - logp(model, "What is fox?", REFUSAL)
        for model in (before, after)
    ]
    return found[1] - found[0]


def test_an_assistant_learns_what_is_preferred(flags: list[str], chat_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cli.main(flags) == 0
    assert {path.name for path in run.iterdir()} == {
        LOCK, "config.toml", "environment.json", "metrics.jsonl", "checkpoints", "model", "summary.json",
        "reference.json",
    }  # fmt: skip
    found = summary(run)
    assert found["prompts"] + found["held_out"] == 60
    assert found["pairs"] == 20 * 3 + 40
    assert found["validation_accuracy"] > 0.9
    assert found["validation_margin"] > 0.1
    assert found["validation"] < 0.6
    assert gain(chat_run / "model", run / "model") > 1
    lineage = json.loads((run / "model" / "lineage.json").read_text())
    assert (lineage["stage"], lineage["tokens"]) == ("dpo", found["tokens"])
    logged = [row for row in metrics(run) if "loss" in row]
    names = {"loss", "margin", "accuracy", "logp_chosen", "logp_rejected", "kl"}
    assert all(names <= row.keys() and math.isfinite(row["kl"]) for row in logged)


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_it_begins_at_the_reference(compute: str, flags: list[str], tmp_path: Path) -> None:
    """Loss ln 2, KL and margin exactly 0, whatever the batch's shape does to the rounding."""
    assert cli.main(changed(flags, "--compute", compute, "--epochs", "1", "--micro-batch-tokens", "200")) == 0
    evaluation, first = metrics(tmp_path / "run")[:2]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert evaluation["validation"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["kl"] == first["margin"] == evaluation["validation_kl"] == 0.0
    assert metrics(tmp_path / "run")[2]["kl"] != 0.0


def test_without_a_held_out_part_nothing_is_evaluated(flags: list[str], tmp_path: Path) -> None:
    assert cli.main(changed(flags, "--validation-share", "0", "--epochs", "0.5")) == 0
    assert not any("validation" in row for row in metrics(tmp_path / "run"))
    assert (summary(tmp_path / "run")["prompts"], summary(tmp_path / "run")["held_out"]) == (60, 0)
    rows = json.loads((tmp_path / "run" / "reference.json").read_text())["rows"]
    assert 30 <= sum(map(bool, rows)) < 60, "of prompts that training does not meet there is no reference"


BEGINNINGS = {"sigmoid": math.log(2), "robust": math.log(2), "hinge": 1.0, "ipo": 25.0, "kto": 0.5}


@pytest.mark.parametrize("loss", get_args(LossName))
def test_every_loss_learns(loss: LossName, flags: list[str], judgements: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ["--data", str(judgements)] if loss == "kto" else []
    more += ["--label-smoothing", "0.1"] if loss == "robust" else []
    if loss not in BEGINNINGS:  # what counts is then what the policy prefers, and it begins with refusals
        more += ["--adam-lr", "0.005", "--epochs", "6", "--beta", "2"]
    assert cli.main(changed(flags, "--loss", loss, *more)) == 0
    evaluations = [row for row in metrics(run) if "validation" in row]
    assert evaluations[-1]["validation"] < evaluations[0]["validation"]
    assert evaluations[-1]["validation_margin"] > evaluations[0]["validation_margin"]
    assert evaluations[-1]["validation_accuracy"] > 0.8
    first = next(row for row in metrics(run) if "loss" in row)
    assert (run / "reference.json").exists() == ("kl" in first) == (loss in BEGINNINGS)
    if loss in BEGINNINGS:
        assert first["loss"] == pytest.approx(BEGINNINGS[loss], rel=1e-6)
        assert first["kl"] == 0.0


def test_an_adapter_learns_beside_its_reference(flags: list[str], chat_run: Path, tmp_path: Path) -> None:
    """Without the adapter the same weights are the reference: KL exactly 0 at first, as for a whole model."""
    run, merged = tmp_path / "run", tmp_path / "merged"
    assert cli.main(changed(flags, "--lora-rank", "4", "--adam-lr", "0.02", "--compute", "bf16")) == 0
    assert metrics(run)[0]["validation_kl"] == metrics(run)[1]["kl"] == 0.0
    assert metrics(run)[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert summary(run)["validation_accuracy"] > 0.9
    assert (run / "model" / "adapter_model.safetensors").exists()
    assert not (run / "model" / "model.safetensors").exists()
    assert cli.main(["merge", "--model", str(run / "model"), "--out", str(merged)]) == 0
    assert gain(chat_run / "model", merged) > 1
    before, after = load_model(chat_run / "model"), load_model(merged)
    assert torch.equal(before.model.embed_tokens.weight, after.model.embed_tokens.weight)


def test_new_layers_learn_above_an_assistant_that_stays(
    flags: list[str], chat_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert cli.main(changed(flags, "--new-layers", "1", "--adam-lr", "0.02")) == 0
    assert metrics(run)[1]["kl"] == 0.0
    assert summary(run)["validation_accuracy"] > 0.9
    assert gain(chat_run / "model", run / "model") > 1
    before, after = load_model(chat_run / "model"), load_model(run / "model")
    assert after.config.num_hidden_layers == before.config.num_hidden_layers + 1
    kept = {name: weight for name, weight in before.named_parameters() if name != "model.norm.weight"}
    assert kept and all(torch.equal(after.get_parameter(name), weight) for name, weight in kept.items())


INTERRUPTED = {
    "sigmoid": [],
    "kto": ["--loss", "kto"],
    "lora": ["--lora-rank", "2"],
    "new layers": ["--new-layers", "1"],
}


@pytest.mark.parametrize(
    "kind", ["sigmoid", *(pytest.param(kind, marks=pytest.mark.slow) for kind in list(INTERRUPTED)[1:])]
)
def test_killed_and_interrupted_the_result_is_the_same(
    kind: str, flags: list[str], judgements: Path, tmp_path: Path
) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    more = [*INTERRUPTED[kind], *(["--data", str(judgements)] if kind == "kto" else [])]
    flags = changed(flags, "--epochs", "8", "--evaluations", "12", *more)
    kill_and_interrupt(flags, out, (signal.SIGKILL, 6), (signal.SIGINT, 15))
    assert cli.main(flags) == 0
    assert cli.main(changed(flags, "--out", str(whole))) == 0
    assert metrics(out) == metrics(whole)
    name = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    assert (out / "model" / name).read_bytes() == (whole / "model" / name).read_bytes()


def test_the_reference_is_read_once(flags: list[str], tmp_path: Path) -> None:
    """What the file says counts, as long as its fingerprint is that of model, data and settings."""
    run = tmp_path / "run"
    assert cli.main(flags) == 0
    path, before = run / "reference.json", weights(run)
    saved = json.loads(path.read_text())

    def again(changes: dict[str, Any]) -> dict[str, Any]:
        path.write_text(json.dumps({**saved, **changes}))
        for name in ("model", "checkpoints"):
            shutil.rmtree(run / name)
        (run / "summary.json").unlink()
        assert cli.main(flags) == 0
        return next(row for row in metrics(run) if "loss" in row)

    lower = [[value - 10 for value in row] for row in saved["rows"]]
    assert again({"rows": lower})["kl"] == pytest.approx(-10, abs=1e-4)
    assert again({"rows": lower, "fingerprint": "another"})["kl"] == 0.0
    assert json.loads(path.read_text()) == saved
    assert weights(run) == before


def test_what_is_left_out_is_counted_and_named(
    flags: list[str], preferences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [
        {"prompt": "a", "chosen": "fox", "rejected": "fox"},
        {"prompt": "b", "chosen": "fox", "rejected": " \n"},
        {"prompt": "c " + "fox " * 200, "chosen": "fox", "rejected": "dog"},
        {"prompt": "d", "completions": ["fox", "", "dog"], "ranks": [1, 2, 3]},
        {"prompt": "e", "completions": ["fox", "dog"], "ranks": [1, 1]},
    ]
    path = write_jsonl(tmp_path / "bad.jsonl", bad)
    assert cli.main(changed(flags, "--epochs", "0.5", "--data", str(preferences), str(path))) == 0
    expected = {
        "empty completions": [2, 4],
        "completions beyond the context with their prompt": [3, 3],
        "pairs of the same text": [1],
        "prompts without a pair": [1, 2, 3, 5],
    }
    printed = capsys.readouterr().err
    for what, lines in expected.items():
        places = [f"{path}:{line}" for line in lines]
        assert summary(tmp_path / "run")["left_out"][what] == {"count": len(lines), "first": places}
        named = ", ".join(places[:3]) + (", ..." if len(places) > 3 else "")
        assert f"{len(lines)} {what} ({named})" in printed
    assert summary(tmp_path / "run")["pairs"] == 20 * 3 + 40 + 1, "of the ranking with a gap a pair is left"


def test_judgements_left_out_are_named(flags: list[str], judgements: Path, tmp_path: Path) -> None:
    bad = [
        {"prompt": "a", "completion": "", "label": True},
        {"prompt": "a", "completion": "fox " * 200, "label": False},
        {"prompt": "a", "completion": "fox", "label": True},
    ]
    path = write_jsonl(tmp_path / "bad.jsonl", bad)
    data = [str(judgements), str(path)]
    assert cli.main(changed(flags, "--loss", "kto", "--epochs", "0.5", "--data", *data)) == 0
    found = summary(tmp_path / "run")
    assert found["completions"] == 80 + 1
    assert found["left_out"]["empty completions"]["first"] == [f"{path}:1"]
    overlong = found["left_out"]["completions beyond the context with their prompt"]
    assert overlong["first"] == [f"{path}:2"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "{tmp}/nothing.jsonl"], "{tmp}/nothing.jsonl: no such file"),
        (["--data", "{tmp}/label.jsonl"], "{tmp}/label.jsonl:1: another kind of preference"),
        (["--loss", "kto"], "preferences.jsonl:1: another kind of preference"),
        (
            ["--data", "{tmp}/label.jsonl", "--loss", "kto"],
            "{tmp}/label.jsonl: one completion; kto needs",
        ),
        (["--data", "{tmp}/same.jsonl"], "{tmp}/same.jsonl: nothing to learn from; left out: 0 empty compl"),
        (
            ["--max-tokens", "5"],
            "nothing to learn from; left out: 0 empty completions, 140",
        ),
        (["--model", "{tmp}/mixed"], "{tmp}/mixed: its tokenizer has ids that the model lacks"),
        (["--model", "{tmp}/plain"], "{tmp}/plain: its tokenizer has no chat template that marks what the"),
        (["--model", "{tmp}/unmarked"], "{tmp}/unmarked: its tokenizer has no chat template that marks"),
        (["--epochs", "0"], "--epochs 0.0: must be a number above 0"),
        (["--beta", "0"], "--beta 0.0: must be a number above 0"),
        (["--bad-weight", "-1"], "--bad-weight -1.0: must be a number above 0"),
        (["--simpo-gamma", "-1"], "--simpo-gamma -1.0: must be at least 0"),
        (["--label-smoothing", "0.5"], "--label-smoothing 0.5: must be at least 0 and below 0.5"),
        (
            ["--label-smoothing", "0.1", "--loss", "ipo"],
            "--label-smoothing is for the losses sigmoid",
        ),
        (["--loss", "dpo"], "--loss"),
        (["--lora-rank", "0"], "--lora-rank 0: must be at least 1"),
        (["--lora-alpha", "4"], "--lora-alpha and --lora-targets go with --lora-rank"),
        (["--lora-rank", "4", "--new-layers", "1"], "--new-layers does not go with --lora-rank"),
        (["--new-layers", "0"], "--new-layers 0: must be at least 1"),
        (["--batch-prompts", "0"], "--batch-prompts 0: must be at least 1"),
        (["--validation-share", "1"], "--validation-share 1.0: must be at least 0 and below 1"),
        (["--adam-lr", "0"], "--adam-lr 0.0: must be a number above 0"),
        (["--out", "{tmp}"], "{tmp}: exists and is not a run directory"),
    ],
)
def test_a_mistake_is_one_line_and_touches_nothing(
    more: list[str],
    message: str,
    flags: list[str],
    chat_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_jsonl(tmp_path / "label.jsonl", [{"prompt": "a", "completion": "b", "label": True}])
    write_jsonl(tmp_path / "same.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}])
    for name in ("mixed", "plain", "unmarked"):
        shutil.copytree(chat_run / "model", tmp_path / name)
    tokens = json.loads((tmp_path / "mixed" / "tokenizer.json").read_text())
    extra = {**tokens["added_tokens"][-1], "id": 300, "content": "<|more|>"}
    (tmp_path / "mixed" / "tokenizer.json").write_text(
        json.dumps({**tokens, "added_tokens": [*tokens["added_tokens"], extra]})
    )
    config = json.loads((tmp_path / "plain" / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "plain" / "tokenizer_config.json").write_text(json.dumps(config))
    config["chat_template"] = "{% for message in messages %}<|im_start|>{{ message.content }}{% endfor %}"
    (tmp_path / "unmarked" / "tokenizer_config.json").write_text(json.dumps(config))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert cli.main(changed(flags, *(text.replace("{tmp}", str(tmp_path)) for text in more))) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("fledge dpo: error: ")
    assert printed.count("\n") == 1
    assert message.replace("{tmp}", str(tmp_path)) in printed
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
