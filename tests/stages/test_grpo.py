"""`fledge grpo`: what is learned, where it begins, and that an interruption changes nothing."""

from __future__ import annotations

import json
import math
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from fledge import cli
from fledge.run import LOCK

from .commands import (
    changed,
    kill_and_interrupt,
    metrics,
    summary,
    weights,
    write_jsonl,
)
from .conftest import WORDS

pytestmark = pytest.mark.usefixtures("quick")

FEW = WORDS[:4]
REWARDS = """
import math

def short(rollouts):
    return [-abs(len(one.completion.split()) - 2) / 3 for one in rollouts]

def equal(rollouts):
    return [1.0 for one in rollouts]

def raises(rollouts):
    return [1 / (len(one.completion.split()) != 1) for one in rollouts]

def nan(rollouts):
    return [math.nan for one in rollouts]
"""


@pytest.fixture(scope="module")
def talker(base_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An assistant that says one of four words at random, and sometimes two."""
    folder, rng = tmp_path_factory.mktemp("talker"), random.Random(1)
    chats = [
        {"messages": [
            {"role": "user", "content": f"Which, {rng.choice(FEW)} {rng.randint(0, 99)}?"},
            {"role": "assistant", "content": " ".join(rng.choices(FEW, k=rng.choice((1, 1, 2))))},
        ]}
        for _ in range(250)
    ]  # fmt: skip
    write_jsonl(folder / "chats.jsonl", chats)
    assert cli.main([
        "sft", "--model", str(base_run / "model"), "--data", str(folder / "chats.jsonl"), "--out",
        str(folder / "run"), "--epochs", "5", "--row-tokens", "128", "--batch-tokens", "512", "--matrix-lr",
        "0.02", "--adam-lr", "0.005", "--compute", "fp32", "--compile", "no", "--evaluations", "1",
    ]) == 0  # fmt: skip
    return folder / "run" / "model"


@pytest.fixture
def flags(talker: Path, tmp_path: Path) -> list[str]:
    """The right answer is always the same word."""
    rows = [{"prompt": f"Which, {FEW[i % 4]} {i}?", "answer": FEW[1]} for i in range(60)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    (tmp_path / "rewards.py").write_text(REWARDS)
    return [
        "grpo", "--model", str(talker), "--prompts", str(tmp_path / "prompts.jsonl"), "--reward", "exact",
        "--out", str(tmp_path / "run"), "--rollouts", "12", "--batch-prompts", "8", "--samples", "6",
        "--max-tokens", "12", "--adam-lr", "0.002", "--warmup-steps", "2", "--evaluations", "2",
        "--validation-share", "0.4", "--compute", "fp32", "--epochs", "1", "--minibatches", "1",
        "--evaluation-samples", "1",
    ]  # fmt: skip


def samples(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


ROLLOUT_FIGURES = {
    "score", "score_std", "without_signal", "sampled_groups", "kl", "kl_k3", "completion_tokens", "ended",
    "empty", "sampler_gap", "sampler_gap_largest",
}  # fmt: skip
STEP_FIGURES = {
    "loss", "policy_loss", "kl_loss", "ratio", "ratio_distance", "clip_fraction", "entropy", "kl_step",
    "grad_norm", "lr",
}  # fmt: skip


def test_a_model_learns_the_right_answer(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert cli.main(changed(flags, "--evaluation-samples", "2", "--epochs", "2", "--minibatches", "2")) == 0
    assert {path.name for path in run.iterdir()} == {
        LOCK, "config.toml", "environment.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "model",
        "summary.json",
    }  # fmt: skip
    rows = metrics(run)
    evaluations = [row for row in rows if "validation" in row]
    assert [row["step"] for row in evaluations] == [0, 24, 48]
    assert evaluations[0]["validation_kl"] == 0.0 and evaluations[0]["validation_score"] < 0.5
    assert evaluations[-1]["validation_score"] > 0.9 and evaluations[-1]["validation_kl"] > 0.1
    assert evaluations[-1]["validation"] == -evaluations[-1]["validation_score"]
    assert evaluations[0]["validation_best"] > evaluations[0]["validation_score"]
    steps = [row for row in rows if "loss" in row]
    assert all(row.keys() >= STEP_FIGURES for row in steps)
    firsts = [row for row in steps if "score" in row]
    assert [row["step"] for row in firsts[:4]] == [1, 5, 9, 13]
    assert all(row.keys() >= ROLLOUT_FIGURES for row in firsts)
    assert firsts[0]["ratio_distance"] == 0.0 and firsts[0]["kl"] == 0.0
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(row["sampler_gap_largest"] < 1e-4 for row in firsts)
    found = summary(run)
    assert found["prompts"] + found["held_out"] == 60 and found["steps"] == 48
    assert found["groups"] == 12 * 8 and 0 < found["groups_without_signal"] < 12 * 8
    assert found["validation_score"] == evaluations[-1]["validation_score"]
    lineage = json.loads((run / "model" / "lineage.json").read_text())
    assert (lineage["stage"], lineage["tokens"]) == ("grpo", found["tokens"])
    table = samples(run)
    assert len(table) == 3 * 2 * found["held_out"]
    assert {"step", "prompt", "text", "ended", "score"} == set(table[0])
    assert f"{table[0]['prompt']} -> {table[0]['text']}  [score " in capsys.readouterr().err


@pytest.mark.parametrize("advantage", ["dr-grpo", "rloo"])
def test_the_other_advantages_learn_too(advantage: str, flags: list[str], tmp_path: Path) -> None:
    assert cli.main(changed(flags, "--advantage", advantage, "--adam-lr", "0.004", "--rollouts", "16")) == 0
    scores = [row["validation_score"] for row in metrics(tmp_path / "run") if "validation" in row]
    assert scores[-1] > scores[0] + 0.3


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_it_begins_at_the_reference(compute: str, kind: str, flags: list[str], tmp_path: Path) -> None:
    """Ratio exactly 1 and KL exactly 0, whatever the batch's shape does to the rounding."""
    more = ["--lora-rank", "2"] if kind == "adapter" else []
    more += ["--rollouts", "2", "--micro-batch-tokens", "100", "--compute", compute, "--minibatches", "2"]
    assert cli.main(changed(flags, *more, "--reward", f"{tmp_path}/rewards.py:short")) == 0
    evaluation, first, second = metrics(tmp_path / "run")[:3]
    assert first["ratio_distance"] == 0.0 and first["ratio"] == pytest.approx(1.0, abs=1e-12)
    assert first["kl"] == first["kl_k3"] == first["kl_step"] == evaluation["validation_kl"] == 0.0
    assert second["ratio_distance"] > 0.0


@pytest.mark.parametrize("kind", ["whole", pytest.param("lora", marks=pytest.mark.slow)])
def test_killed_and_interrupted_the_result_is_the_same(kind: str, flags: list[str], tmp_path: Path) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    more = [
        "--rollouts",
        "20",
        "--evaluations",
        "10",
        "--resample",
        "1",
        "--minibatches",
        "2",
        "--beta",
        "0.01",
    ]
    more += ["--lora-rank", "2"] if kind == "lora" else []
    flags = changed(flags, *more)
    kill_and_interrupt(flags, out, (signal.SIGKILL, 9), (signal.SIGINT, 21))
    assert cli.main(flags) == 0
    assert cli.main(changed(flags, "--out", str(whole))) == 0
    assert metrics(out) == metrics(whole)
    assert samples(out) == samples(whole)
    for name in ("groups", "groups_without_signal", "empty_completions", "tokens"):
        assert summary(out)[name] == summary(whole)[name]
    name = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    assert (out / "model" / name).read_bytes() == (whole / "model" / name).read_bytes()


def test_several_rewards_have_weights_and_figures_of_their_own(flags: list[str], tmp_path: Path) -> None:
    function = f"{tmp_path}/rewards.py:short"
    assert cli.main(changed(flags, "--reward", "exact", f"0.5*{function}", "--rollouts", "2")) == 0
    first = next(row for row in metrics(tmp_path / "run") if "loss" in row)
    assert first["score"] == pytest.approx(first["score:exact"] + 0.5 * first[f"score:{function}"])
    assert {"score_std:exact", f"score_std:{function}"} <= first.keys()
    row = samples(tmp_path / "run")[0]
    assert row["score"] == pytest.approx(row["score:exact"] + 0.5 * row[f"score:{function}"])


def test_an_adapter_is_written_alone(flags: list[str], talker: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    before = (talker / "model.safetensors").read_bytes()
    assert cli.main(changed(flags, "--lora-rank", "4", "--adam-lr", "0.01", "--rollouts", "20")) == 0
    assert (talker / "model.safetensors").read_bytes() == before
    assert (run / "model" / "adapter_model.safetensors").exists()
    assert not (run / "model" / "model.safetensors").exists()
    scores = [row["validation_score"] for row in metrics(run) if "validation" in row]
    assert scores[-1] > scores[0] + 0.3
    assert cli.main(["merge", "--model", str(run / "model"), "--out", str(tmp_path / "merged")]) == 0
    assert cli.main(changed(flags, "--model", str(run / "model"), "--out", str(tmp_path / "no"))) == 2


def test_no_signal_no_step(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is learned from groups whose rewards are equal; the run says so and goes on."""
    run = tmp_path / "run"
    assert cli.main(changed(flags, "--reward", f"{tmp_path}/rewards.py:equal", "--rollouts", "3")) == 0
    found = summary(run)
    assert found["skipped_steps"] == found["steps"] == 3 and found["groups_without_signal"] == 24
    rows = [row for row in metrics(run) if "skipped" in row]
    assert len(rows) == 3 and all(row["without_signal"] == 1 and "score" in row for row in rows)
    assert weights(run) == (Path(flags[2]) / "model.safetensors").read_bytes()
    assert "roll-out 3: no group of 8 has a signal, mean score 1; no step taken" in capsys.readouterr().err


def test_base_models_continue_plain_text(flags: list[str], base_run: Path, tmp_path: Path) -> None:
    more = ["--model", str(base_run / "model"), "--missing-eos-score", "-7", "--rollouts", "2", "--plain"]
    assert cli.main(changed(flags, *more, "--reward", f"{tmp_path}/rewards.py:short")) == 0
    assert all((one["score"] == -7) == (not one["ended"]) for one in samples(tmp_path / "run"))


def test_it_stops_at_a_kl(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(changed(flags, "--stop-kl", "0.02", "--adam-lr", "0.005")) == 0
    found = summary(tmp_path / "run")
    assert 1 <= found["steps"] < 12 and found["stopped_at_kl"] > 0.02
    assert "nats a completion is above --stop-kl 0.02" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "failed: ZeroDivisionError: division by zero; the prompt is {tmp}/prompts.jsonl:"),
        ("nan", "returned nan, no finite number; the prompt is {tmp}/prompts.jsonl:"),
    ],
)
def test_a_broken_reward_takes_no_step(
    name: str, message: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The prompt is named and the completion shown; when the function is mended, the run goes on."""
    flags = changed(flags, "--reward", f"{tmp_path}/rewards.py:{name}", "--rollouts", "1")
    assert cli.main(flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"fledge grpo: error: the reward {tmp_path}/rewards.py:{name} ")
    assert message.replace("{tmp}", str(tmp_path)) in error and ", the completion '" in error
    assert not (tmp_path / "run" / "model").exists()
    (tmp_path / "rewards.py").write_text(
        f"def {name}(rollouts):\n    return [len(one.completion) for one in rollouts]"
    )
    assert cli.main(flags) == 0
    assert summary(tmp_path / "run")["steps"] == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompts", "{tmp}/nothing.jsonl"], "{tmp}/nothing.jsonl: no such file"),
        (["--max-tokens", "125"], "prompts.jsonl: no prompt leaves room for a completion"),
        (["--reward", "exakt"], "unknown verifier 'exakt'; the nearest is 'exact'"),
        (["--reward", "{tmp}/none.py:f"], "{tmp}/none.py: no such file"),
        (["--reward", "{tmp}/nowhere"], "{tmp}/nowhere: no such model directory"),
        (["--reward", "{model}"], "not a reward model; `fledge reward` makes one"),
        (["--reward", "exact", "0.5*exact"], "the reward exact is there twice"),
        (["--samples", "1"], "--samples 1: must be at least 2; a completion is judged by others"),
        (["--minibatches", "49"], "--minibatches 49: more than the 48 completions of a roll-out"),
        (["--clip-high", "0"], "--clip-high 0.0: must be above 0"),
        (["--advantage", "gro"], "--advantage"),
        (["--evaluation-samples", "0"], "--evaluation-samples 0: must be at least 1"),
        (["--lora-alpha", "3"], "--lora-alpha and --lora-targets go with --lora-rank"),
        (["--out", "{tmp}"], "{tmp}: exists and is not a run directory"),
    ],
)
def test_a_mistake_is_one_line_and_touches_nothing(
    more: list[str],
    message: str,
    flags: list[str],
    talker: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def filled(text: str) -> str:
        return text.replace("{tmp}", str(tmp_path)).replace("{model}", str(talker))

    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert cli.main(changed(flags, *map(filled, more))) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("fledge grpo: error: ")
    assert printed.count("\n") == 1
    assert filled(message) in printed
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_row_without_an_answer_is_named(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Which, {i}?"} for i in range(9)])
    assert cli.main(flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"the reward exact failed: {tmp_path}/prompts.jsonl:" in error and '"answer"' in error
    assert not (tmp_path / "run" / "model").exists()
