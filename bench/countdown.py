"""Countdown with three numbers: `fledge sft`, then `fledge grpo` beside as much more of `fledge sft`.

    python bench/countdown.py [--seeds 0 1 2] [--rollouts 60] [--out DIR]

`46 from 3 7 25` is answered by an expression that uses each number once. A model of 0.1 million parameters
sees some solved problems; then it either practises on other problems of which it is told only whether its
expression is right, or sees the solved ones again, for as many seconds of the processor, at a falling rate.
pass@k on new problems, from 32 answers to each at temperature 1, tells whether practice adds or sharpens:
what it adds was not there at large k before. Writes result.json and pass_at_k.svg into --out.
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
from fledge.evals.samples import pass_at_k
from fledge.report.charts import COLOURS, MARKERS, chart_style, new_figure
from fledge.rewards.verifiers import reward_function
from fledge.train.prompts import encode_prompts
from fledge.train.rollout import roll_out
from fledge.types import SamplingParams

REWARD, MOST, SAMPLES, KS = "countdown", 16, 32, (1, 2, 4, 8, 16, 32)
NAMES = {"sft": "SFT", "more": "SFT, as long again as GRPO took", "grpo": "SFT, then GRPO"}


def counts(model: Path, test: Path, temperature: float, samples: int, seed: int) -> list[int]:
    """How many answers to each test problem are right."""
    engine, tokenizer = load_engine(model, batch_size=256)
    prompts, _ = encode_prompts(list(read_prompts(test)), tokenizer, False, 64)
    params = SamplingParams(temperature, max_tokens=MOST, n=samples, seed=seed)
    rewards = reward_function(REWARD)(roll_out(engine, tokenizer, prompts, params))
    return [int(sum(rewards[i : i + samples])) for i in range(0, len(rewards), samples)]


def measured(out: Path, name: str, seed: int) -> dict[str, float]:
    """pass@k for each k, and the share that is right greedily; measured once."""
    model, test, known = out / name / "model", out / "task" / "test.jsonl", out / f"{name}-right.json"
    if not known.exists():
        greedy, sampled = counts(model, test, 0.0, 1, seed), counts(model, test, 1.0, SAMPLES, seed)
        known.write_text(json.dumps([greedy, sampled]), encoding="utf-8")
    greedy, sampled = json.loads(known.read_text(encoding="utf-8"))
    figures = {f"pass@{k}": sum(pass_at_k(SAMPLES, right, k) for right in sampled) / len(sampled) for k in KS}
    return {"greedy": sum(greedy) / len(greedy), **figures}


def command(*words: str) -> None:
    if cli.main(words):
        raise SystemExit(f"fledge {words[0]} failed")


def number_in(path: Path) -> float:
    return float(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else 0.0


def timed(spent: Path, *words: str) -> None:
    """A command whose processor time is added to that of its interrupted beginnings."""
    started = time.process_time()
    try:
        command(*words)
    finally:
        seconds = number_in(spent) + time.process_time() - started
        spent.write_text(json.dumps(round(seconds, 1)), encoding="utf-8")


def begin(out: Path, seed: int, starter: int, own: Sequence[str]) -> None:
    """The task's files, a tokenizer, and a model that has read solved problems as text: `base`."""
    if not (out / "task").exists():
        command(
            "task", "countdown", "--out", f"{out}/task", "--numbers", "3", "--largest", "15", "--max-target",
            "50", "--no-steps", "--train", "3000", "--test", "300", "--starter", str(starter), "--text",
            str(starter), "--seed", str(seed),
        )  # fmt: skip
    (out / "words.txt").write_text("user assistant\n" * 2000, encoding="utf-8")  # roles are one token each
    if not (out / "tokenizer").exists():
        command(
            "tokenizer", "--data", f"{out}/task/text.jsonl", f"{out}/words.txt", "--vocab-size", "280",
            "--out", f"{out}/tokenizer",
        )  # fmt: skip
    command(
        "pretrain", "--data", f"{out}/task/text.jsonl", "--tokenizer", f"{out}/tokenizer", "--out",
        f"{out}/base", "--params", "120k", "--hidden-size", "64", "--layers", "2", "--context", "128",
        "--row-tokens", "128", "--batch-tokens", "2048", "--tokens", "150k", "--compile", "no",
        "--evaluations", "1", *own,
    )  # fmt: skip


def sft(out: Path, model: str, name: str, epochs: float, decay_share: float, own: Sequence[str]) -> None:
    """Learning from the solved problems."""
    timed(
        out / f"{name}-seconds.json",
        "sft", "--model", f"{out}/{model}/model", "--data", f"{out}/task/sft.jsonl", "--out",
        f"{out}/{name}", "--epochs", f"{epochs:.2f}", "--decay-share", f"{decay_share:g}", "--row-tokens",
        "128", "--batch-tokens", "1024", "--adam-lr", "0.004", "--compile", "no", "--evaluations", "1", *own,
    )  # fmt: skip


def trial(seed: int, out: Path, starter: int, epochs: float, rollouts: int) -> dict[str, dict[str, float]]:
    """All of it with the random numbers of one seed: the figures of each model."""
    own = ["--compute", "fp32", "--seed", str(seed)]
    begin(out, seed, starter, own)
    sft(out, "base", "sft", epochs, 0.0, own)
    timed(
        out / "grpo-seconds.json",
        "grpo", "--model", f"{out}/sft/model", "--prompts", f"{out}/task/prompts.jsonl", "--reward", REWARD,
        "--out", f"{out}/grpo", "--rollouts", str(rollouts), "--max-tokens", str(MOST), "--adam-lr", "4e-4",
        "--clip-high", "0.28", "--decode-rows", "256", "--validation-share", "0.02", "--evaluations", "4",
        *own,
    )  # fmt: skip
    longer = out / "more-epochs.json"
    if not longer.exists():
        share = number_in(out / "grpo-seconds.json") / number_in(out / "sft-seconds.json")
        longer.write_text(json.dumps(epochs * share), encoding="utf-8")
    sft(out, "sft", "more", number_in(longer), 0.9, own)
    figures = {name: measured(out, name, seed) for name in NAMES}
    for name in NAMES:
        figures[name]["seconds"] = number_in(out / f"{name}-seconds.json")
    return figures


def mean_of(found: dict[int, dict[str, dict[str, float]]], name: str, figure: str) -> float:
    """A figure of a model, averaged over seeds."""
    return sum(figures[name][figure] for figures in found.values()) / len(found)


def draw(found: dict[int, dict[str, dict[str, float]]], path: Path) -> None:
    """pass@k of the three models: each seed thin, the mean thick."""
    with chart_style():
        figure = new_figure(260)
        axes = figure.add_subplot()
        for place, (name, words) in enumerate(NAMES.items()):
            colour = COLOURS[f"line-{place + 1}"]
            for figures in found.values():
                axes.plot(KS, [figures[name][f"pass@{k}"] for k in KS], color=colour, lw=0.7, alpha=0.5)
            means = [mean_of(found, name, f"pass@{k}") for k in KS]
            axes.plot(KS, means, color=colour, marker=MARKERS[place], markersize=4.5, lw=1.8, label=words)
        axes.set_xscale("log", base=2)
        axes.set_xticks(KS, [str(k) for k in KS])
        axes.set_xlabel("answers to a problem (k)")
        axes.set_ylabel("share with a right one (pass@k)")
        axes.set_ylim(0, 1)
        axes.legend(loc="upper left")
        figure.savefig(path, format="svg", facecolor="white")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rollouts", type=int, default=60)
    parser.add_argument("--starter", type=int, default=1500, help="solved problems that sft sees")
    parser.add_argument("--epochs", type=float, default=6.0, help="of sft before practice")
    parser.add_argument("--out", type=Path, default=None, help="where the runs go; by default they are lost")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        top = options.out or Path(temporary)
        found = {}
        for seed in options.seeds:
            out = top / str(seed)
            out.mkdir(parents=True, exist_ok=True)
            found[seed] = trial(seed, out, options.starter, options.epochs, options.rollouts)
        (top / "result.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        draw(found, top / "pass_at_k.svg")
    columns = ["greedy", *(f"pass@{k}" for k in KS), "seconds"]
    table = Table("seed", "model", *columns, title="share of new problems that are right")
    for seed, figures in found.items():
        for name, words in NAMES.items():
            table.add_row(str(seed), words, *(f"{figures[name][column]:.3g}" for column in columns))
    for name, words in NAMES.items():
        table.add_row("mean", words, *(f"{mean_of(found, name, column):.3g}" for column in columns))
    Console(width=140).print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
