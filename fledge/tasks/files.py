"""The files of a task: problems drawn from a seed, split for good into training and test; their manifest."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fledge.errors import UserError
from fledge.files import new_directory, sha256, write_json, write_text

P = TypeVar("P")
Rows = list[dict[str, Any]]

TEST_SHARE = 0.1
# Draws without a new problem after which there are taken to be no more.
MAX_MISSES = 20_000


@dataclass(frozen=True)
class Task:
    """What is written: `reward` is the spec that verifies it, `settings` what it was made with."""

    name: str
    reward: str
    settings: dict[str, Any]
    sft: Rows
    prompts: Rows
    test: Rows
    text: Rows


def is_test(problem: object) -> bool:
    """Whether a problem is for tests, told by a hash of its text: the same for every seed and setting, so
    that no training file of a task has a problem of any of its test files."""
    digest = hashlib.sha256(f"fledge task {problem}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < TEST_SHARE * 2**64


def draw(
    purpose: str,
    seed: int,
    count: int,
    make: Callable[[random.Random], P | None],
    key: Callable[[P], Hashable],
) -> list[P]:
    """`count` problems with different keys, drawn with the random numbers of (seed, purpose).

    `make` gives one, or None for a draw that is to be forgotten. Raises UserError if there are too few.
    """
    rng = random.Random(f"{seed} {purpose}")
    found: dict[Hashable, P] = {}
    misses = 0
    while len(found) < count:
        problem = make(rng)
        if problem is None or key(problem) in found:
            misses += 1
            if misses > MAX_MISSES:
                raise UserError(
                    f"only {len(found):,} different problems for {purpose} were found, not {count:,}; "
                    "ask for fewer, or make them larger"
                )
            continue
        misses = 0
        found[key(problem)] = problem
    return list(found.values())


def conversation(prompt: str, reply: str) -> dict[str, Any]:
    """A line of `sft.jsonl`."""
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]}


def write_task(out: Path, task: Task, overwrite: bool = False) -> dict[str, Any]:
    """Write a new directory, complete or not at all, and return its manifest (also in manifest.json).

    `sft.jsonl`: worked examples, {"messages": [...]}; `text.jsonl`: such as plain text, {"text": ...};
    `prompts.jsonl` and `test.jsonl`: {"prompt": ...} with what the reward compares with. The `fingerprint` is
    the SHA-256 of their contents; the same version, settings and seed give the same bytes.
    Raises UserError if the directory is there and is not to be replaced, or is none of ours.
    """
    if overwrite and out.exists() and not (out / "manifest.json").is_file():
        raise UserError(f"{out}: holds no task, so --overwrite leaves it; choose another --out")
    files = {"sft": task.sft, "text": task.text, "prompts": task.prompts, "test": task.test}
    with new_directory(out, overwrite) as directory:
        for name, rows in files.items():
            write_text(directory / f"{name}.jsonl", _lines(rows))
        manifest = {
            "task": task.name,
            "reward": task.reward,
            "settings": task.settings,
            "rows": {f"{name}.jsonl": len(rows) for name, rows in files.items()},
            "fingerprint": sha256(directory / f"{name}.jsonl" for name in files),
        }
        write_json(directory / "manifest.json", manifest)
    return manifest


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
