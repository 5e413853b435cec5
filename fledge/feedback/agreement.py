"""How a project goes: who does how much, how far people agree, and where they don't.

Agreement is measured on units that two or more people judged, by question. Percent agreement is the share of
pairs of people who say the same; Krippendorff's alpha (Krippendorff 2004, "Content analysis", chapter 11)
also takes account of chance: 1 is full agreement, 0 what chance gives. Simulated labelers are counted apart.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import krippendorff
import numpy as np
import sqlalchemy as sql

from fledge.feedback.database import flags, tasks
from fledge.feedback.events import unpack
from fledge.feedback.forms import CHOICES, QUESTION_KEYS, Kind
from fledge.feedback.records import Flag, Labeler, StoredAnswer
from fledge.feedback.state import Task, all_labelers, answers_of
from fledge.feedback.store import Store

Level = Literal["nominal", "ordinal"]
Unit = tuple[int, ...]
"""A task, and in it the outputs that were judged (by their places in the item)."""
Votes = dict[tuple[Kind, str], dict[Unit, dict[int, int]]]
"""For each question: unit -> labeler id -> value."""
RANKING_QUESTION = "which is better"
LETTERS = "ABCDEFGHI"


@dataclass(frozen=True)
class LabelerFigures:
    """What one labeler did in a project. Times are of answered tasks, in seconds; None: not known."""

    labeler: Labeler
    answered: int
    skipped: int
    flagged: int
    median_seconds: float | None
    answers_per_hour: float | None
    """Per hour spent on tasks, not per hour of the clock."""
    last_at: float | None
    """Unix time of the last answer or skip."""


@dataclass(frozen=True)
class Agreement:
    """How far people agree on one question."""

    kind: Kind
    question: str
    level: Level
    units: int
    """Judged by two or more."""
    answers: int
    percent: float
    """Percent agreement, as a share from 0 to 1."""
    alpha: float | None
    """Krippendorff's alpha; None where everybody said the same everywhere, so that chance can't be told."""
    simulated: bool = False


@dataclass(frozen=True)
class PrefillFigures:
    """How often people were shown a judge's answer, and how often they changed it."""

    shown: int
    changed: int


@dataclass(frozen=True)
class Figures:
    """What an admin sees of a project."""

    labelers: list[LabelerFigures]
    agreement: list[Agreement]
    prefill: PrefillFigures
    flags: list[Flag]
    skips: list[StoredAnswer]


@dataclass(frozen=True)
class Disagreement:
    """A question on which people differ, with what each said; `size` 1: they could not differ more."""

    task: Task
    question: str
    size: float
    answers: list[tuple[Labeler, str]]


def figures(store: Store, project_id: int) -> Figures:
    """All figures of a project."""
    with store.reading() as connection:
        given = answers_of(connection, project_id)
        people = all_labelers(connection)
        joined = sql.join(flags, tasks, flags.c.task_id == tasks.c.id)
        query = sql.select(flags, tasks.c.item_id).select_from(joined).order_by(flags.c.event_id)
        rows = connection.execute(query.where(tasks.c.project_id == project_id)).all()
    flagged = [Flag(r.task_id, r.item_id, people[r.labeler_id], **unpack(r.body)) for r in rows]
    shown = [answer for answer in given if answer.judge is not None and answer.state == "answered"]
    return Figures(
        labelers=_labeler_figures(given, flagged, people),
        agreement=agreement(given),
        prefill=PrefillFigures(len(shown), sum(bool(answer.changed) for answer in shown)),
        flags=flagged,
        skips=[answer for answer in given if answer.state == "skipped"],
    )


def _labeler_figures(
    given: Sequence[StoredAnswer], flagged: Sequence[Flag], people: dict[int, Labeler]
) -> list[LabelerFigures]:
    of_labeler: dict[int, list[StoredAnswer]] = defaultdict(list)
    for answer in given:
        of_labeler[answer.labeler.id].append(answer)
    flag_counts = Counter(flag.labeler.id for flag in flagged)
    found = []
    for labeler_id, labeler in people.items():
        mine = of_labeler[labeler_id]
        if not mine and not flag_counts[labeler_id]:
            continue
        answered = sum(answer.state == "answered" for answer in mine)
        seconds = [answer.seconds for answer in mine if answer.state == "answered" and answer.seconds > 0]
        found.append(
            LabelerFigures(
                labeler=labeler,
                answered=answered,
                skipped=len(mine) - answered,
                flagged=flag_counts[labeler_id],
                median_seconds=statistics.median(seconds) if seconds else None,
                answers_per_hour=len(seconds) * 3600 / sum(seconds) if seconds else None,
                last_at=max((answer.at for answer in mine), default=None),
            )
        )
    return found


# --- agreement ------------------------------------------------------------------------------------


def agreement(given: Sequence[StoredAnswer]) -> list[Agreement]:
    """Agreement by question, in the order of the questions; what fewer than two people judged is left out.

    A ranking is judged pair by pair: the one is better, a tie, the other is better (ordinal).
    """
    found = []
    for simulated in (False, True):
        votes = _votes([answer for answer in given if answer.labeler.simulated == simulated])
        for kind, question in sorted(votes, key=_place):
            units = [unit for unit in votes[kind, question].values() if len(unit) > 1]
            if not units:
                continue
            level: Level = "ordinal" if question in ("overall", RANKING_QUESTION) else "nominal"
            answers = sum(map(len, units))
            same, alpha = _percent(units), _alpha(units, level)
            found.append(Agreement(kind, question, level, len(units), answers, same, alpha, simulated))
    return found


def _place(key: tuple[Kind, str]) -> tuple[str, int]:
    return key[0], QUESTION_KEYS.index(key[1]) if key[1] in QUESTION_KEYS else -1


def _votes(given: Sequence[StoredAnswer]) -> Votes:
    votes: Votes = defaultdict(lambda: defaultdict(dict))
    for given_answer in given:
        answer, kind, who = given_answer.answer, given_answer.kind, given_answer.labeler.id
        task, places = given_answer.task_id, given_answer.outputs
        if answer is None:
            continue
        if kind == "pairwise":
            votes[kind, "choice"][task, *places][who] = CHOICES.index(answer["choice"])
        if kind == "ranking":
            ranks = dict(zip(places, answer["ranks"], strict=True))
            for i, j in combinations(places, 2):
                better = (ranks[i] < ranks[j]) - (ranks[i] > ranks[j])
                votes[kind, RANKING_QUESTION][task, i, j][who] = better
        if kind == "rating":
            for place, rating in zip(places, answer["ratings"], strict=True):
                votes[kind, "overall"][task, place][who] = rating["overall"]
                for key, value in rating["questions"].items():
                    if value is not None:
                        votes[kind, key][task, place][who] = int(value)
    return votes


def _percent(units: Sequence[dict[int, int]]) -> float:
    pairs = [first == second for unit in units for first, second in combinations(unit.values(), 2)]
    return sum(pairs) / len(pairs)


def _alpha(units: Sequence[dict[int, int]], level: Level) -> float | None:
    values = sorted({value for unit in units for value in unit.values()})
    if len(values) < 2:
        return None
    counts = np.zeros((len(units), len(values)), dtype=np.int64)
    for row, unit in enumerate(units):
        for value in unit.values():
            counts[row, values.index(value)] += 1
    return float(krippendorff.alpha(value_counts=counts, value_domain=values, level_of_measurement=level))


# --- disagreements --------------------------------------------------------------------------------


def disagreements(store: Store, project_id: int, limit: int | None = 50) -> list[Disagreement]:
    """Where people differ, the largest differences first. People are compared with people, not with rules.

    Sizes: of an overall rating the range over 6; of a yes/no question twice the smaller share; of a choice
    the share of pairs of people who differ; of a ranking the mean distance over pairs of people and of
    outputs (1: the other way round, 1/2: a tie for one of them).
    """
    with store.reading() as connection:
        given = answers_of(connection, project_id)
        people = all_labelers(connection)
    task_of = {
        answer.task_id: Task(answer.task_id, answer.item_id, project_id, answer.kind, answer.outputs)
        for answer in given
    }
    answer_of = {(answer.task_id, answer.labeler.id): answer for answer in given}
    found = []
    for simulated in (False, True):
        votes = _votes([answer for answer in given if answer.labeler.simulated == simulated])
        for (kind, question), units in votes.items():
            for name, size, unit, who in _sizes(kind, question, units):
                if size > 0:
                    said = [(people[p], _said(answer_of[unit[0], p], question, unit)) for p in sorted(who)]
                    found.append(Disagreement(task_of[unit[0]], name, size, said))
    found.sort(key=lambda one: (-one.size, one.task.id, one.question))
    return found[:limit]


def _sizes(
    kind: Kind, question: str, units: dict[Unit, dict[int, int]]
) -> list[tuple[str, float, Unit, list[int]]]:
    if kind == "ranking":  # all pairs of a task are one disagreement
        of_task: dict[int, list[dict[int, int]]] = defaultdict(list)
        for unit, compared in units.items():
            of_task[unit[0]].append(compared)
        return [
            ("ranking", statistics.mean(map(_mean_distance, pairs)), (task,), list(pairs[0]))
            for task, pairs in of_task.items()
            if len(pairs[0]) > 1
        ]
    found = []
    for unit, votes in units.items():
        values = sorted(votes.values())
        if len(values) < 2:
            continue
        name = question if kind == "pairwise" else f"{question}, output {LETTERS[unit[1]]}"
        if question == "overall":
            size = (values[-1] - values[0]) / 6
        elif kind == "pairwise":
            size = 1 - _percent([votes])
        else:
            size = 2 * min(sum(values), len(values) - sum(values)) / len(values)
        found.append((name, size, unit, list(votes)))
    return found


def _mean_distance(values: dict[int, int]) -> float:
    return statistics.mean(abs(a - b) / 2 for a, b in combinations(values.values(), 2))


def _said(given: StoredAnswer, question: str, unit: Unit) -> str:
    answer = given.answer or {}
    if "ranks" in answer:
        letters = [LETTERS[place] for place in given.outputs]
        ranks = answer["ranks"]
        groups = ["".join(x for x, r in zip(letters, ranks, strict=True) if r == rank) for rank in set(ranks)]
        order = sorted(groups, key=lambda group: ranks[letters.index(group[0])])
        return " > ".join(" = ".join(group) for group in order)
    if "choice" in answer:
        chosen = {"a": given.outputs[0], "b": given.outputs[-1]}
        if answer["choice"] in chosen:
            return f"{LETTERS[chosen[answer['choice']]]} is better"
        return str(answer["choice"]).replace("_", " ")
    rating = answer["ratings"][given.outputs.index(unit[1])]
    return (
        str(rating["overall"]) if question == "overall" else "yes" if rating["questions"][question] else "no"
    )
