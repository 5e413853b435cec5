"""Over-optimisation: what more of a reward model's score is worth by the rule that it was to learn.

    python bench/overoptimization.py runs/demo [--seeds 0 1 2] [--rankings 400] [--slips 0.2] [--out DIR]

From a finished `fledge demo`: its assistant answers questions, a written rule ranks the answers (right above
"I don't know", that above wrong or invented), and a reward model learns from few rankings, in a share of
which two places are exchanged. Then the assistant is pushed towards high scores, by the best of n of its
answers and by PPO with hardly any price on its KL, and on names that were in no ranking both are measured by
the reward model's score and by the rule without slips (gold: 1, 0, -1) against the root of the KL (Gao et al.
2022). Every seed has rankings, slips, a reward model and roll-outs of its own. The judgements are simulated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fledge import cli
from fledge.data.facts import unit_hash
from fledge.engine.text import LocalChat, load_engine
from fledge.evals.best_of import best_of_curve
from fledge.evals.simulated_preferences import ask, gold_score, ranked, write_preferences
from fledge.files import read_json, read_jsonl, write_json, write_text
from fledge.report.overoptimization import write_overoptimization_report
from fledge.rewards.reward_model import load_judge
from fledge.tokenizer.bpe import Tokenizer
from fledge.train.prompts import read_split
from fledge.types import Message, Rollout

# Names of each kind that are asked about, once each; the share of them that is only measured on.
NAMES = {"sft": 450, "preference": 144, "invented": 450}
HELD, ANSWERS, MOST_TOKENS = 0.2, 4, 48
WARM = 1.3  # where answers are ranked: cooler ones to names of fine-tuning are nearly all right
NS = (1, 2, 4, 8, 16)


def gold(rollouts: list[Rollout]) -> list[float]:
    """The rule, for `fledge ppo --gold`."""
    return [gold_score(rollout.completion, rollout.row["answer"]) for rollout in rollouts]


def questions(demo: Path) -> list[dict[str, Any]]:
    """One question about each of some names of the demo's preferences; none of them is a test name."""
    rows: dict[str, dict[str, Any]] = {}
    for _, row in read_jsonl(demo / "corpus" / "preference.jsonl"):
        rows.setdefault(row["name"], row)
    chosen = []
    for split, count in NAMES.items():
        own = [row for row in rows.values() if row["split"] == split]
        chosen += sorted(own, key=lambda row: unit_hash("over", row["name"]))[:count]
    return chosen


def command(*words: object) -> None:
    if cli.main(list(map(str, words))):
        raise SystemExit(f"fledge {words[0]} failed")


def trial(demo: Path, seed: int, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All of it for one seed: the points of both curves. What is done is not done again."""
    out.mkdir(parents=True, exist_ok=True)
    assistant = demo / "sft" / "model"
    rows = {row["question"]: row for row in questions(demo)}
    prompts = out / "prompts.jsonl"
    lines = [{"prompt": question, "answer": row["answer"]} for question, row in rows.items()]
    write_text(prompts, "".join(json.dumps(line) + "\n" for line in lines))
    split = read_split([prompts], Tokenizer.load(assistant), False, 200, HELD)
    train, held = (
        [rows[str(one.prompt.messages[-1].get("content"))] for one in part]
        for part in (split.train, split.held)
    )
    chat = LocalChat(*load_engine(assistant, batch_size=128))
    learned = out / "rankings.jsonl"
    if not learned.exists():
        order = np.random.default_rng([seed, 1]).permutation(len(train))
        asked = [train[i] for i in order]
        told = ask(chat, [row["question"] for row in asked], ANSWERS, WARM, seed, MOST_TOKENS)
        rankings = ranked(asked, told, seed, options.slips, padded=0.0)[: options.rankings]
        write_preferences(learned, rankings)
    command(
        "reward", "--model", assistant, "--data", learned, "--out", out / "reward",
        "--new-layers", 2, "--batch-prompts", 8, "--epochs", 3, "--adam-lr", 3e-3, "--no-controls",
        "--validation-share", 0, "--seed", seed,
    )  # fmt: skip
    reward = out / "reward" / "model"
    command(
        "ppo", "--model", assistant, "--prompts", prompts, "--reward", reward, "--gold",
        f"{__file__}:gold", "--out", out / "ppo", "--rollouts", options.rollouts, "--batch-prompts", 64,
        "--max-tokens", MOST_TOKENS, "--beta", options.beta, "--epochs", 2, "--minibatches", 2,
        "--adam-lr", options.rate, "--decay-share", 0, "--validation-share", HELD,
        "--evaluation-prompts", len(held), "--evaluations", options.evaluations, "--seed", seed,
        "--decode-rows", 128, "--missing-eos-score", -5,
    )  # fmt: skip
    measured = [row for _, row in read_jsonl(out / "ppo" / "metrics.jsonl") if "validation_gold" in row]
    ppo = [
        {name: row[f"validation_{name}"] for name in ("kl", "score", "gold")}
        | {"kl": max(0.0, row["validation_kl"])}
        for row in measured
    ]
    figures = {"seed": seed, "rankings": sum(1 for _ in read_jsonl(learned)), "held": len(held)}
    return {**figures, "best_of_n": best_of_n(chat, reward, held, seed + 1), "ppo": ppo}


def best_of_n(chat: LocalChat, reward: Path, rows: list[dict[str, Any]], seed: int) -> list[dict[str, float]]:
    """The points of its curve."""
    answers = ask(chat, [row["question"] for row in rows], max(NS), 1.0, seed, MOST_TOKENS)
    said = [
        [Message(role="user", content=row["question"]), Message(role="assistant", content=text)]
        for row, own in zip(rows, answers, strict=True)
        for text in own
    ]
    rewards = np.reshape(load_judge(reward).score(said), (len(rows), max(NS))).tolist()
    golds = [
        [gold_score(text, row["answer"]) for text in own] for row, own in zip(rows, answers, strict=True)
    ]
    return [
        {"kl": point.kl, "score": point.reward, "gold": point.gold, "n": point.n}
        for point in best_of_curve(rewards, golds, NS)
    ]


def peak(points: Sequence[dict[str, float]]) -> dict[str, float]:
    """Where gold is highest."""
    return max(points, key=lambda point: point["gold"])


def table(found: Sequence[dict[str, Any]]) -> Table:
    """Beginning, peak and end of each curve."""
    shown = Table("seed", "method", "gold at 0", "gold at its peak", "KL there", "gold at the end",
                  "score: 0, peak, end", "KL at the end", title="gold against KL (nats)")  # fmt: skip
    for trial_ in found:
        for method in ("best_of_n", "ppo"):
            points = trial_[method]
            top, last = peak(points), points[-1]
            scores = ", ".join(f"{point['score']:.2f}" for point in (points[0], top, last))
            shown.add_row(
                str(trial_["seed"]), method, f"{points[0]['gold']:.3f}", f"{top['gold']:.3f}",
                f"{top['kl']:.2f}", f"{last['gold']:.3f}", scores, f"{last['kl']:.2f}",
            )  # fmt: skip
    return shown


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("demo", type=Path, help="directory of a finished `fledge demo`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rankings", type=int, default=400)
    parser.add_argument("--slips", type=float, default=0.2)
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--evaluations", type=int, default=12)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--beta", type=float, default=0.0)
    parser.add_argument("--out", type=Path, default=Path("runs/overoptimization"))
    options = parser.parse_args(argv)
    found = []
    kept = options.out / "settings.json"
    settings = {name: value for name, value in vars(options).items() if name not in ("seeds", "out")}
    settings["demo"] = str(options.demo)
    if kept.exists() and read_json(kept) != settings:
        raise SystemExit(f"{options.out} has results of other settings; choose another --out")
    write_json(kept, settings)
    for seed in options.seeds:
        saved = options.out / f"seed_{seed}" / "curves.json"
        if not saved.exists():
            write_json(saved, trial(options.demo, seed, saved.parent, options))
        found.append(read_json(saved))
    Console().print(table(found))
    print(write_overoptimization_report(options.out, found, settings))


if __name__ == "__main__":
    main(sys.argv[1:])
