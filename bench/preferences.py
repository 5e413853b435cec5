"""Reward models on people's preferences, by cross-validation, beside rules that know only length or words.

    python bench/preferences.py --model runs/base/model --data harmless-base-test.jsonl.gz --out runs/hh
    python bench/preferences.py --model runs/base/model --data testset-v1.json.gz --out runs/pandalm

`--data`: preferences as `fledge reward` reads them, or PandaLM's test set (a vote of each of three annotators
becomes a ranking). Folds are split by prompt. Writes OUT/result.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from fledge.data.preferences import Ranking, parse_preference, prompt_key, ranking_row, read_rankings
from fledge.evals.facts import Share

WORDS = 5000


def pandalm(path: Path) -> list[Ranking]:
    """Each annotator's vote: 1 or 2 for a response, 0 for a tie."""
    rankings = []
    for item in json.loads(gzip.decompress(path.read_bytes())):
        prompt = "\n\n".join(filter(None, (item["instruction"], item["input"])))
        for annotator in ("annotator1", "annotator2", "annotator3"):
            row = {
                "prompt": prompt,
                "completions": [str(item["response1"]), str(item["response2"])],  # one is `true`
                "ranks": {1: [1, 2], 2: [2, 1], 0: [1, 1]}[item[annotator]],
                "labeler": annotator,
            }
            found = parse_preference(row, f"{path}: item {item['idx']}")
            assert isinstance(found, Ranking)
            rankings.append(found)
    return rankings


def text(turns: list[Any]) -> str:
    return "\n".join(str(turn["content"]) for turn in turns)


def sides(rankings: list[Ranking]) -> list[tuple[str, str]]:
    """(better, worse) of all rankings of two that are no ties."""
    return [
        (text(r.completions[a]), text(r.completions[1 - a]))
        for r in rankings
        if r.ranks[0] != r.ranks[1]
        for a in [int(r.ranks[0] > r.ranks[1])]
    ]


def logistic(train: np.ndarray, held: np.ndarray, decay: float) -> Share:
    """Bradley-Terry on differences of features; the share of held-out pairs won."""
    weights = np.zeros(train.shape[1])
    step = 4.0 / (np.square(train).sum(1).max() + 1e-9)
    velocity = np.zeros_like(weights)
    for _ in range(500):  # Nesterov's accelerated gradient
        ahead = weights + 0.9 * velocity
        won = 1 / (1 + np.exp(-np.clip(train @ ahead, -30, 30)))
        gradient = train.T @ (1 - won) / len(train) - decay * ahead
        velocity = 0.9 * velocity + step * gradient
        weights = weights + velocity
    gaps = held @ weights
    return Share(int((gaps > 0).sum()), len(gaps))


def length_features(pairs: list[tuple[str, str]]) -> np.ndarray:
    return np.array([[math.log1p(len(a)) - math.log1p(len(b))] for a, b in pairs])


def word_features(pairs: list[tuple[str, str]], vocabulary: dict[str, int]) -> np.ndarray:
    """Differences of square roots of word counts."""
    rows = np.zeros((len(pairs), len(vocabulary)), dtype=np.float32)
    for row, pair in zip(rows, pairs, strict=True):
        for sign, side in zip((1.0, -1.0), pair, strict=True):
            for word, count in Counter(side.lower().split()).items():
                if word in vocabulary:
                    row[vocabulary[word]] += sign * math.sqrt(count)
    return rows


def baselines(train: list[Ranking], held: list[Ranking]) -> dict[str, Share]:
    own, other = sides(train), sides(held)
    counts = Counter(word for pair in own for side in pair for word in set(side.lower().split()))
    vocabulary = {word: i for i, (word, _) in enumerate(counts.most_common(WORDS))}
    return {
        "length": logistic(length_features(own), length_features(other), 0.0),
        "words": logistic(word_features(own, vocabulary), word_features(other, vocabulary), 1e-3),
    }


def reward(train: list[Ranking], held: list[Ranking], out: Path, args: argparse.Namespace) -> Share:
    """`fledge reward` on the one part, `fledge score` on the other."""
    out.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("held", held)):
        lines = [json.dumps(ranking_row(r), ensure_ascii=False) + "\n" for r in part]
        (out / f"{name}.jsonl").write_text("".join(lines))
    fledge = [sys.executable, "-m", "fledge"]
    run = ["--out", str(out / "run"), "--validation-share", "0", "--no-controls", *args.flags]
    subprocess.run(
        [*fledge, "reward", "--model", args.model, "--data", str(out / "train.jsonl"), *run], check=True
    )
    scored = [
        "--data",
        str(out / "held.jsonl"),
        "--out",
        str(out / "scored.jsonl"),
        "--overwrite",
        "--skip-long",
    ]
    subprocess.run([*fledge, "score", "--model", str(out / "run" / "model"), *scored], check=True)
    rows = [json.loads(line) for line in (out / "scored.jsonl").read_text().splitlines()]
    right = [
        (row["rewards"][1] - row["rewards"][0]) * (row["ranks"][0] - row["ranks"][1]) > 0
        for row in rows
        if row["ranks"][0] != row["ranks"][1]
    ]
    return Share(sum(right), len(right))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--only-fold", type=int)
    parser.add_argument("--max-characters", type=int, default=10**9, help="leave longer rows out")
    parser.add_argument("--baselines-only", action="store_true")
    parser.add_argument("flags", nargs="*", help="after --: for fledge reward")
    args = parser.parse_args()
    rankings = pandalm(args.data) if args.data.name.split(".")[-2] == "json" else read_rankings(args.data)
    rankings = [
        r
        for r in rankings
        if len(text(r.prompt)) + max(len(text(turns)) for turns in r.completions) <= args.max_characters
    ]
    keys = sorted({prompt_key(r) for r in rankings})
    order = np.random.default_rng(0).permutation(len(keys))
    fold_of = {keys[i]: place % args.folds for place, i in enumerate(order)}
    totals: dict[str, list[Share]] = {}
    for fold in range(args.folds):
        if args.only_fold not in (None, fold):
            continue
        held = [r for r in rankings if fold_of[prompt_key(r)] == fold]
        train = [r for r in rankings if fold_of[prompt_key(r)] != fold]
        found = baselines(train, held)
        if not args.baselines_only:
            found["reward model"] = reward(train, held, args.out / f"fold{fold}", args)
        for name, share in found.items():
            totals.setdefault(name, []).append(share)
    result = {
        name: Share(sum(s.successes for s in shares), sum(s.n for s in shares)).as_dict()
        for name, shares in totals.items()
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
