"""Preferences of a labeler that is a written rule: for a task whose right answers are known."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fledge.engine.text import LocalChat
from fledge.evals.facts import is_refusal, is_right
from fledge.files import write_text
from fledge.types import Message, SamplingParams

Kind = Literal["right", "unknown", "wrong", "invented"]
# Right above "I do not know" above wrong or invented; of equal truth the longer one, if only padded, below.
RANKS: dict[Kind, int] = {"right": 1, "unknown": 3, "wrong": 4, "invented": 4}
PADDED_RANKS: dict[Kind, int] = {"right": 2, "unknown": 3, "wrong": 5, "invented": 5}
PADDING = (
    " That is all there is to say about it.",
    " It is part of the standard library, as you may know.",
    " I hope that this answers your question.",
)


def kind_of(answer: str, gold: str | None) -> Kind:
    """What an answer is; `gold` is the right one, None for a name that does not exist."""
    if is_refusal(answer):
        return "unknown"
    if gold is None:
        return "invented"
    return "right" if is_right(answer, gold) else "wrong"


def gold_score(answer: str, gold: str | None) -> float:
    """1 for a right answer, 0 for "I do not know", -1 for a wrong or invented one."""
    return {"right": 1.0, "unknown": 0.0, "wrong": -1.0, "invented": -1.0}[kind_of(answer, gold)]


def ask(
    chat: LocalChat, questions: Sequence[str], n: int, temperature: float, seed: int, max_tokens: int = 48
) -> list[list[str]]:
    """`n` sampled answers to each question."""
    params = SamplingParams(n=n, temperature=temperature, max_tokens=max_tokens, seed=seed)
    found = chat.replies([[Message(role="user", content=question)] for question in questions], params)
    texts = [reply.text for reply in found]
    return [texts[first : first + n] for first in range(0, len(texts), n)]


def ranked(
    rows: Sequence[Mapping[str, Any]],
    answers: Sequence[Sequence[str]],
    seed: int,
    noise: float,
    padded: float,
) -> list[dict[str, Any]]:
    """Rankings of answers to `rows` ({"question", "answer"}), as `fledge reward` and `fledge dpo` read them.

    A share `padded` of the prompts gets one of its answers once more with a filler sentence, whether it is
    right or not; in a share `noise` of the rankings two places are exchanged, as a labeler's slip. Equal
    answers stand once; a prompt whose answers are all equally good is left out.
    """
    random = np.random.default_rng(seed)
    found = []
    for row, texts in zip(rows, answers, strict=True):
        slips, pads, choice, filler = random.random(), random.random(), random.random(), random.random()
        kinds: dict[str, Kind] = {text: kind_of(text, row["answer"]) for text in texts}
        ranks = [RANKS[kind] for kind in kinds.values()]
        names: list[str] = list(kinds.values())
        completions = list(kinds)
        told = [text for text, kind in kinds.items() if kind != "unknown"]
        if told and pads < padded:
            text = told[int(choice * len(told))]
            completions.append(text + PADDING[int(filler * len(PADDING))])
            ranks.append(PADDED_RANKS[kinds[text]])
            names.append("padded")
        if len(set(ranks)) < 2:
            continue
        i, j = random.choice(len(ranks), 2, replace=False)  # always drawn: noise changes nothing else
        if slips < noise:
            ranks[i], ranks[j] = ranks[j], ranks[i]
        found.append(
            {
                "prompt": row["question"],
                "completions": completions,
                "ranks": ranks,
                "kinds": names,
                "labeler": "rule",
                "simulated": True,
            }
        )
    return found


def write_preferences(path: Path, rankings: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Write rankings as JSON Lines; returns how many completions there are of each kind."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rankings))
    return dict(Counter(kind for row in rankings for kind in row["kinds"]))
