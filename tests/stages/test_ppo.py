"""`fledge ppo`: what is learned, where it begins, and that an interruption changes nothing."""

from __future__ import annotations

import json
import math
import random
import shutil
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

REWARDS = """
import math

def short(rollouts):
    return [-abs(len(one.completion.split()) - 2) / 3 for one in rollouts]

def words(rollouts):
    return [len(one.completion.split()) for one in rollouts]

def wanted(rollouts):
    return [float(one.row["wanted"] in one.completion.split()) for one in rollouts]

def raises(rollouts):
    return [1 / (len(one.completion.split()) != 3) for one in rollouts]

def nan(rollouts):
    return [math.nan for one in rollouts]

def few(rollouts):
    return [0.0]
"""


def question(rng: random.Random) -> str:
    return f"What is {' '.join(rng.choices(WORDS, k=rng.randint(1, 5)))}?"


@pytest.fixture(scope="module")
def talker(base_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An assistant that says up to six words at random."""
    folder, rng = tmp_path_factory.mktemp("talker"), random.Random(1)
    chats = [
        {"messages": [
            {"role": "user", "content": question(rng)},
            {"role": "assistant", "content": " ".join(rng.choices(WORDS, k=rng.randint(0, 6)))},
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


@pytest.fixture(scope="module")
def judge(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that was told that few words beat many."""
    folder, rng = tmp_path_factory.mktemp("judge"), random.Random(2)
    rows = [
        {
            "prompt": question(rng),
            "chosen": " ".join(rng.choices(WORDS, k=rng.randint(1, 2))),
            "rejected": " ".join(rng.choices(WORDS, k=rng.randint(4, 6))),
        }
        for _ in range(80)
    ]
    write_jsonl(folder / "preferences.jsonl", rows)
    assert cli.main([
        "reward", "--model", str(talker), "--data", str(folder / "preferences.jsonl"), "--out",
        str(folder / "run"), "--epochs", "3", "--adam-lr", "0.003", "--no-controls", "--compute", "fp32",
    ]) == 0  # fmt: skip
    return folder / "run" / "model"


@pytest.fixture
def flags(talker: Path, tmp_path: Path) -> list[str]:
    rng = random.Random(3)
    rows = [{"prompt": f"{question(rng)} {i}", "wanted": rng.choice(WORDS)} for i in range(60)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    (tmp_path / "rewards.py").write_text(REWARDS)
    return [
        "ppo", "--model", str(talker), "--prompts", str(tmp_path / "prompts.jsonl"), "--reward",
        f"{tmp_path}/rewards.py:short", "--out", str(tmp_path / "run"), "--rollouts", "8", "--batch-prompts",
        "32", "--max-tokens", "16", "--adam-lr", "0.002", "--warmup-steps", "2", "--evaluations", "2",
        "--minibatches", "2", "--validation-share", "0.4", "--compute", "fp32",
    ]  # fmt: skip


def samples(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


ROLLOUT_FIGURES = {
    "score", "reward", "kl", "kl_k3", "beta", "completion_tokens", "ended", "empty", "value_explained",
    "sampler_gap", "sampler_gap_largest",
}  # fmt: skip
STEP_FIGURES = {
    "loss", "policy_loss", "value_loss", "ratio", "ratio_distance", "clip_fraction", "value_clip_fraction",
    "entropy", "kl_step", "grad_norm", "lr",
}  # fmt: skip


def test_an_assistant_learns_what_is_rewarded(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert cli.main(changed(flags, "--gold", f"{tmp_path}/rewards.py:words")) == 0
    assert {path.name for path in run.iterdir()} == {
        LOCK, "config.toml", "environment.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "model",
        "summary.json",
    }  # fmt: skip
    rows = metrics(run)
    evaluations = [row for row in rows if "validation" in row]
    assert [row["step"] for row in evaluations] == [0, 32, 64]
    assert evaluations[0]["validation_kl"] == 0.0 and evaluations[0]["validation_score"] < -0.2
    assert evaluations[-1]["validation_score"] > evaluations[0]["validation_score"] + 0.15
    assert evaluations[-1]["validation_kl"] > 0.1 and evaluations[-1]["validation_entropy"] > 0
    assert evaluations[-1]["validation"] == -evaluations[-1]["validation_gold"]
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 8 * 4 * 2 and all(row.keys() >= STEP_FIGURES for row in steps)
    firsts = [row for row in steps if "score" in row]
    assert [row["step"] for row in firsts] == list(range(1, 65, 8))
    assert all(row.keys() >= ROLLOUT_FIGURES for row in firsts)
    assert firsts[0]["value_explained"] == 0.0, "a value function of 0 explains nothing"
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(row["sampler_gap_largest"] < 1e-4 for row in firsts)
    found = summary(run)
    assert found["prompts"] + found["held_out"] == 60 and found["steps"] == 64
    assert found["validation_score"] == evaluations[-1]["validation_score"]
    assert found["beta"] == 0.05 and found["stopped_at_kl"] is None
    lineage = json.loads((run / "model" / "lineage.json").read_text())
    assert (lineage["stage"], lineage["tokens"]) == ("ppo", found["tokens"])
    table = samples(run)
    assert len(table) == 3 * found["held_out"]
    assert {"step", "prompt", "text", "ended", "score", "gold"} == set(table[0])
    printed = capsys.readouterr().err
    assert f"{table[0]['prompt']} -> {table[0]['text']}  [score {table[0]['score']:.2f}, gold " in printed
    assert not (run / "model" / "value.safetensors").exists()


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["whole", "adapter", "reward model"])
def test_it_begins_at_the_reference(
    compute: str, kind: str, flags: list[str], judge: Path, tmp_path: Path
) -> None:
    """Ratio exactly 1 and KL exactly 0, whatever the batch's shape does to the rounding."""
    more = {"whole": [], "adapter": ["--lora-rank", "2"], "reward model": ["--reward", str(judge)]}[kind]
    more += ["--rollouts", "2", "--micro-batch-tokens", "100", "--compute", compute, "--epochs", "1"]
    assert cli.main(changed(flags, *more)) == 0
    evaluation, first, second = metrics(tmp_path / "run")[:3]
    assert first["ratio_distance"] == 0.0 and first["ratio"] == pytest.approx(1.0, abs=1e-12)
    assert first["kl"] == first["kl_k3"] == first["kl_step"] == evaluation["validation_kl"] == 0.0
    assert second["ratio_distance"] > 0.0
    assert first["sampler_gap"] < (1e-5 if compute == "fp32" else 0.1)


def test_a_reward_model_is_earned_from(flags: list[str], judge: Path, tmp_path: Path) -> None:
    """The value function begins as it and so explains something at once; or as nothing."""
    run = tmp_path / "run"
    assert cli.main(changed(flags, "--reward", str(judge), "--beta", "0.02")) == 0
    rows = metrics(run)
    scores = [row["validation_score"] for row in rows if "validation" in row]
    assert scores[-1] > scores[0] + 0.2
    assert next(row for row in rows if "loss" in row)["value_explained"] != 0.0
    (last,) = [path for path in (run / "checkpoints").iterdir() if path.name == "step_000064"]
    assert {"value.safetensors", "model.safetensors", "optimizer.safetensors"} <= {
        p.name for p in last.iterdir()
    }
    more = ["--reward", str(judge), "--value", "policy", "--rollouts", "1", "--out", str(tmp_path / "other")]
    assert cli.main(changed(flags, *more)) == 0
    assert next(row for row in metrics(tmp_path / "other") if "loss" in row)["value_explained"] == 0.0


@pytest.mark.parametrize(
    "kind",
    ["function", pytest.param("model", marks=pytest.mark.slow), pytest.param("lora", marks=pytest.mark.slow)],
)
def test_killed_and_interrupted_the_result_is_the_same(
    kind: str, flags: list[str], judge: Path, tmp_path: Path
) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    more = ["--rollouts", "8", "--evaluations", "8", "--kl-target", "1", "--kl-horizon", "500"]
    if kind != "function":
        (tmp_path / "text.txt").write_text("the quick brown fox " * 50)
        more += ["--reward", str(judge), "--normalise-rewards", "--ptx", str(tmp_path / "text.txt")]
        more += ["--ptx-row-tokens", "32", "--ptx-rows", "2"]
    more += ["--lora-rank", "2"] if kind == "lora" else []
    flags = changed(flags, *more)
    stops = ((signal.SIGKILL, 12), (signal.SIGINT, 29))
    kill_and_interrupt(flags, out, *(stops[:1] if kind == "function" else stops))
    assert cli.main(flags) == 0
    assert cli.main(changed(flags, "--out", str(whole))) == 0
    assert metrics(out) == metrics(whole)
    assert samples(out) == samples(whole)
    assert summary(out)["beta"] == summary(whole)["beta"] != 0.05
    name = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    assert (out / "model" / name).read_bytes() == (whole / "model" / name).read_bytes()


def test_an_adapter_is_written_alone(flags: list[str], talker: Path, tmp_path: Path) -> None:
    """It belongs to the model it began with, and `fledge merge` makes one model of both."""
    before = (talker / "model.safetensors").read_bytes()
    run = tmp_path / "run"
    more = ["--lora-rank", "4", "--adam-lr", "0.01", "--beta", "0.01", "--rollouts", "16"]
    assert cli.main(changed(flags, *more)) == 0
    assert (talker / "model.safetensors").read_bytes() == before
    assert (run / "model" / "adapter_model.safetensors").exists()
    assert not (run / "model" / "model.safetensors").exists()
    scores = [row["score"] for row in metrics(run) if "score" in row]
    assert sum(scores[-4:]) / 4 > scores[0] + 0.2
    assert cli.main(["merge", "--model", str(run / "model"), "--out", str(tmp_path / "merged")]) == 0
    # A run that begins with what was merged has the figures that the run before ended with.
    again = changed(
        flags, "--model", str(tmp_path / "merged"), "--rollouts", "1", "--out", str(tmp_path / "next")
    )
    assert cli.main(again) == 0
    last = summary(run)["validation_score"]
    assert metrics(tmp_path / "next")[0]["validation_score"] == pytest.approx(last, abs=0.05)
    assert cli.main(changed(again, "--model", str(run / "model"), "--out", str(tmp_path / "no"))) == 2


def test_the_rows_reach_the_reward(flags: list[str], tmp_path: Path) -> None:
    """A verifier sees the data that a prompt came with; samples are several for each prompt."""
    more = ["--reward", f"{tmp_path}/rewards.py:wanted", "--samples", "3", "--rollouts", "1"]
    more += ["--missing-eos-score", "0"]
    assert cli.main(changed(flags, *more)) == 0
    first = next(row for row in metrics(tmp_path / "run") if "loss" in row)
    assert 0 <= first["score"] <= 1


def test_base_models_continue_plain_text(flags: list[str], base_run: Path, tmp_path: Path) -> None:
    """To the end of the document; completions that do not end have the score that is set."""
    more = ["--model", str(base_run / "model"), "--missing-eos-score", "-7", "--rollouts", "1"]
    assert cli.main(changed(flags, *more, "--plain")) == 0
    row = next(row for row in metrics(tmp_path / "run") if "loss" in row)
    assert row["ended"] < 0.5 and row["score"] < -7 * (1 - row["ended"]) + 1e-6
    assert all((one["score"] == -7) == (not one["ended"]) for one in samples(tmp_path / "run"))


def test_it_stops_at_a_kl(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert cli.main(changed(flags, "--stop-kl", "0.05", "--beta", "0")) == 0
    found = summary(run)
    assert 8 <= found["steps"] < 64 and found["steps"] % 8 == 0
    assert found["stopped_at_kl"] > 0.05
    assert "nats a completion is above --stop-kl 0.05" in capsys.readouterr().err
    assert metrics(run)[-1]["step"] == found["steps"] and "validation" in metrics(run)[-1]


def test_text_is_kept_in_mind(flags: list[str], corpus: Path, tmp_path: Path) -> None:
    """With a large weight the loss of the mixed-in text falls."""
    more = ["--ptx", str(corpus / "words.txt"), "--ptx-weight", "5", "--ptx-row-tokens", "64"]
    assert cli.main(changed(flags, *more)) == 0
    losses = [row["text_loss"] for row in metrics(tmp_path / "run") if "loss" in row]
    assert sum(losses[-8:]) < sum(losses[:8])


def test_what_is_left_out_or_empty_is_counted_and_named(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A policy that is paid for silence falls silent."""
    path = tmp_path / "prompts.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], json.dumps({"prompt": "fox " * 90}), *lines[1:]]))
    (tmp_path / "silence.py").write_text(
        "def f(rollouts):\n    return [-len(one.completion) for one in rollouts]"
    )
    more = ["--reward", f"{tmp_path}/silence.py:f", "--adam-lr", "0.005", "--beta", "0", "--rollouts", "12"]
    assert cli.main(changed(flags, *more)) == 0
    found = summary(tmp_path / "run")
    assert found["overlong_prompts"] == {"count": 1, "first": [f"{path}:2"]}
    assert f"1 leave no room for a completion ({path}:2)" in capsys.readouterr().err
    empty = found["empty_completions"]
    assert empty["count"] > 0 and empty["first"][0].startswith(f"{path}:")
    firsts = [row for row in metrics(tmp_path / "run") if "score" in row]
    assert firsts[-1]["empty"] > 0.5
    assert sum(round(row["empty"] * 32) for row in firsts) == empty["count"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "failed: ZeroDivisionError: division by zero; the prompt is {tmp}/prompts.jsonl:"),
        ("nan", "returned nan, no finite number; the prompt is {tmp}/prompts.jsonl:"),
        ("few", "returned 1 numbers for "),
    ],
)
def test_a_broken_reward_takes_no_step(
    name: str, message: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The prompt is named and the completion shown; when the function is mended, the run goes on."""
    flags = changed(flags, "--reward", f"{tmp_path}/rewards.py:{name}", "--rollouts", "1")
    assert cli.main(flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"fledge ppo: error: the reward {tmp_path}/rewards.py:{name} ")
    assert message.replace("{tmp}", str(tmp_path)) in error and ", the completion '" in error
    run = tmp_path / "run"
    assert not any("loss" in row for row in metrics(run)) if (run / "metrics.jsonl").exists() else True
    assert not (run / "model").exists()
    (tmp_path / "rewards.py").write_text(f"def {name}(rollouts):\n    return [0.0 for one in rollouts]")
    assert cli.main(flags) == 0
    assert summary(run)["steps"] == 8


def test_another_tokenizer_is_read_as_text(
    flags: list[str], judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(judge, other)
    config = json.loads((other / "tokenizer_config.json").read_text())
    config["chat_template"] = config["chat_template"].replace(
        "{%- if tools %}", "{{- 'Hi\n' }}{%- if tools %}", 1
    )
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    flags = changed(flags, "--reward", str(other), "--rollouts", "1")
    assert cli.main(flags) == 2
    assert (
        "its tokenizer or chat template is not the policy's; pass --reward-as-text" in capsys.readouterr().err
    )
    assert cli.main([*flags, "--reward-as-text"]) == 0
    assert math.isfinite(summary(tmp_path / "run")["validation_score"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompts", "{tmp}/nothing.jsonl"], "{tmp}/nothing.jsonl: no such file"),
        (["--prompts", "{tmp}/rows.jsonl"], '{tmp}/rows.jsonl:1: it takes a list in "messages"'),
        (
            ["--max-tokens", "125"],
            "prompts.jsonl: no prompt leaves room for a completion: none has at most 3",
        ),
        (["--max-tokens", "500"], "none has at most 0 tokens; lower --max-tokens"),
        (["--reward", "{tmp}/none.py:f"], "{tmp}/none.py: no such file"),
        (["--reward", "{tmp}/rewards.py"], "name the function behind the file"),
        (["--reward", "{tmp}/rewards.py:tall"], "{tmp}/rewards.py: has no function 'tall'"),
        (["--gold", "{tmp}/rewards.py:tall"], "{tmp}/rewards.py: has no function 'tall'"),
        (["--reward", "{tmp}/nowhere"], "{tmp}/nowhere: no such model directory"),
        (["--reward", "{model}"], "not a reward model; `fledge reward` makes one"),
        (["--value", "reward"], "--value reward: needs a reward model that reads the policy's ids"),
        (["--model", "{tmp}/plain"], "{tmp}/plain: its tokenizer has no chat template that marks what the"),
        (["--ptx", "{tmp}/nothing.txt"], "{tmp}/nothing.txt"),
        (["--minibatches", "33"], "--minibatches 33: more than the 32 completions of a roll-out"),
        (["--temperature", "0"], "--temperature 0.0: must be above 0"),
        (["--validation-share", "1"], "--validation-share 1.0: must be at least 0 and below 1"),
        (["--lora-alpha", "3"], "--lora-alpha and --lora-targets go with --lora-rank"),
        (["--adam-lr", "0"], "--adam-lr 0.0: must be a number above 0"),
        (["--decode-rows", "0"], "--decode-rows 0: must be at least 1"),
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
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}])
    shutil.copytree(talker, tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "plain" / "tokenizer_config.json").write_text(json.dumps(config))

    def filled(text: str) -> str:
        return text.replace("{tmp}", str(tmp_path)).replace("{model}", str(talker))

    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert cli.main(changed(flags, *map(filled, more))) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("fledge ppo: error: ")
    assert printed.count("\n") == 1
    assert filled(message) in printed
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert after == before


def test_the_same_run_twice_is_the_same(flags: list[str], tmp_path: Path) -> None:
    other = changed(flags, "--out", str(tmp_path / "other"))
    assert cli.main(changed(flags, "--rollouts", "2")) == cli.main(changed(other, "--rollouts", "2")) == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "other")
    assert cli.main(changed(flags, "--rollouts", "2")) == 0, "finished already"


def test_rewards_are_named_as_everywhere(flags: list[str], judge: Path, tmp_path: Path) -> None:
    """Verifiers, functions and models, with weights; the value function begins as no part of a sum."""
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    write_jsonl(tmp_path / "prompts.jsonl", [{**row, "answer": row["wanted"]} for row in rows])
    specs = ["exact", f"0.5*{tmp_path}/rewards.py:short", f"0.1*{judge}"]
    assert cli.main(changed(flags, "--reward", *specs, "--rollouts", "1")) == 0
    first = next(row for row in metrics(tmp_path / "run") if "loss" in row)
    assert math.isfinite(first["score"]) and first["value_explained"] == 0.0
