from __future__ import annotations

from pathlib import Path

import pytest

from fledge.feedback.agreement import agreement, disagreements, figures
from fledge.feedback.forms import Answer, Kind
from fledge.feedback.labelling import flag, record_answer, skip
from fledge.feedback.people import add_labeler
from fledge.feedback.records import Labeler, StoredAnswer
from fledge.feedback.state import stable_order
from fledge.feedback.store import Store, get_project, list_tasks

from .making import new_store, project_with

PEOPLE = [Labeler(i, f"p{i}", "labeler") for i in range(4)]


def said(kind: Kind, task: int, who: int, answer: Answer, places: tuple[int, ...] = (0,)) -> StoredAnswer:
    return StoredAnswer(
        task * 10 + who, task, task, kind, PEOPLE[who], places, "answered", answer, places, 1.0, 0.0
    )


def rated(task: int, who: int, overall: int, **questions: bool | None) -> StoredAnswer:
    return said("rating", task, who, {"ratings": [{"overall": overall, "questions": questions}]})


def test_nominal_alpha_by_hand() -> None:
    # Two people, ten units; both say no eight times over, and so on: o_00 = 10, o_01 = o_10 = 4, o_11 = 2;
    # n_0 = 14, n_1 = 6, n = 20; alpha = 1 - (n - 1) o_01 / (n_0 n_1) = 1 - 19 * 4 / 84 = 0.095238...
    first = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    second = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    given = []
    for unit, (a, b) in enumerate(zip(first, second, strict=True)):
        given += [
            rated(unit, 0, 4, hallucination=bool(a)),
            rated(unit, 1, 4, hallucination=bool(b)),
        ]
    found = {one.question: one for one in agreement(given)}
    assert found["hallucination"].alpha == pytest.approx(1 - 19 * 4 / 84)
    assert found["hallucination"].percent == 0.6
    assert found["hallucination"].units == 10
    assert found["overall"].alpha is None  # everybody says 4
    assert found["overall"].percent == 1


def test_ordinal_alpha_by_hand() -> None:
    # Units (1, 2), (2, 2), (3, 2): n_1 = 1, n_2 = 4, n_3 = 1, n = 6.
    # Squared ordinal distances: d(1,2) = (1 + 4 - 5/2)^2 = 2.5^2, d(2,3) = 2.5^2, d(1,3) = (6 - 1)^2 = 25.
    # Observed: one pair (1,2) and one (2,3), each counted twice: D_o = 2 * (2.5^2 + 2.5^2) / 6.
    # Expected: 2 * (1*4*2.5^2 + 4*1*2.5^2 + 1*1*25) / (6 * 5).
    given = []
    for unit, pair in enumerate([(1, 2), (2, 2), (3, 2)]):
        given += [rated(unit, who, value) for who, value in enumerate(pair)]
    (overall,) = agreement(given)
    observed = 2 * (2.5**2 + 2.5**2) / 6
    expected = 2 * (4 * 2.5**2 + 4 * 2.5**2 + 25) / 30
    assert overall.level == "ordinal"
    assert overall.alpha == pytest.approx(1 - observed / expected)
    assert overall.percent == pytest.approx(1 / 3)


def test_unanswered_questions_and_single_judges_do_not_count() -> None:
    given = [
        rated(0, 0, 4, hallucination=True),
        rated(0, 1, 4, hallucination=None),
        rated(1, 0, 5, hallucination=True),
    ]
    assert [one.question for one in agreement(given)] == ["overall"]


def test_a_ranking_is_judged_pair_by_pair() -> None:
    # A > B > C against A > C > B: two of three pairs alike
    given = [
        said("ranking", 0, 0, {"ranks": [1, 2, 3]}, (0, 1, 2)),
        said("ranking", 0, 1, {"ranks": [1, 3, 2]}, (0, 1, 2)),
    ]
    (found,) = agreement(given)
    assert (found.units, found.answers) == (3, 6)
    assert found.percent == pytest.approx(2 / 3)


def answer(
    store: Store, project: int, task_place: int, who: int, stored: Answer, seconds: float = 10
) -> None:
    """Record an answer given in the item's order, whatever order the person would see."""
    task = list_tasks(store, project)[task_place]
    order = stable_order(task.outputs, "shown", get_project(store, project).settings.seed, task.id, who)
    shown = stored
    if "ranks" in stored:
        shown = {"ranks": [stored["ranks"][task.outputs.index(place)] for place in order]}
    if "choice" in stored and order[0] > order[1]:
        shown = {"choice": {"a": "b", "b": "a"}.get(stored["choice"], stored["choice"])}
    with store.writing() as connection:
        record_answer(store, connection, task, who, shown, order, seconds)


def test_disagreements_largest_first(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    project = project_with(store, "ranking", items=3, outputs=3, n=2)
    ada, bob = (add_labeler(store, name)[0].id for name in ("Ada", "Bob"))
    for place, (first, second) in enumerate(
        [([1, 2, 3], [1, 2, 3]), ([1, 2, 3], [3, 2, 1]), ([1, 1, 3], [1, 2, 3])]
    ):
        answer(store, project, place, ada, {"ranks": first})
        answer(store, project, place, bob, {"ranks": second})
    found = disagreements(store, project)
    tasks = list_tasks(store, project)
    assert [(one.task, one.size) for one in found] == [(tasks[1], 1.0), (tasks[2], pytest.approx(1 / 6))]
    assert [(who.name, text) for who, text in found[0].answers] == [
        ("Ada", "A > B > C"),
        ("Bob", "C > B > A"),
    ]
    assert found[1].answers[0][1] == "A = B > C"


def test_choices_are_told_by_the_items_letters(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    project = project_with(store, "pairwise", outputs=3, n=2)
    ada, bob = (add_labeler(store, name)[0].id for name in ("Ada", "Bob"))
    answer(store, project, 2, ada, {"choice": "b"})  # the third pair: B and C
    answer(store, project, 2, bob, {"choice": "both_bad"})
    (found,) = disagreements(store, project)
    assert [text for _, text in found.answers] == ["C is better", "both bad"]
    assert found.size == 1


def test_figures_of_people(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    project = project_with(store, "ranking", items=4, outputs=2)
    ada = add_labeler(store, "Ada")[0].id
    rule = add_labeler(store, "rule", simulated=True)[0].id
    for place, seconds in enumerate((10, 20, 60)):
        answer(store, project, place, ada, {"ranks": [1, 2]}, seconds)
        answer(store, project, place, rule, {"ranks": [2, 1]}, 0)
    flag(store, ada, list_tasks(store, project)[0].id, "look")
    found = figures(store, project)
    mine, rules = found.labelers
    assert (mine.answered, mine.skipped, mine.flagged) == (3, 0, 1)
    assert (mine.median_seconds, mine.answers_per_hour) == (20, 120)
    assert (rules.answered, rules.median_seconds, rules.answers_per_hour) == (3, None, None)
    assert found.agreement == []  # a person is not compared with a rule
    assert disagreements(store, project) == []
    skip(store, ada, list_tasks(store, project)[0].id, "no")
    assert [one.reason for one in figures(store, project).skips] == ["no"]
