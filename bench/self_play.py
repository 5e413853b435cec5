"""Tic-tac-toe: imitation of a weak player, self-play from there, and self-play alone, each by seed.

    python bench/self_play.py [--seeds 0 1 2] [--rollouts 12] [--out DIR]

A model of 0.4 million parameters learns the notation and the rules, once, from games of random moves (`fledge
pretrain`). From there, for each seed, on one way it learns to imitate recorded games of a weak player
(`fledge sft`) and then plays itself (`fledge grpo --game tictactoe-cells`); on the other it plays itself at
once. Measured is the most probable move, on every line of play of four opponents, from both sides.
Writes OUT/result.json and OUT/report.html. With --out, the same command goes on with an interrupted run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fledge import cli
from fledge.files import read_json, read_jsonl, write_json
from fledge.model.checkpoint import load_model
from fledge.report.self_play import write_self_play_report
from fledge.tasks.lines import all_lines
from fledge.tasks.tictactoe import PLAYERS, Player, random_player

SHAPE = ("--params", "412k", "--hidden-size", "128", "--layers", "2", "--context", "64")
OWN = ("--compute", "fp32")


def command(*words: str) -> None:
    if cli.main(words):
        raise SystemExit(f"fledge {words[0]} failed")


def rules(out: Path) -> Path:
    """A model that knows boards and allowed moves, from random games, and no more than that."""
    if not (out / "rules").exists():
        games = ("--player", "random", "--games", "4000", "--notation", "cells")
        command("task", "tictactoe", "--out", f"{out}/rules", *games)
    if not (out / "tokenizer").exists():
        (out / "words.txt").write_text("user assistant\n" * 2000, encoding="utf-8")  # one token each
        command("tokenizer", "--data", f"{out}/words.txt", "--vocab-size", "276", "--out", f"{out}/tokenizer")
    command(
        "pretrain", "--data", f"chats={out}/rules/sft.jsonl", "--tokenizer", f"{out}/tokenizer", "--out",
        f"{out}/base", *SHAPE, "--row-tokens", "64", "--batch-tokens", "1024", "--tokens", "250k",
        "--warmup-steps", "10", "--compile", "no", "--evaluations", "4", *OWN,
    )  # fmt: skip
    return out / "base" / "model"


def imitation(base: Path, out: Path, seed: int, games: int) -> Path:
    """The same model after it has seen games of the weak player."""
    if not (out / "weak").exists():
        games_of = ("--games", str(games), "--seed", str(seed), "--notation", "cells")
        command("task", "tictactoe", "--out", f"{out}/weak", *games_of)
    command(
        "sft", "--model", f"{base}", "--data", f"{out}/weak/sft.jsonl", "--out", f"{out}/sft", "--epochs",
        "1", "--row-tokens", "64", "--batch-tokens", "1024", "--matrix-lr", "0.01", "--adam-lr", "0.002",
        "--compile", "no", "--evaluations", "1", "--seed", str(seed), *OWN,
    )  # fmt: skip
    return out / "sft" / "model"


def self_play(model: Path, out: Path, seed: int, rollouts: int, evaluations: int) -> dict[str, Any]:
    """Play, and what came of it: the curve by roll-outs, and the last figures."""
    command(
        "grpo", "--game", "tictactoe-cells", "--model", f"{model}", "--out", f"{out}", "--rollouts",
        str(rollouts), "--decay-share", "0.5", "--decode-rows", "512", "--evaluations", str(evaluations),
        "--seed", str(seed), *OWN,
    )  # fmt: skip
    rows = [row for _, row in read_jsonl(out / "metrics.jsonl") if "validation" in row]
    steps = max(1, rows[-1]["step"])
    curve = [
        {
            "rollouts": round(rollouts * row["step"] / steps),
            "lost": row["validation"],
            "p_won": row["validation_p_won:random"],
        }
        for row in rows
    ]
    last = {
        "lost": {name: row_of(rows[-1], "lost", name) for name in PLAYERS},
        "p_won": row_of(rows[-1], "p_won", "random"),
        "p_lost": row_of(rows[-1], "p_lost", "random"),
        "first": {name: row_of(rows[0], "lost", name) for name in PLAYERS},
        "first_p_won": row_of(rows[0], "p_won", "random"),
    }
    return {"curve": curve, "player": last, "seconds": read_json(out / "summary.json")["seconds"]}


def row_of(row: dict[str, Any], key: str, name: str) -> float:
    return float(row[f"validation_{key}:{name}"])


def won_against_random(player: Player) -> float:
    """The chance to win, mean of both sides, of a player that moves at random among what it may choose."""
    return sum(all_lines(player, random_player, side).p_won for side in "XO") / 2


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rollouts", type=int, default=12)
    parser.add_argument("--evaluations", type=int, default=4)
    parser.add_argument("--games", type=int, default=500, help="recorded games that are imitated")
    parser.add_argument("--rules", type=Path, help="a model that knows the rules, instead of training one")
    parser.add_argument("--out", type=Path, help="where the runs go; by default a temporary folder")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        base, trials = options.rules or rules(out), []
        for seed in options.seeds:
            here = out / str(seed)
            here.mkdir(exist_ok=True)
            lengths = (options.rollouts, options.evaluations)
            imitating = imitation(base, here, seed, options.games)
            played = {
                "imitation": self_play(imitating, here / "imitation", seed, *lengths),
                "alone": self_play(base, here / "alone", seed, *lengths),
            }
            trials.append({
                "seed": seed,
                **{start: one["curve"] for start, one in played.items()},
                "players": {start: one["player"] for start, one in played.items()},
                "seconds": {start: one["seconds"] for start, one in played.items()},
            })  # fmt: skip
            levels = {f"{name} player": won_against_random(PLAYERS[name]) for name in ("weak", "minimax")}
            result = {
                "parameters": load_model(base).num_parameters(),
                "opponents": list(PLAYERS),
                "levels": {"p_won": levels},
                "trials": trials,
            }
            write_json(out / "result.json", result)
            write_self_play_report(out, result)
    print_table(trials)


def print_table(trials: list[dict[str, Any]]) -> None:
    table = Table("seed", "start", *[f"lost: {name}" for name in PLAYERS], "won against random", "seconds")
    for trial in trials:
        for start in ("imitation", "alone"):
            one = trial["players"][start]
            lost = [f"{one['first'][name]:.0f} -> {one['lost'][name]:.0f}" for name in PLAYERS]
            won = f"{one['first_p_won']:.3f} -> {one['p_won']:.3f}"
            table.add_row(str(trial["seed"]), start, *lost, won, f"{trial['seconds'][start]:.0f}")
    Console(width=150).print(table)
    print(json.dumps({trial["seed"]: trial["seconds"] for trial in trials}))


if __name__ == "__main__":
    main(sys.argv[1:])
