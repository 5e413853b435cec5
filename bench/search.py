"""What searching for the most probable answer finds: greedy, beams, sampling and exact search compared.

    python bench/search.py MODEL QUESTIONS.jsonl [--limit 60] [--max-expansions 10000] [--rows ROWS.jsonl]

QUESTIONS has {"question": ..., "answer": ...} rows, as a demo's corpus/eval_test.jsonl; every question is a
user's turn, or with `--plain` a text to continue. All figures are of raw log-probabilities with the end among
the tokens. What is measured of a question is a line of ROWS; those that are there already are not measured
again, so that a long run can be ended and gone on with. `--check` of the certified questions, easy and hard
ones, are enumerated by a search that shares no code: level by level, with the model's own forward pass and no
cache, every prefix that is more probable than the answer.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fledge.engine.beam import Beams, beam_search
from fledge.engine.engine import Engine
from fledge.engine.exact import Budget, exact_search
from fledge.engine.text import LocalChat, encode_prompt, load_engine
from fledge.errors import UserError
from fledge.evals.facts import token_f1
from fledge.model.checkpoint import load_model
from fledge.model.transformer import CausalLM
from fledge.tokenizer.bpe import Tokenizer
from fledge.types import Completion, SamplingParams

SAMPLES_A_CALL = 32
SEARCHES = ("greedy", "beam 4", "beam 16", "exact", "sampling")


def logp_of(completion: Completion) -> float | None:
    """None for an answer that was cut off."""
    end = completion.stop_token
    return None if end is None else math.fsum(completion.logps) + end.logp


def found(tokenizer: Tokenizer, completion: Completion, gold: str) -> dict[str, Any]:
    text = tokenizer.decode(completion.ids)
    f1 = token_f1(text, gold)
    return {"ids": completion.ids, "logp": logp_of(completion), "text": text, "f1": f1}


def sample_best(engine: Engine, prompt: list[int], params: SamplingParams, budget: int) -> Completion | None:
    """The most probable whole one of as many samples as make `budget` tokens."""
    whole: list[tuple[float, Completion]] = []
    tokens, call = 0, 0
    while tokens < budget:
        call += 1
        for completion in engine.generate([prompt], replace(params, n=SAMPLES_A_CALL, seed=call)):
            tokens += len(completion.ids) + 1
            logp = logp_of(completion)
            if logp is not None:
                whole.append((logp, completion))
            if tokens >= budget:
                break
    return max(whole, key=lambda pair: pair[0])[1] if whole else None


def measure(
    engine: Engine, tokenizer: Tokenizer, question: str, gold: str, options: argparse.Namespace
) -> dict[str, Any]:
    params = SamplingParams(min_tokens=options.min_tokens, max_tokens=options.max_tokens)
    if options.plain:
        prompt = encode_prompt(tokenizer, question)
    else:
        chat = LocalChat(engine, tokenizer)
        prompt = chat.prompt([{"role": "user", "content": question}])
        params = chat.until_end_of_turn(params)
    (greedy,) = engine.generate([prompt], replace(params, temperature=0.0))
    row: dict[str, Any] = {
        "question": question,
        "prompt": prompt,
        "end_ids": [*engine.eos_ids, *params.stop_ids],
    }
    row["greedy"] = found(tokenizer, greedy, gold)
    for width in (4, 16):
        ((best, *_),) = beam_search(engine, [prompt], params, Beams(width, 0.0, "never"))
        row[f"beam {width}"] = found(tokenizer, best.completion, gold)
    row["empty"] = max(engine.score([[*prompt, end]])[0][-1] for end in row["end_ids"])
    trace: list[tuple[int, float, float]] = []
    try:
        result = exact_search(
            engine, prompt, params, Budget(options.max_expansions), progress=lambda *step: trace.append(step)
        )
    except UserError as error:
        return {**row, "error": str(error)}
    row["exact"] = found(tokenizer, result.completion, gold)
    row |= {"expansions": result.expansions, "gap": result.gap, "seconds": result.seconds}
    row["found_by"] = result.found_by
    row["gaps"] = {str(at): gap_after(trace, at) for at in options.at}
    spent = result.expansions + len(greedy.ids) + 4 * len(row["beam 4"]["ids"])
    sampled = sample_best(engine, prompt, params, spent)
    row["sampling"] = None if sampled is None else found(tokenizer, sampled, gold)
    return row


def gap_after(trace: list[tuple[int, float, float]], expansions: int) -> float:
    """The gap of the last pass that had expanded no more."""
    _, best, bound = [step for step in trace if step[0] <= expansions][-1]
    return bound - best


@torch.no_grad()
def enumerate_better(model: CausalLM, row: dict[str, Any], longest: int) -> tuple[list[int], float]:
    """The best of all answers at least as probable as the one that was found (up to rounding)."""
    least, prompt, end_ids = row["exact"]["logp"] - 1e-3, row["prompt"], row["end_ids"]
    level: list[tuple[list[int], float]] = [([], 0.0)]
    best: tuple[list[int], float] = ([], -math.inf)
    for length in range(1, longest + 1):
        following = []
        for start in range(0, len(level), 16):
            some = level[start : start + 16]
            ids_BT = torch.tensor([[*prompt, *ids] for ids, _ in some])
            logps_BV = model(ids_BT)[:, -1].double().log_softmax(-1)
            for (ids, total), logps_V in zip(some, logps_BV, strict=True):
                for token_id in (logps_V > least - total).nonzero()[:, 0].tolist():
                    logp = total + float(logps_V[token_id])
                    if token_id not in end_ids:
                        following.append(([*ids, token_id], logp))
                    elif logp > best[1]:
                        best = (ids, logp)
        level = following if length < longest else []
    return best


def check(directory: Path, rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    certified = sorted((row for row in rows if row["gap"] == 0), key=lambda row: row["expansions"])
    sample = certified[:: -(-len(certified) // options.check) or 1]
    model = load_model(directory).eval()
    same = sum(enumerate_better(model, row, options.max_tokens)[0] == row["exact"]["ids"] for row in sample)
    largest = max((row["expansions"] for row in sample), default=0)
    return f"{same} of {len(sample)} the same answer (up to {largest} expansions)"


def share(values: list[bool]) -> str:
    return f"{sum(values)} of {len(values)} ({np.mean(values):.0%})" if values else "none"


def quantiles(values: list[float]) -> str:
    if not values:
        return ""
    low, middle, high = np.quantile(values, [0.1, 0.5, 0.9], method="nearest")
    return f"{low:,.3g} / {middle:,.3g} / {high:,.3g}"


def show(rows: list[dict[str, Any]], failed: int, checked: str, options: argparse.Namespace) -> None:
    console = Console(width=110)
    certified = [row for row in rows if row["gap"] == 0]
    table = Table("", *SEARCHES, title=f"{len(rows)} questions; same answer", title_justify="left")
    for one in SEARCHES:
        same = [
            np.mean([bool(r[one] and r[other] and r[one]["ids"] == r[other]["ids"]) for r in rows])
            for other in SEARCHES
        ]
        table.add_row(one, *(f"{value:.0%}" for value in same))
    for name in ("f1", "logp"):
        values = [[r[s][name] for r in rows if r[s] and r[s][name] is not None] for s in SEARCHES]
        table.add_row(
            "mean F1" if name == "f1" else "mean logp of whole ones",
            *(f"{np.mean(v):.3f}" if v else "" for v in values),
        )
    answers = [[r[s] for r in rows if r[s]] for s in SEARCHES]
    table.add_row("empty", *(share([not answer["ids"] for answer in some]) for some in answers))
    lengths = [np.mean([len(answer["ids"]) for answer in some]) for some in answers]
    table.add_row("mean tokens", *(f"{length:.1f}" for length in lengths))
    console.print(table)
    better = [r["exact"]["logp"] > (r["greedy"]["logp"] or -math.inf) + 1e-4 for r in rows]
    reached = [bool(r["sampling"]) and r["sampling"]["logp"] > r["exact"]["logp"] - 1e-4 for r in rows]
    figures = Table("", "", title="exact search", title_justify="left", show_header=False)
    figures.add_row("no whole answer found", str(failed))
    figures.add_row("certified", share([r["gap"] == 0 for r in rows]))
    for at in options.at:
        gaps = [r["gaps"][str(at)] for r in rows]
        left = [gap for gap in gaps if gap > 0]
        text = share([gap == 0 for gap in gaps]) + (f"; gap of the others {quantiles(left)}" if left else "")
        figures.add_row(f"certified within {at:,} expansions", text)
    figures.add_row("more probable than greedy, or that is cut off", share(better))
    figures.add_row(
        "found first by",
        str({n: [r["found_by"] for r in rows].count(n) for n in ("greedy", "beam", "exact")}),
    )
    figures.add_row(
        "p of the empty answer (10%, median, 90%)", quantiles([math.exp(r["empty"]) for r in rows])
    )
    figures.add_row("p of the answer", quantiles([math.exp(r["exact"]["logp"]) for r in rows]))
    figures.add_row("expansions, certified ones", quantiles([r["expansions"] for r in certified]))
    figures.add_row(
        "expansions * p, certified ones",
        quantiles([r["expansions"] * math.exp(r["exact"]["logp"]) for r in certified]),
    )
    figures.add_row("seconds", quantiles([r["seconds"] for r in rows]))
    figures.add_row("sampling at equal budget finds it", share(reached))
    figures.add_row(
        "  where it is certified", share([ok for ok, r in zip(reached, rows, strict=True) if r["gap"] == 0])
    )
    figures.add_row("enumerated independently", checked)
    console.print(figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--plain", action="store_true", help="continue the question, without a chat template")
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--max-expansions", type=int, default=10_000)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--min-tokens", type=int, default=0, help="of an answer (they are not enumerated)")
    parser.add_argument("--at", type=int, nargs="+", default=[10, 30, 100, 1000, 10_000])
    parser.add_argument("--check", type=int, default=10, help="questions that are enumerated, too")
    parser.add_argument("--rows", type=Path, help="JSONL of what is measured")
    parser.add_argument("--minutes", type=float, default=math.inf, help="measure no more after this")
    options = parser.parse_args()
    started = time.monotonic()
    engine, tokenizer = load_engine(options.model)
    questions = [json.loads(line) for line in options.questions.read_text().splitlines()][: options.limit]
    done: dict[str, dict[str, Any]] = {}
    if options.rows is not None and options.rows.exists():
        done = {row["question"]: row for row in map(json.loads, options.rows.read_text().splitlines())}
    for item in questions:
        if item["question"] in done or time.monotonic() - started > 60 * options.minutes:
            continue
        row = measure(engine, tokenizer, item["question"], item["answer"], options)
        done[item["question"]] = row
        if options.rows is not None:
            with options.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
    rows = [done[item["question"]] for item in questions if item["question"] in done]
    whole = [row for row in rows if "error" not in row]
    checked = check(options.model, whole, options) if options.check and not options.min_tokens else "none"
    show(whole, len(rows) - len(whole), checked, options)


if __name__ == "__main__":
    main()
