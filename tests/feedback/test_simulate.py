from __future__ import annotations

import random
from pathlib import Path

import pytest

from fledge.engine.remote import EndpointError
from fledge.errors import UserError
from fledge.feedback.agreement import figures
from fledge.feedback.forms import ProjectSettings
from fledge.feedback.labelling import next_task, progress
from fledge.feedback.people import add_labeler, list_labelers
from fledge.feedback.records import Item, Output
from fledge.feedback.simulate import (
    RULES,
    add_noise,
    find_rule,
    gold_first,
    longer,
    prefill_by_rule,
    rule_answer,
    shorter,
    simulate,
)
from fledge.feedback.state import answers_of
from fledge.feedback.store import Store, add_item, add_project, edit_project

from .making import new_store

ITEM = Item(
    1,
    1,
    [{"role": "user", "content": "?"}],
    "ready",
    tuple(Output(text, "m") for text in ("the sky is blue", "blue", "a green sea of sand")),
    gold="The sky is blue",
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path)


def test_rules_by_hand() -> None:
    def ranks(rule: str) -> list[int]:
        answer = rule_answer("ranking", RULES[rule], ITEM, (0, 1, 2))
        assert answer is not None
        return list(answer["ranks"])

    assert ranks("shorter") == [2, 1, 3]
    assert ranks("longer") == [2, 3, 1]
    assert ranks("gold-first") == [1, 2, 3]
    assert gold_first(ITEM.prompt, "blue", ITEM.gold) == 2 * 1 / (1 + 4)
    with pytest.raises(UserError, match="no reference answer"):
        gold_first(ITEM.prompt, "blue", None)
    with pytest.raises(UserError, match="choose from shorter, longer, gold-first"):
        find_rule("best")


def test_every_kind_has_its_answer() -> None:
    assert rule_answer("pairwise", shorter, ITEM, (0, 1)) == {"choice": "b"}
    assert rule_answer("pairwise", shorter, ITEM, (1, 1)) == {"choice": "tie"}
    rating = rule_answer("rating", shorter, ITEM, (0, 1, 2))
    assert rating is not None
    assert [one["overall"] for one in rating["ratings"]] == [4, 7, 1]
    assert rule_answer("demonstration", shorter, ITEM, ()) == {"text": "The sky is blue"}
    assert rule_answer("correction", shorter, ITEM, (1,)) == {"text": "The sky is blue"}
    right = Item(1, 1, ITEM.prompt, "ready", (Output("The sky is blue", "m"),), gold="The sky is blue")
    assert rule_answer("correction", shorter, right, (0,)) is None


def test_noise_turns_as_many_neighbours_as_it_says() -> None:
    rng = random.Random(0)
    turned = sum(add_noise({"ranks": [1, 2]}, 0.1, rng) == {"ranks": [2, 1]} for _ in range(10_000))
    assert abs(turned - 1000) < 4 * (10_000 * 0.1 * 0.9) ** 0.5
    assert add_noise({"ranks": [3, 1, 2]}, 0.0, rng) == {"ranks": [3, 1, 2]}
    # all neighbours from the worst up: the worst goes to the top
    assert add_noise({"ranks": [1, 2, 3]}, 1.0, rng) == {"ranks": [2, 3, 1]}
    assert add_noise({"ranks": [1, 1, 3]}, 1.0, rng)["ranks"].count(1) == 2
    assert add_noise({"choice": "a"}, 1.0, rng) == {"choice": "b"}
    assert add_noise({"choice": "tie"}, 1.0, rng)["choice"] in "ab"
    assert add_noise({"ratings": [{"overall": 4}]}, 1.0, rng)["ratings"][0]["overall"] in (3, 5)


def filled(store: Store, items: int = 40) -> int:
    project = add_project(store, ProjectSettings("p", ("ranking",), labelers_per_item=1))
    for i in range(items):
        add_item(store, project, f"{i}", outputs=[Output("x" * n, "m") for n in (3, 1, 2)])
    return project


def test_simulated_labelers_are_marked_and_take_no_place(store: Store) -> None:
    project = filled(store)
    assert simulate(store, project, shorter, "shorter", labelers=3, noise=0.2, seed=1) == 120
    assert [(one.name, one.simulated) for one in list_labelers(store)] == [
        (f"rule shorter {n}", True) for n in (1, 2, 3)
    ]
    assert progress(store, project).filled == 0
    assert next_task(store, add_labeler(store, "Ada")[0].id, project) is not None
    (agreement,) = figures(store, project).agreement
    assert agreement.simulated
    assert 0.5 < agreement.percent < 1
    assert simulate(store, project, shorter, "shorter", labelers=3, noise=0.2, seed=1) == 0  # nothing is new


def test_the_same_seed_gives_the_same_labels(tmp_path: Path) -> None:
    def labels(folder: str, seed: int) -> list[object]:
        store = new_store(tmp_path / folder)
        project = filled(store)
        simulate(store, project, longer, "longer", noise=0.5, seed=seed)
        with store.reading() as connection:
            return [answer.answer for answer in answers_of(connection, project)]

    assert labels("a", 1) == labels("b", 1) != labels("c", 2)


def test_without_noise_the_labels_are_the_rules(store: Store) -> None:
    project = filled(store)
    simulate(store, project, longer, "longer", labelers=1, noise=0)
    with store.reading() as connection:
        assert all(a.answer == {"ranks": [1, 3, 2]} for a in answers_of(connection, project))


@pytest.mark.parametrize(("labelers", "noise", "words"), [(0, 0.1, "at least 1"), (1, 1.5, "from 0 to 1")])
def test_wrong_simulations(store: Store, labelers: int, noise: float, words: str) -> None:
    with pytest.raises(UserError, match=words):
        simulate(store, 1, shorter, "shorter", labelers=labelers, noise=noise)


def test_a_judge_is_asked_once_and_may_pass(store: Store) -> None:
    project = filled(store, items=3)
    asked = []

    def picky(prompt: object, output: str, gold: str | None) -> float:
        asked.append(output)
        if len(asked) == 1:
            raise UserError("this one is too long for me")
        return float(len(output))

    with pytest.raises(EndpointError):
        prefill_by_rule(store, project, out_of_order, "gone")
    assert prefill_by_rule(store, project, picky, "picky") == 2
    before = len(asked)
    assert prefill_by_rule(store, project, picky, "picky") == 1  # the one that it passed
    assert len(asked) - before < before
    assert prefill_by_rule(store, project, picky, "picky") == 0


def out_of_order(prompt: object, output: str, gold: str | None) -> float:
    raise EndpointError("no answer")


def test_a_rule_may_prefill(store: Store) -> None:
    project = filled(store, items=2)
    assert prefill_by_rule(store, project, shorter, "shorter") == 2
    assert prefill_by_rule(store, project, longer, "longer") == 0  # the first judge's answers stay
    edit_project(store, project, prefill=True)
    task = next_task(store, add_labeler(store, "Ada")[0].id, project)
    assert task is not None
    assert task.prefill is not None
    assert task.prefill.judge == "rule shorter"
    assert task.prefill.answer == {"ranks": [len(text) for text in task.outputs]}
