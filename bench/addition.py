"""Reversed addition of three digits: a little `fledge sft`, then `fledge grpo` with a verifier.

    python bench/addition.py [--seeds 0 1 2] [--rollouts 80] [--starter 2350] [--out DIR]

`128+367=` is answered digit by digit, `8+7=15 2+6+1=9 1+3=4`, and on its own line `594`. A model of 0.1
million parameters over bytes sees some worked examples; then it practises on 10,000 problems of which it is
told only whether its last line is right. No test problem is in any other file.
The rate of `fledge sft` does not fall: where it has fallen to zero, the model lies at the bottom of a valley
so steep that practice must go on in far smaller steps. Here it goes on at a tenth of the rate.
With --out, an interrupted run is gone on with by the same command.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fledge import cli
from fledge.data.prompts import read_prompts
from fledge.engine.text import load_engine
from fledge.rewards.verifiers import reward_function
from fledge.train.prompts import encode_prompts
from fledge.train.rollout import roll_out
from fledge.types import SamplingParams

REWARD, MOST = "exact:last_line=true", 48


def right(model: Path, test: Path, temperature: float, seed: int) -> float:
    """The share of test problems whose answer is exactly right."""
    engine, tokenizer = load_engine(model)
    prompts, _ = encode_prompts(list(read_prompts(test)), tokenizer, False, MOST)
    params = SamplingParams(temperature, max_tokens=MOST, seed=seed)
    rewards = reward_function(REWARD)(roll_out(engine, tokenizer, prompts, params))
    return sum(rewards) / len(rewards)


def command(*words: str) -> None:
    if cli.main(words):
        raise SystemExit(f"fledge {words[0]} failed")


def seconds_of(path: Path) -> float:
    return float(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else 0.0


def practise(spent: Path, *words: str) -> None:
    """A command whose processor time is added to that of its interrupted beginnings."""
    started = time.process_time()
    try:
        command(*words)
    finally:
        seconds = seconds_of(spent) + time.process_time() - started
        spent.write_text(json.dumps(round(seconds, 1)), encoding="utf-8")


def trial(seed: int, out: Path, starter: int, rollouts: int) -> dict[str, float]:
    """All of it with the random numbers of one seed."""
    task = out / "task"
    own = ["--compute", "fp32", "--seed", str(seed)]
    if not task.exists():
        command(
            "task", "addition", "--out", f"{task}", "--train", "10000", "--test", "500", "--starter",
            str(starter), "--text", "2500", "--seed", str(seed),
        )  # fmt: skip
    (out / "words.txt").write_text("user assistant\n" * 2000, encoding="utf-8")  # roles are one token each
    if not (out / "tokenizer").exists():
        command(
            "tokenizer", "--data", f"{task}/text.jsonl", f"{out}/words.txt", "--vocab-size", "280", "--out",
            f"{out}/tokenizer",
        )  # fmt: skip
    command(
        "pretrain", "--data", f"{task}/text.jsonl", "--tokenizer", f"{out}/tokenizer", "--out", f"{out}/base",
        "--params", "120k", "--hidden-size", "64", "--layers", "2", "--context", "128", "--row-tokens",
        "128", "--batch-tokens", "2048", "--tokens", "150k", "--compile", "no", "--evaluations", "1", *own,
    )  # fmt: skip
    command(
        "sft", "--model", f"{out}/base/model", "--data", f"{task}/sft.jsonl", "--out", f"{out}/sft",
        "--epochs", "5", "--row-tokens", "128", "--batch-tokens", "1024", "--adam-lr", "0.004",
        "--decay-share", "0", "--compile", "no", "--evaluations", "1", *own,
    )  # fmt: skip
    practise(
        out / "core_seconds.json",
        "grpo", "--model", f"{out}/sft/model", "--prompts", f"{task}/prompts.jsonl", "--reward", REWARD,
        "--out", f"{out}/grpo", "--rollouts", str(rollouts), "--max-tokens", str(MOST), "--adam-lr", "4e-4",
        "--clip-high", "0.28", "--decode-rows", "256", "--validation-share", "0.02", "--evaluations", "8",
        *own,
    )  # fmt: skip
    figures = {}
    for name in ("sft", "grpo"):
        for temperature, words in ((0.0, "greedy"), (1.0, "sampled")):
            found = right(out / name / "model", task / "test.jsonl", temperature, seed)
            figures[f"{name} {words}"] = found
    summary = json.loads((out / "grpo" / "summary.json").read_text(encoding="utf-8"))
    figures["without signal"] = summary["groups_without_signal"] / summary["groups"]
    return {**figures, "kl": summary["validation_kl"], "core seconds": seconds_of(out / "core_seconds.json")}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rollouts", type=int, default=80)
    parser.add_argument("--starter", type=int, default=2350, help="worked examples that sft sees")
    parser.add_argument("--out", type=Path, help="where the runs go; by default a temporary folder")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        found = {}
        for seed in options.seeds:
            out = (options.out or Path(temporary)) / str(seed)
            out.mkdir(parents=True, exist_ok=True)
            found[seed] = trial(seed, out, options.starter, options.rollouts)
    table = Table("seed", *next(iter(found.values())), title="share of new problems that are right")
    for seed, figures in found.items():
        table.add_row(str(seed), *(f"{value:.3f}" for value in figures.values()))
    Console(width=140).print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
