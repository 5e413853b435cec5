from __future__ import annotations

import json
from pathlib import Path

import pytest

from fledge.data.preferences import read_judgements, read_rankings
from fledge.errors import UserError
from fledge.feedback.exports import FORMS, export_rows, jsonl, prompt_share, split_rows, write_export
from fledge.feedback.forms import Answer, ProjectSettings
from fledge.feedback.labelling import next_task, skip, submit
from fledge.feedback.people import add_labeler
from fledge.feedback.records import Output
from fledge.feedback.simulate import shorter, simulate
from fledge.feedback.store import Store, add_item, add_project, list_tasks

from .making import busy_project, new_store, project_with


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path)


def say(store: Store, project: int, liking: dict[str, int]) -> int:
    """Ada answers her next task by what she thinks of each output (1 the best)."""
    who = add_labeler(store, "Ada")[0].id
    task = next_task(store, who, project)
    assert task is not None
    ranks = [liking[text] for text in task.outputs]
    answer: Answer = {"ranks": ranks}
    if task.kind == "pairwise":
        answer = {"choice": "tie" if ranks[0] == ranks[1] else "a" if ranks[0] < ranks[1] else "b"}
    if task.kind == "rating":
        answer = {"ratings": [{"overall": 8 - rank, "questions": {}} for rank in ranks]}
    submit(store, who, task.task_id, answer, order=task.order, seconds=1)
    return who


def texts(turns: list[dict[str, str]]) -> str:
    (turn,) = turns
    assert turn["role"] == "assistant"
    return turn["content"]


def test_a_ranking_of_four_with_a_tie_gives_five_pairs(store: Store) -> None:
    project = project_with(store, "ranking")
    who = say(store, project, {"0.0": 2, "0.1": 1, "0.2": 4, "0.3": 2})
    (ranked,) = export_rows(store, project, "ranked")
    assert [texts(turns) for turns in ranked["completions"]] == ["0.0", "0.1", "0.2", "0.3"]
    assert ranked["ranks"] == [2, 1, 4, 2]
    assert ranked["models"] == ["model-0", "model-1", "model-2", "model-3"]
    assert ranked["labeler"] == f"labeler-{who}"
    assert ranked["simulated"] is False
    assert sorted(ranked["order"]) == [0, 1, 2, 3]
    pairs = {(texts(r["chosen"]), texts(r["rejected"])) for r in export_rows(store, project, "preference")}
    better = {("0.1", "0.0"), ("0.1", "0.2"), ("0.1", "0.3"), ("0.0", "0.2"), ("0.3", "0.2")}
    assert pairs == better
    assert ranked["prompt"] == [{"role": "user", "content": "prompt 0"}]


def test_choices_become_rankings_of_two(store: Store) -> None:
    project = project_with(store, "pairwise", outputs=2, n=3)
    say(store, project, {"0.0": 2, "0.1": 1})
    say(store, project, {"0.0": 1, "0.1": 1})
    who = add_labeler(store, "Eve")[0].id
    task = next_task(store, who, project)
    assert task is not None
    submit(store, who, task.task_id, {"choice": "both_bad"}, order=task.order, seconds=1)
    rows = export_rows(store, project, "ranked")
    assert [(row["ranks"], row["both_bad"]) for row in rows] == [
        ([2, 1], False),
        ([1, 1], False),
        ([1, 1], True),
    ]
    (pair,) = export_rows(store, project, "preference")
    assert (texts(pair["chosen"]), texts(pair["rejected"])) == ("0.1", "0.0")
    bad = export_rows(store, project, "unpaired")
    assert [(texts(row["completion"]), row["label"]) for row in bad] == [("0.0", False), ("0.1", False)]


def test_ratings_above_four_are_good_below_bad(store: Store) -> None:
    project = project_with(store, "rating", outputs=3)
    say(store, project, {"0.0": 3, "0.1": 4, "0.2": 5})  # overall 5, 4, 3
    rows = export_rows(store, project, "unpaired")
    assert [(texts(row["completion"]), row["label"], row["overall"]) for row in rows] == [
        ("0.0", True, 5),
        ("0.2", False, 3),
    ]
    (ranked,) = export_rows(store, project, "ranked")
    assert (ranked["ranks"], ranked["ratings"]) == ([1, 2, 3], [5, 4, 3])


def test_demonstrations_and_corrections_are_to_learn_from(store: Store) -> None:
    project = add_project(store, ProjectSettings("p", ("correction", "demonstration")))
    chat = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2 + 2?"},
    ]
    add_item(store, project, chat, outputs=[Output("five", "m")])
    who = add_labeler(store, "Ada")[0].id
    while task := next_task(store, who, project):
        submit(store, who, task.task_id, {"text": f"four ({task.kind})"}, order=task.order, seconds=1)
    rows = export_rows(store, project, "messages")
    said = [
        [*chat, {"role": "assistant", "content": f"four ({kind})"}]
        for kind in ("demonstration", "correction")
    ]
    assert [row["messages"] for row in rows] == said
    assert [row["task"] for row in rows] == ["demonstration", "correction"]
    assert [row["prompt"] for row in export_rows(store, project, "prompt-completion")] == [chat, chat]
    (pair,) = export_rows(store, project, "preference")
    assert (texts(pair["chosen"]), texts(pair["rejected"])) == ("four (correction)", "five")


def test_training_reads_what_is_exported(store: Store, tmp_path: Path) -> None:
    project = busy_project(store)
    for form in ("ranked", "preference", "unpaired"):
        write_export(store, project, form, tmp_path / f"{form}.jsonl")
    rows = export_rows(store, project, "ranked")
    read = read_rankings(tmp_path / "ranked.jsonl")
    assert [(r.ranks, r.order, r.labeler) for r in read] == [
        (row["ranks"], row.get("order"), row["labeler"]) for row in rows
    ]
    pairs = read_rankings(tmp_path / "preference.jsonl")
    assert len(pairs) == len(export_rows(store, project, "preference")) > 0
    assert all(pair.ranks == [1, 2] for pair in pairs)
    judged = read_judgements(tmp_path / "unpaired.jsonl")
    assert {one.label for one in judged} == {True, False}


def test_everything_is_in_answers(store: Store) -> None:
    project = project_with(store, "ranking", items=2)
    who = say(store, project, {"0.0": 1, "0.1": 2, "0.2": 3, "0.3": 4})
    task = next_task(store, who, project)
    assert task is not None
    skip(store, who, task.task_id, "no idea")
    first, second = export_rows(store, project, "answers")
    assert (first["state"], first["answer"]) == ("answered", {"ranks": [1, 2, 3, 4]})
    assert (second["state"], second["reason"]) == ("skipped", "no idea")
    assert first["at"].startswith("2023-11-14T22:")
    assert first["outputs"][1] == {"text": "0.1", "model": "model-1"}


def test_simulated_rows_say_so_in_every_form(store: Store) -> None:
    kinds = ("demonstration", "rating", "ranking", "pairwise", "correction")
    project = add_project(store, ProjectSettings("p", kinds))
    add_item(store, project, "x", outputs=[Output("a" * n, "m") for n in (1, 2, 3)], gold="aaaa")
    simulate(store, project, shorter, "shorter", noise=0)
    for form in FORMS:
        rows = export_rows(store, project, form)
        assert rows
        assert all(row["simulated"] is True and row["labeler"].startswith("simulated-") for row in rows)


def test_no_name_leaves_the_store(store: Store) -> None:
    project = busy_project(store)
    for form in FORMS:
        assert "person" not in jsonl(export_rows(store, project, form))


# --- splits ---------------------------------------------------------------------------------------


def test_all_rows_of_a_prompt_stay_together(store: Store, tmp_path: Path) -> None:
    project = project_with(store, "ranking", items=60, outputs=3, n=2)
    simulate(store, project, lambda prompt, output, gold: int(output[-1]), "last", labelers=2, noise=0.5)
    counts = write_export(
        store, project, "preference", tmp_path / "out", shares={"train": 0.8, "test": 0.2}, seed=3
    )
    parts = {
        name: [json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()]
        for name in ("train.jsonl", "test.jsonl")
    }
    assert counts == {name: len(rows) for name, rows in parts.items()}
    prompts = {name: {json.dumps(row["prompt"]) for row in rows} for name, rows in parts.items()}
    assert not prompts["train.jsonl"] & prompts["test.jsonl"]
    assert 4 <= len(prompts["test.jsonl"]) <= 20  # 12 of 60 expected; 3 standard deviations either way
    assert sum(counts.values()) == len(export_rows(store, project, "preference"))


def test_near_equal_prompts_are_one() -> None:
    def row(text: str) -> dict[str, object]:
        return {"prompt": [{"role": "user", "content": text}]}

    assert prompt_share(row("Say  hello\n")) == prompt_share(row("say hello"))
    assert prompt_share(row("say hello")) != prompt_share(row("say goodbye"))
    chat = {"messages": [*row("say hello")["prompt"], {"role": "assistant", "content": "x"}]}  # type: ignore[misc]
    assert prompt_share(chat) == prompt_share(row("say hello"))


@pytest.mark.parametrize("shares", [{}, {"train": 1.2, "test": -0.2}, {"train": 0.5}])
def test_shares_that_cannot_be(shares: dict[str, float]) -> None:
    with pytest.raises(UserError, match="make 1"):
        split_rows([], shares)


def test_nothing_is_overwritten(store: Store, tmp_path: Path) -> None:
    project = busy_project(store)
    for path, shares in ((tmp_path / "x.jsonl", None), (tmp_path / "x", {"train": 0.5, "test": 0.5})):
        write_export(store, project, "ranked", path, shares=shares)
        with pytest.raises(UserError, match="exists already"):
            write_export(store, project, "ranked", path, shares=shares)
        write_export(store, project, "ranked", path, shares=shares, overwrite=True)
    with pytest.raises(UserError, match="unknown form 'csv'"):
        export_rows(store, project, "csv")
    assert len(list_tasks(store, project)) > 0
