"""Shortest paths out of random walks: `fledge pretrain`, then `fledge ppo`, on the task of trlX's example.

    python bench/random_walk.py [--seeds 1 2 3] [--rollouts 60] [--out DIR]

A graph has 21 nodes (letters a to u); from each to each other goes an edge with probability 0.1. The corpus
is 1,000 random walks from random nodes, which end at the goal a or after 10 nodes. Optimality of a walk is
(10 - its nodes) / (10 - the nodes of the shortest path), at the goal; 0 for a walk that does not get there in
10 nodes or takes an edge that does not exist. A model learns the walks, then by PPO to walk for optimality.
Graphs in which a node has no path to the goal of at most 9 nodes are drawn again: there optimality is 0 / 0.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from fledge import cli
from fledge.engine.engine import Engine
from fledge.engine.text import load_engine
from fledge.tokenizer.bpe import Tokenizer
from fledge.types import Rollout, SamplingParams

NODES, MOST, WALKS, EDGE_SHARE, GOAL = 21, 10, 1000, 0.1, 0
LETTERS = "abcdefghijklmnopqrstu"


@lru_cache(maxsize=4)
def graph(seed: int) -> tuple[list[list[int]], list[int]]:
    """The nodes that each node leads to, and the nodes of the shortest path to the goal from each."""
    rng = np.random.default_rng(seed)
    while True:
        edges = rng.random((NODES, NODES)) < EDGE_SHARE
        np.fill_diagonal(edges, False)
        if not edges.any(1).all():
            continue
        ahead = [np.flatnonzero(row).tolist() for row in edges]
        lengths = {GOAL: 1}
        for length in range(2, MOST):
            near = [n for n in range(NODES) if n not in lengths and any(m in lengths for m in ahead[n])]
            lengths |= dict.fromkeys(near, length)
        if len(lengths) == NODES:
            return ahead, [lengths[node] for node in range(NODES)]


def walks(seed: int) -> list[str]:
    """The corpus."""
    (ahead, _), rng = graph(seed), np.random.default_rng([seed, 1])
    found = []
    for _ in range(WALKS):
        walk = [int(rng.integers(1, NODES))]
        while len(walk) < MOST and walk[-1] != GOAL:
            walk.append(int(rng.choice(ahead[walk[-1]])))
        found.append("".join(LETTERS[node] for node in walk))
    return found


def optimality_of(walk: str, seed: int) -> float:
    """From 0 to 1; what comes behind the goal does not count."""
    ahead, lengths = graph(seed)
    nodes = [LETTERS.find(letter) for letter in walk]
    for place, node in enumerate(nodes[:MOST]):
        if node < 0 or (place and node not in ahead[nodes[place - 1]]):
            return 0.0
        if node == GOAL:
            return (MOST - (place + 1)) / (MOST - lengths[nodes[0]])
    return 0.0


def reward(rollouts: list[Rollout]) -> list[float]:
    """What `fledge ppo` maximises."""
    said = [str(rollout.messages[-1].get("content")) + rollout.completion for rollout in rollouts]
    return [optimality_of(walk, one.row["graph"]) for walk, one in zip(said, rollouts, strict=True)]


def measured(engine: Engine, tokenizer: Tokenizer, seed: int, samples: int, temperature: float) -> float:
    """Mean optimality of a model's walks from every node, each as often."""
    starts = LETTERS[1:]
    prompts = [[tokenizer.start_id, *tokenizer.encode(letter)] for letter in starts]
    params = SamplingParams(temperature, max_tokens=MOST, n=samples, seed=seed)
    made = engine.generate(prompts, params)
    asked = [letter for letter in starts for _ in range(samples)]
    scores = [
        optimality_of(letter + tokenizer.decode(one.ids), seed)
        for letter, one in zip(asked, made, strict=True)
    ]
    return sum(scores) / len(scores)


def command(*words: str) -> None:
    if cli.main(words):
        raise SystemExit(f"fledge {words[0]} failed")


def trial(seed: int, out: Path, rollouts: int) -> dict[str, float]:
    """All of it for one graph."""
    out.mkdir(parents=True, exist_ok=True)
    text = walks(seed)
    (out / "walks.txt").write_text("\n<|endoftext|>\n".join(text), encoding="utf-8")
    rows = [json.dumps({"prompt": letter, "graph": seed}) for letter in LETTERS[1:]]
    (out / "starts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    own = ["--compute", "fp32", "--seed", str(seed)]
    command("tokenizer", "--data", f"{out}/walks.txt", "--vocab-size", "265", "--out", f"{out}/tokenizer")
    command(
        "pretrain", "--data", f"{out}/walks.txt", "--tokenizer", f"{out}/tokenizer", "--out", f"{out}/base",
        "--params", "100k", "--hidden-size", "64", "--layers", "2", "--context", "64", "--row-tokens", "64",
        "--batch-tokens", "1024", "--tokens", "400k", "--isolate-documents", "--compile", "no",
        "--evaluations", "2", *own,
    )  # fmt: skip
    started = time.perf_counter()
    command(
        "ppo", "--model", f"{out}/base/model", "--prompts", f"{out}/starts.jsonl", "--plain",
        "--reward", f"{__file__}:reward", "--out", f"{out}/ppo", "--rollouts", str(rollouts),
        "--batch-prompts", "200", "--max-tokens", str(MOST), "--adam-lr", "1e-3", "--beta", "0.002",
        "--missing-eos-score", "0", "--value-weight", "0.5", "--validation-share", "0", *own,
    )  # fmt: skip
    figures = {"corpus": sum(optimality_of(walk, seed) for walk in text) / len(text)}
    for name in ("base", "ppo"):
        engine, tokenizer = load_engine(out / name / "model")
        figures[name] = measured(engine, tokenizer, seed, 100, 1.0)
        figures[f"{name} greedy"] = measured(engine, tokenizer, seed, 1, 0.0)
    summary = json.loads((out / "ppo" / "metrics.jsonl").read_text().splitlines()[-16])
    return {**figures, "kl": summary.get("kl", float("nan")), "seconds": time.perf_counter() - started}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rollouts", type=int, default=60)
    parser.add_argument("--out", type=Path, help="where the runs go; by default a temporary folder")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        found = {
            seed: trial(seed, (options.out or Path(temporary)) / str(seed), options.rollouts)
            for seed in options.seeds
        }
    table = Table("seed", *next(iter(found.values())), title="optimality")
    for seed, figures in found.items():
        table.add_row(str(seed), *(f"{value:.3f}" for value in figures.values()))
    Console().print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
