"""The alignment of `fledge demo`: preferences by a written rule, best-of-n by the reward model that learns
them, and what the aligned model does otherwise than the assistant it comes from."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import NormalDist
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fledge.data.facts import unit_hash
from fledge.device import keep_freed_memory, pick_compute_dtype, pick_device
from fledge.engine.text import LocalChat, load_engine
from fledge.errors import UserError
from fledge.evals.best_of import best_of_curve, best_of_means, peak_of
from fledge.evals.bootstrap import Mean, bootstrap
from fledge.evals.simulated_preferences import ask, gold_score, ranked, write_preferences
from fledge.files import new_directory, read_jsonl, write_json, write_text
from fledge.rewards.reward_model import load_judge
from fledge.types import Message, SamplingParams

# Preferences: answers to each question, warm enough to differ; the share of rankings with a slip, of prompts
# with a padded answer, and of names that are kept for the examination of the reward model.
ANSWERS, WARM = 4, 1.3
SLIPS, PADDED, HELD_OUT = 0.1, 0.5, 0.12
# Of the questions about names of fine-tuning and invented ones so many are asked: time is short.
ASKED_SHARES = {"sft": 0.5, "preference": 1.0, "invented": 0.6}
# A policy learns from answers as it gives them, at temperature 1, not padded: of warm ones it learns to avoid
# beginnings that wrong and right answers share, of padded ones to break off.
OWN_SHARES = {"sft": 0.4, "preference": 0.75, "invented": 1.0}
# Best-of-n: questions of each set, and how many of the answers (at temperature 1) are chosen from.
BEST_OF_SETS = ("eval_test", "eval_invented")
BEST_OF_QUESTIONS, BEST_OF = 100, (1, 2, 4, 8, 16)
# Answers to each of the same questions from which the KL divergence is estimated.
KL_ANSWERS = 4
MAX_TOKENS = 48
RIGHT_F1 = 0.8

Row = Mapping[str, Any]
T = TypeVar("T")


def is_held_out(name: str) -> bool:
    """Whether preferences about a name are kept for the examination."""
    return unit_hash("held out", name) < HELD_OUT


def make_preferences(model: Path, questions: Path, out: Path, seed: int, limit: int | None = None) -> None:
    """Sample answers of a model to questions ({"name", "question", "answer", "split"}), rank them by the rule
    and write a new directory: train.jsonl and held_out.jsonl of warm answers, for a reward model; own.jsonl
    of answers at temperature 1, for a policy; prompts.jsonl with the questions of the former, summary.json.
    `limit`: questions of each split. Raises UserError if all answers are equally good.
    """
    started = time.perf_counter()
    rows = _limited([row for _, row in read_jsonl(questions) if _is_asked(row)], limit)
    chat = _chat(model)
    answers = ask(chat, [row["question"] for row in rows], ANSWERS, WARM, seed, MAX_TOKENS)
    summary: dict[str, Any] = {"questions": len(rows), "answers": ANSWERS, "temperature": WARM}
    summary |= {"slips": SLIPS, "padded": PADDED, "labeler": "a written rule", "simulated": True}
    with new_directory(out) as directory:
        for name, held, slips in (("train", False, SLIPS), ("held_out", True, 0.0)):
            part = [(r, own) for r, own in zip(rows, answers, strict=True) if is_held_out(r["name"]) is held]
            rankings = ranked([r for r, _ in part], [own for _, own in part], seed, slips, PADDED)
            if not held and not rankings:
                raise UserError(
                    "all answers of the assistant to a question are equally good, so there is nothing to "
                    "prefer; train it for longer, or stop there with --align none"
                )
            kinds = write_preferences(directory / f"{name}.jsonl", rankings)
            summary[name] = {"questions": len(part), "rankings": len(rankings), "kinds": kinds}
            if not held:
                lines = (json.dumps({"prompt": r["question"]}, ensure_ascii=False) + "\n" for r, _ in part)
                write_text(directory / "prompts.jsonl", "".join(lines))
        usual = [r for r in rows if not is_held_out(r["name"]) and _is_usual(r)]
        answers = ask(chat, [row["question"] for row in usual], ANSWERS, 1.0, seed, MAX_TOKENS)
        rankings = ranked(usual, answers, seed, SLIPS, padded=0.0)
        summary["own"] = {"questions": len(usual), "rankings": len(rankings)}
        summary["own"]["kinds"] = write_preferences(directory / "own.jsonl", rankings)
        write_json(directory / "summary.json", {**summary, "seconds": _since(started)})


def _is_asked(row: Row) -> bool:
    """Whether the assistant is asked a question at all."""
    return unit_hash("asked", row["question"]) < ASKED_SHARES[row["split"]]


def _is_usual(row: Row) -> bool:
    """Whether the policy itself learns from a question. Names that it was never asked about teach it what it
    knows, invented ones what it does not: the shares decide how readily it refuses."""
    return unit_hash("own", row["question"]) < OWN_SHARES[row["split"]]


def _limited(rows: list[dict[str, Any]], limit: int | None) -> list[dict[str, Any]]:
    """At most so many questions of each split, an eighth of them held out: the first names alone may hold
    none that is."""
    if limit is None:
        return rows
    kept = []
    for split in dict.fromkeys(row["split"] for row in rows):
        own = [row for row in rows if row["split"] == split]
        held = [row for row in own if is_held_out(row["name"])][: math.ceil(limit / 8)]
        kept += [*[row for row in own if not is_held_out(row["name"])][: limit - len(held)], *held]
    return kept


def best_of_n(model: Path, reward: Path, corpus: Path, seed: int, limit: int | None = None) -> dict[str, Any]:
    """What the best of n answers by the reward model is worth, by its reward and by the gold score, for the
    first questions of both test sets."""
    started = time.perf_counter()
    rows = _asked(corpus, limit)
    answers = ask(_chat(model), [row["question"] for row in rows], max(BEST_OF), 1.0, seed, MAX_TOKENS)
    rewards, golds = _worth(reward, rows, answers)
    curve = []
    for point in best_of_curve(rewards, golds, BEST_OF):
        spread = bootstrap(best_of_means(rewards, golds, point.n).tolist(), seed)
        curve.append({**asdict(point), "gold_low": spread.low, "gold_high": spread.high})
    peak = peak_of({n: best_of_means(rewards, golds, n) for n in BEST_OF}, seed)
    by_set = {}
    for name in BEST_OF_SETS:
        places = [place for place, row in enumerate(rows) if row["set"] == name]
        own = ([rewards[place] for place in places], [golds[place] for place in places])
        by_set[name] = [asdict(point) for point in best_of_curve(*own, BEST_OF)]
    return {
        "prompts": len(rows),
        "answers": max(BEST_OF),
        "temperature": 1.0,
        "curve": curve,
        "by_set": by_set,
        "peak": peak.n,
        "peak_share": peak.share,
        "gain_to_peak": peak.gain.as_dict(),
        "last_minus_peak": peak.fall.as_dict(),
        "seconds": _since(started),
    }


def compare(
    answers: tuple[Path, Path],
    models: tuple[Path, Path],
    reward: Path,
    corpus: Path,
    seed: int,
    limit: int | None = None,
) -> dict[str, Any]:
    """An aligned model beside the assistant it comes from (always the assistant first): differences over the
    same questions, the KL divergence, and its reward and gold score at temperature 1."""
    started = time.perf_counter()
    before, after = ({(row["set"], row["question"]): row for _, row in read_jsonl(path)} for path in answers)
    measures: dict[str, tuple[str, Callable[[Row], bool]]] = {
        "invented_answered": ("eval_invented", lambda row: not row["refused"]),
        "test_wrongly_refused": ("eval_test", lambda row: row["refused"]),
        "test_right": ("eval_test", lambda row: row["f1"] >= RIGHT_F1),
    }
    found: dict[str, Any] = {}
    for name, (questions, outcome) in measures.items():
        keys = [key for key in before if key[0] == questions and key in after]
        was, now = ([float(outcome(rows[key])) for key in keys] for rows in (before, after))
        difference = bootstrap([b - a for a, b in zip(was, now, strict=True)], seed)
        found[name] = {
            "before": sum(was) / len(was),
            "after": sum(now) / len(now),
            "difference": difference.as_dict(),
        }
    found["separation"] = _separations(before, after, seed)
    rows = _asked(corpus, limit)
    divergence, texts = sampled_kl(*models, [row["question"] for row in rows], seed)
    rewards, golds = _worth(reward, rows, texts)
    means = {"reward": _means(rewards), "gold": _means(golds)}
    aligned = {name: bootstrap(values, seed).as_dict() for name, values in means.items()}
    return {**found, "kl": divergence.as_dict(), "aligned": aligned, "seconds": _since(started)}


def _separations(
    before: Mapping[tuple[str, str], Row], after: Mapping[tuple[str, str], Row], seed: int
) -> dict[str, Any]:
    """d' of invented and test names, by whether they are refused, before and after: what a threshold that is
    moved does not change. The difference is resampled in pairs, the two sets each for itself."""
    counts = [
        Counter(
            (before[key]["refused"], after[key]["refused"])
            for key in before
            if key[0] == questions and key in after
        )
        for questions in ("eval_invented", "eval_test")
    ]
    outcomes = [(False, False), (False, True), (True, False), (True, True)]
    tables = [np.array([[count[outcome] for outcome in outcomes]]) for count in counts]
    random = np.random.default_rng(seed)
    drawn = [random.multinomial(int(t.sum()), t[0] / t.sum(), size=10_000) for t in tables]
    (was, now), (was_drawn, now_drawn) = (
        [d_prime(*(refused_of(table, side) for table in pair)) for side in (0, 1)] for pair in (tables, drawn)
    )
    low, high = np.quantile(now_drawn - was_drawn, (0.025, 0.975))
    n = int(sum(table.sum() for table in tables))
    difference = Mean(float(now[0] - was[0]), float(low), float(high), n)
    return {"before": float(was[0]), "after": float(now[0]), "difference": difference.as_dict()}


def refused_of(table: NDArray[np.int_], side: int) -> NDArray[np.float64]:
    """Shares refused before (side 0) or after (1), from counts (R, 4) of (no, no), (no, yes), (yes, no) and
    (yes, yes). Half a name more on each side keeps them off 0 and 1 (Hautus 1995)."""
    refused = table[:, 2] + table[:, 3] if side == 0 else table[:, 1] + table[:, 3]
    return np.asarray((refused + 0.5) / (table.sum(1) + 1))


def d_prime(hits: NDArray[np.float64], false_alarms: NDArray[np.float64]) -> NDArray[np.float64]:
    """z(hits) - z(false alarms): how many standard deviations two normal distributions of equal width are
    apart (Green & Swets 1966)."""
    z = np.vectorize(NormalDist().inv_cdf)
    return np.asarray(z(hits) - z(false_alarms))


def sampled_kl(
    reference: Path, policy: Path, questions: Sequence[str], seed: int
) -> tuple[Mean, list[list[str]]]:
    """KL(policy || reference) in nats an answer, with the answers: the mean over questions of
    log policy - log reference of the policy's own answers at temperature 1, end of turn included (where an
    answer did not end by itself, to the last token that it was given)."""
    chat = _chat(policy, exact=True)
    prompts = [chat.prompt([Message(role="user", content=question)]) for question in questions]
    params = SamplingParams(n=KL_ANSWERS, max_tokens=MAX_TOKENS, seed=seed)
    made = chat.engine.generate(prompts, chat.until_end_of_turn(params))
    rows = [
        [*prompts[i // KL_ANSWERS], *one.ids, *([one.stop_token.id] if one.stop_token else [])]
        for i, one in enumerate(made)
    ]
    firsts = [len(prompts[i // KL_ANSWERS]) - 1 for i in range(len(rows))]
    own, other = chat.engine.score(rows), _chat(reference, exact=True).engine.score(rows)
    logs = [math.fsum(a[i:]) - math.fsum(b[i:]) for a, b, i in zip(own, other, firsts, strict=True)]
    texts = [chat.tokenizer.decode(one.ids, skip_special=True) for one in made]
    return bootstrap(_means(_grouped(logs, KL_ANSWERS)), seed), _grouped(texts, KL_ANSWERS)


def _asked(corpus: Path, limit: int | None) -> list[dict[str, Any]]:
    """The first questions of both test sets, each with the name of its set."""
    count = min(BEST_OF_QUESTIONS, limit or BEST_OF_QUESTIONS)
    return [
        {"set": name, **row}
        for name in BEST_OF_SETS
        for _, row in list(read_jsonl(corpus / f"{name}.jsonl"))[:count]
    ]


def _worth(
    reward: Path, rows: Sequence[Row], answers: Sequence[Sequence[str]]
) -> tuple[list[list[float]], list[list[float]]]:
    """Rewards and gold scores of the answers to each question."""
    device = pick_device()
    judge = load_judge(reward, device, pick_compute_dtype(device))
    conversations = [
        [Message(role="user", content=row["question"]), Message(role="assistant", content=text)]
        for row, own in zip(rows, answers, strict=True)
        for text in own
    ]
    rewards = _grouped(judge.score(conversations), len(answers[0]))
    golds = [
        [gold_score(text, row["answer"]) for text in own] for row, own in zip(rows, answers, strict=True)
    ]
    return rewards, golds


def _chat(model: Path, exact: bool = False) -> LocalChat:
    """`exact`: in fp32, for log-probabilities that are compared."""
    keep_freed_memory()
    device = pick_device()
    dtype = None if exact else pick_compute_dtype(device)
    return LocalChat(*load_engine(model, device=device, batch_size=128, compute_dtype=dtype))


def _grouped(values: Sequence[T], size: int) -> list[list[T]]:
    return [list(values[first : first + size]) for first in range(0, len(values), size)]


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(row) / len(row) for row in rows]


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 1)
