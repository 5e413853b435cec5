"""Would particle swarms find the most probable answer? Two of them beside exact search, at equal budget.

    python bench/search.py MODEL QUESTIONS.jsonl --rows ROWS.jsonl
    python bench/swarm.py MODEL ROWS.jsonl [--limit 40] [--budgets 0 1000 10000]

ROWS are what `search.py` has measured. The budget is counted in tokens that the model reads behind the
prompt; 0 stands for as many as the exact search of that question used, its greedy and beam seeds included.

- `swarm`: particle swarm optimisation as Kennedy & Eberhart (1995) have it, with Clerc & Kennedy's (2002)
  constants. A particle is a point in the embeddings of all places of a text, read as the nearest tokens up
  to the first end; it starts at a sample, and is drawn to its own best text and to that of all.
- `blind swarm`: the same from random tokens.
- `prefixes`: the same idea on texts themselves. A particle takes its own best text or that of all, cuts it at
  a random place, and lets the model write on from there.
- `sampling`: the best of independent samples.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fledge.engine.engine import Engine
from fledge.engine.text import load_engine
from fledge.model.transformer import CausalLM
from fledge.types import SamplingParams

PARTICLES = 16
INERTIA, PULL = 0.7298, 1.49618
# The share of particles that go on from the best text of all, not from their own.
SOCIAL = 0.5


class Text(NamedTuple):
    """Ids without the end, their log-probabilities, and the end's: -inf for a text that does not end."""

    ids: list[int]
    logps: list[float]
    end: float = -math.inf

    @property
    def logp(self) -> float:
        return math.fsum(self.logps) + self.end


NOTHING = Text([], [])


class Task:
    """One question: texts (ids without the end), what they cost so far, and the best one."""

    def __init__(self, engine: Engine, row: dict[str, Any], budget: int, longest: int, seed: int) -> None:
        self.engine, self.prompt, self.longest = engine, row["prompt"], longest
        self.end_ids = sorted(set(row["end_ids"]))
        self.left, self.calls, self.seed = budget, 0, seed
        self.best: tuple[float, list[int]] = (-math.inf, [])

    def note(self, logp: float, ids: list[int], cost: int) -> None:
        """A text that was paid for; what comes behind the budget's end does not count."""
        if self.left > 0 and logp > self.best[0]:
            self.best = (logp, ids)
        self.left -= cost

    def write_on(self, starts: list[Text]) -> list[Text]:
        """Each start continued by a sample."""
        self.calls += 1
        params = SamplingParams(
            max_tokens=self.longest, stop_ids=tuple(self.end_ids), seed=1_000_003 * self.seed + self.calls
        )
        made = self.engine.generate([[*self.prompt, *start.ids] for start in starts], params)
        found = []
        for start, completion in zip(starts, made, strict=True):
            end = completion.stop_token
            text = Text([*start.ids, *completion.ids], [*start.logps, *completion.logps])
            is_whole = end is not None and len(text.ids) < self.longest
            found.append(text._replace(end=end.logp if end is not None and is_whole else -math.inf))
        return found

    def score(self, texts: list[list[int]]) -> list[float]:
        """The log-probability of whole texts, with the most probable end."""
        ends = [[*self.prompt, *ids, end] for ids in texts for end in self.end_ids]
        logps = [math.fsum(logps[len(self.prompt) - 1 :]) for logps in self.engine.score(ends)]
        count = len(self.end_ids)
        return [max(logps[i : i + count]) for i in range(0, len(logps), count)]


def sampling(task: Task) -> None:
    while task.left > 0:
        for text in task.write_on([NOTHING] * PARTICLES):
            task.note(text.logp, text.ids, len(text.ids) + 1)


def prefixes(task: Task) -> None:
    draw = random.Random(task.seed)
    own = task.write_on([NOTHING] * PARTICLES)
    for text in own:
        task.note(text.logp, text.ids, len(text.ids) + 1)
    while task.left > 0:
        best = max(own, key=lambda text: text.logp)
        starts = []
        for text in own:
            kept = best if draw.random() < SOCIAL else text
            cut = draw.randint(0, len(kept.ids))
            starts.append(Text(kept.ids[:cut], kept.logps[:cut]))
        for i, (start, text) in enumerate(zip(starts, task.write_on(starts), strict=True)):
            own[i] = max(own[i], text, key=lambda text: text.logp)
            task.note(text.logp, text.ids, len(text.ids) - len(start.ids) + 1)


def swarm(task: Task, blind: bool = False) -> None:
    model = task.engine.model
    assert isinstance(model, CausalLM)
    embedding_VC = model.model.embed_tokens.weight.detach()
    generator = torch.Generator().manual_seed(task.seed)
    end_id, L = task.end_ids[0], task.longest - 1
    if blind:
        shape = (PARTICLES, L)
        tokens_PL = torch.randint(len(embedding_VC), shape, generator=generator).tolist()
        texts = [until_end(ids, task.end_ids) for ids in tokens_PL]
        samples = list(zip(task.score(texts), texts, strict=True))
    else:
        samples = [(text.logp, text.ids[:L]) for text in task.write_on([NOTHING] * PARTICLES)]
    for logp, ids in samples:
        task.note(logp, ids, len(ids) + 1)
    x_PLC = torch.stack([embedding_VC[[*ids, *[end_id] * (L - len(ids))]] for _, ids in samples])
    v_PLC = torch.zeros_like(x_PLC)
    own_PLC, own_P = x_PLC.clone(), torch.tensor([logp for logp, _ in samples])
    while task.left > 0:
        best_LC = own_PLC[int(own_P.argmax())]
        pulls = [torch.rand(x_PLC.shape, generator=generator) * PULL for _ in range(2)]
        v_PLC = INERTIA * v_PLC + pulls[0] * (own_PLC - x_PLC) + pulls[1] * (best_LC - x_PLC)
        x_PLC = x_PLC + v_PLC
        nearest_PL = torch.cdist(x_PLC.flatten(0, 1), embedding_VC).argmin(-1).view(PARTICLES, L)
        texts = [until_end(ids, task.end_ids) for ids in nearest_PL.tolist()]
        for i, (logp, ids) in enumerate(zip(task.score(texts), texts, strict=True)):
            task.note(logp, ids, len(ids) + 1)
            if logp > own_P[i]:
                own_P[i], own_PLC[i] = logp, x_PLC[i]


def until_end(ids: list[int], end_ids: list[int]) -> list[int]:
    return next((ids[:i] for i, token_id in enumerate(ids) if token_id in end_ids), ids)


SEARCHES: dict[str, Callable[[Task], None]] = {
    "sampling": sampling,
    "prefixes": prefixes,
    "swarm": swarm,
    "blind swarm": partial(swarm, blind=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--searches", nargs="+", default=list(SEARCHES), choices=list(SEARCHES))
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--budgets", type=int, nargs="+", default=[0, 1000, 10_000])
    parser.add_argument("--max-tokens", type=int, default=64, help="as of search.py")
    options = parser.parse_args()
    engine, _ = load_engine(options.model)
    rows = [json.loads(line) for line in options.rows.read_text().splitlines()]
    rows = [row for row in rows if "exact" in row][: options.limit]
    table = Table("budget", "", "finds exact's", "better than greedy", "worse", "nats below exact", "seconds")
    for budget in options.budgets:
        for name in options.searches:
            search = SEARCHES[name]
            started, below, over_greedy, under_greedy = time.perf_counter(), list[float](), 0, 0
            for number, row in enumerate(rows):
                used = row["expansions"] + len(row["greedy"]["ids"]) + 4 * len(row["beam 4"]["ids"])
                task = Task(engine, row, budget or used, options.max_tokens, number)
                search(task)
                below.append(row["exact"]["logp"] - task.best[0])
                greedy = -math.inf if row["greedy"]["logp"] is None else row["greedy"]["logp"]
                over_greedy += task.best[0] > greedy + 1e-3
                under_greedy += task.best[0] < greedy - 1e-3
            low, middle, high = np.quantile(below, [0.1, 0.5, 0.9], method="nearest")
            cells = (
                f"{budget:,}" if budget else "as exact",
                name,
                f"{np.mean(np.array(below) < 1e-3):.0%}",
                f"{over_greedy / len(rows):.0%}",
                f"{under_greedy / len(rows):.0%}",
                f"{low:.2f} / {middle:.2f} / {high:.2f}",
                f"{time.perf_counter() - started:.0f}",
            )
            table.add_row(*cells)
            print(*cells, sep="; ", file=sys.stderr, flush=True)
    table.title = f"{len(rows)} questions"
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
