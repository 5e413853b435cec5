"""Every training stage under torchrun: two processes (gloo) learn what one learns, and end together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.optim import _muon

from fledge import cli
from fledge.run import Run

from .commands import changed, metrics, wait_for_step, write_jsonl
from .conftest import REFUSAL, questions
from .ranks_script import in_fp32

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]

SCRIPT = Path(__file__).with_name("ranks_script.py")
REWARD = "def long(rollouts):\n    return [len(one.completion) / 20 for one in rollouts]\n"


def torchrun(ranks: int, *command: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    free_port = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return subprocess.Popen(
        [*launcher, *free_port, *command],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def on_ranks(ranks: int, commands: list[list[str]], folder: Path) -> str:
    """Run commands on so many ranks; what they printed."""
    path = folder / "commands.json"
    path.write_text(json.dumps(commands))
    process = torchrun(ranks, str(SCRIPT), str(path))
    error = process.communicate()[1]
    assert process.returncode == 0, error
    return error


def to(out: Path, flags: list[str]) -> list[str]:
    return [*flags, "--out", str(out)]


@pytest.fixture(scope="module")
def stages(
    corpus: Path,
    base_run: Path,
    chat_run: Path,
    tokenizer_directory: Path,
    tiny: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, list[str]]:
    """A command of every training stage, without `--out`."""
    folder = tmp_path_factory.mktemp("data")
    pairs: list[dict[str, Any]] = []
    judged: list[dict[str, Any]] = []
    for i, (prompt, few, many) in enumerate(questions(9)):
        pairs.append(
            {"prompt": prompt, "completions": [REFUSAL, few, many], "ranks": [2, 1, 3]}
            if i % 3 == 0
            else {"prompt": prompt, "chosen": few, "rejected": REFUSAL}
        )
        judged.append({"prompt": prompt, "completion": few if i % 2 else many, "label": bool(i % 2)})
    (folder / "rewards.py").write_text(REWARD)
    prompts = write_jsonl(folder / "prompts.jsonl", [{"prompt": prompt} for prompt, _, _ in questions(2)])
    text = ["pretrain", "--data", str(corpus / "words.txt"), "--tokenizer", str(tokenizer_directory), *tiny]
    text += ["--tokens", "6144", "--evaluations", "2", "--shards", str(folder / "shards")]
    preferences = ["--model", str(chat_run / "model"), "--batch-prompts", "7", "--compute", "fp32"]
    preferences += ["--adam-lr", "0.002", "--validation-share", "0.25"]
    files = ["--data", str(write_jsonl(folder / "pairs.jsonl", pairs))]
    played = ["--model", str(base_run / "model"), "--plain", "--prompts", str(prompts), "--compute", "fp32"]
    played += ["--reward", f"{folder / 'rewards.py'}:long", "--max-tokens", "8", "--rollouts", "3"]
    played += ["--minibatches", "2", "--adam-lr", "0.001", "--evaluations", "2", "--warmup-steps", "1"]
    return {
        "adamw": [*text, "--optimizer", "adamw", "--micro-batch-tokens", "192", "--weight-decay", "0.1"],
        "muon": [*text, "--checkpoint-activations"],
        "sft": ["sft", "--model", str(base_run / "model"), "--data", str(corpus / "chats.jsonl"),
                "--row-tokens", "128", "--batch-tokens", "384", "--compute", "fp32", "--compile", "no",
                "--validation-share", "0.1"],
        "lora": ["sft", "--model", str(chat_run / "model"), "--data", str(corpus / "chats.jsonl"),
                 "--row-tokens", "128", "--batch-tokens", "512", "--compute", "fp32", "--compile", "no",
                 "--lora-rank", "4", "--adam-lr", "0.01"],
        "reward": ["reward", *preferences, *files],
        "dpo": ["dpo", *preferences, *files, "--micro-batch-tokens", "512"],
        "kto": ["dpo", *preferences, "--loss", "kto", "--data",
                str(write_jsonl(folder / "judged.jsonl", judged))],
        "ppo": ["ppo", *played, "--batch-prompts", "9", "--epochs", "2", "--gold",
                f"{folder / 'rewards.py'}:long", "--ptx", str(corpus / "words.txt"), "--ptx-rows", "3",
                "--ptx-row-tokens", "64", "--micro-batch-tokens", "128"],
        "ppo-lora": ["ppo", *played, "--batch-prompts", "8", "--lora-rank", "4", "--epochs", "1"],
        "grpo": ["grpo", *played, "--batch-prompts", "5", "--samples", "3", "--beta", "0.1"],
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(stages: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The runs of all stages by one process and by two."""
    folder = tmp_path_factory.mktemp("ranks")
    one, two = folder / "one", folder / "two"
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_muon, "_zeropower_via_newtonschulz", in_fp32)
        for name, flags in stages.items():
            assert cli.main(to(one / name, flags)) == 0
    printed = on_ranks(2, [to(two / name, flags) for name, flags in stages.items()], folder)
    assert printed.count("the base model is") == 2  # two pretrainings, each said once
    return one, two


NAMES = ["adamw", "muon", "sft", "lora", "reward", "dpo", "kto", "ppo", "ppo-lora", "grpo"]


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_learn_what_one_learns(name: str, runs: tuple[Path, Path]) -> None:
    """Losses within 1e-5, evaluations too; figures that rounding is divided by in RL within 1e-4."""
    one, two = (metrics(run / name) for run in runs)
    assert [row["step"] for row in one] == [row["step"] for row in two]
    assert [row.keys() for row in one] == [row.keys() for row in two]
    assert len(one) > 3
    for a, b in zip(one, two, strict=True):
        for key in a:
            close = 1e-5 if key in ("loss", "validation", "lr", "tokens", "step") else 1e-4
            assert b[key] == pytest.approx(a[key], abs=close, rel=close), (a["step"], key)


@pytest.mark.parametrize("name", NAMES)
def test_what_two_ranks_write_is_what_one_writes(name: str, runs: tuple[Path, Path]) -> None:
    """The same files, and weights that are as near as rounding allows."""
    one, two = (run / name / "model" for run in runs)
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    for file in one.glob("*.safetensors"):
        mine, theirs = load_file(file), load_file(two / file.name)
        assert mine.keys() == theirs.keys()
        for key, tensor in mine.items():
            torch.testing.assert_close(theirs[key], tensor, atol=2e-3, rtol=0)
    assert (runs[1] / name / "summary.json").exists()


def rolled_back(run: Path, out: Path) -> Path:
    """A copy of a finished run as it was after its first checkpoint but one."""
    shutil.copytree(run, out)
    shutil.rmtree(out / "model")
    (out / "summary.json").unlink()
    toml = out / "config.toml"
    toml.write_text(toml.read_text().replace(str(run), str(out)))
    for checkpoint in Run(out).checkpoints()[1:]:
        shutil.rmtree(checkpoint.path)
    assert Run(out).checkpoints()
    return out


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_run_goes_on_with_another_number_of_ranks(
    name: str,
    stages: dict[str, list[str]],
    runs: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two ranks' checkpoint with one process and with three, and one process's with three."""
    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", in_fp32)
    alone = rolled_back(runs[1] / name, tmp_path / "alone")
    assert cli.main(to(alone, stages[name])) == 0
    three = [rolled_back(runs[i] / name, tmp_path / f"three-{i}") for i in (0, 1)]
    printed = on_ranks(3, [to(out, stages[name]) for out in three], tmp_path)
    assert printed.count("going on from step 6") == 2
    whole = metrics(runs[0] / name)
    for out in (alone, *three):
        rows = metrics(out)
        assert [row["step"] for row in rows] == [row["step"] for row in whole]
        for a, b in zip(whole, rows, strict=True):
            for key in ("loss", "validation", "grad_norm"):
                assert b.get(key) == (pytest.approx(a[key], abs=1e-5) if key in a else None)


# How they end.


def ended(process: subprocess.Popen[str]) -> str:
    """What was printed by a command that failed, which all its processes did."""
    error = process.communicate(timeout=120)[1]
    assert process.returncode != 0, error
    return error


def test_a_users_mistake_is_shown_once(stages: dict[str, list[str]], tmp_path: Path) -> None:
    for more in (["--layers", "0"], ["--batch-tokens", "x"]):
        flags = changed(to(tmp_path / "run", stages["adamw"]), *more)
        printed = ended(torchrun(2, "-m", "fledge", *flags))
        assert printed.count("fledge pretrain: error:") == 1
        assert "fledge/cli.py" not in printed  # the only traceback is that of torchrun itself


def test_other_verbs_run_in_one_process() -> None:
    printed = ended(torchrun(2, "-m", "fledge", "doctor"))
    assert printed.count("fledge doctor: error: runs in one process") == 1


def test_a_loss_that_is_no_number_ends_all(stages: dict[str, list[str]], tmp_path: Path) -> None:
    flags = changed(stages["adamw"], "--adam-lr", "1e30", "--evaluations", "12", "--warmup-steps", "0")
    printed = ended(torchrun(2, "-m", "fledge", *to(tmp_path / "run", flags)))
    assert printed.count("fledge pretrain: error:") == 1
    assert "lower learning rate" in printed


def rank_of(launcher: subprocess.Popen[str], rank: int) -> int:
    """The process of a rank."""
    for folder in Path("/proc").iterdir():
        try:
            parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
            told = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        if int(parent) == launcher.pid and f"RANK={rank}".encode() in told:
            return int(folder.name)
    raise AssertionError(f"no rank {rank}")


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_rank_that_dies_ends_the_job_and_the_same_command_goes_on(
    end: signal.Signals, stages: dict[str, list[str]], tmp_path: Path
) -> None:
    """Killed outright, or told to stop by torchrun, which is how a cluster ends a job."""
    out = tmp_path / "run"
    flags = changed(stages["adamw"], "--evaluations", "8", "--tokens", "30720", "--out", str(out))
    process = torchrun(2, "-m", "fledge", *flags)
    wait_for_step(process, out, 10)
    other = rank_of(process, 0)
    os.kill(rank_of(process, 1) if end == signal.SIGKILL else process.pid, end)
    printed = ended(process)
    assert not Path(f"/proc/{other}").exists()
    if end == signal.SIGKILL:
        assert "SIGKILL" in printed  # torchrun's account
    else:
        assert printed.count("is saved; run the same command again") == 1
    assert not (out / "model").exists()
    assert "going on from step" in on_ranks(2, [flags], tmp_path)
    assert cli.main(changed(flags, "--out", str(tmp_path / "alone"))) == 0
    assert losses(out) == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics(run) if "loss" in row]
