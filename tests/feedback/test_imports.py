from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fledge.errors import UserError
from fledge.feedback.agreement import figures
from fledge.feedback.exports import export_rows, jsonl
from fledge.feedback.forms import Kind, ProjectSettings
from fledge.feedback.imports import FORMATS, import_labels, read_labels
from fledge.feedback.labelling import next_task
from fledge.feedback.people import add_labeler, list_labelers
from fledge.feedback.store import Store, add_project, list_items

from .making import busy_project, new_store


def file_of(path: Path, *rows: Any) -> Path:
    """JSON Lines, or one JSON list if the name ends in .json."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, format: str, *rows: Any, buckets: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    return list(read_labels(file_of(path, *rows), format, buckets))


def said(row: dict[str, Any]) -> list[str]:
    return [turns[0]["content"] for turns in row["completions"]]


ASKED = [{"role": "user", "content": "Hello?"}]


# --- TRL's forms ----------------------------------------------------------------------------------


def test_trls_forms_in_both_spellings(tmp_path: Path) -> None:
    answer = [{"role": "assistant", "content": "Hi."}]
    rows = read(
        tmp_path / "x.jsonl",
        "trl",
        {"prompt": "Hello?", "completion": "Hi."},
        {"prompt": ASKED, "completion": answer},
        {"messages": ASKED + answer},
        {"prompt": "Hello?", "chosen": "Hi.", "rejected": "No."},
        {"prompt": ASKED, "completion": answer, "label": True},
        {
            "prompt": "Hello?",
            "completions": ["a", "b", "c"],
            "ranks": [2, 1, 2],
            "labeler": "L",
            "order": [2, 0, 1],
        },
    )
    assert [(row["prompt"], row["completion"]) for row in rows[:3]] == [(ASKED, answer)] * 3
    assert (said(rows[3]), rows[3]["ranks"]) == (["Hi.", "No."], [1, 2])
    assert (rows[4]["completion"], rows[4]["label"]) == (answer, True)
    assert (rows[5]["ranks"], rows[5]["labeler"], rows[5]["order"]) == ([2, 1, 2], "L", [2, 0, 1])


def test_an_export_comes_back_the_same(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    project = busy_project(store)
    for form, kind in (("ranked", "ranking"), ("prompt-completion", "demonstration")):
        rows = export_rows(store, project, form)
        path = tmp_path / f"{form}.jsonl"
        path.write_text(jsonl(rows))
        into = add_project(store, ProjectSettings(form, (kind,)))  # type: ignore[arg-type]
        assert import_labels(store, into, read_labels(path, "trl"), path.name).answers == len(rows)
        # rows of the same outputs are filed as one item, so their order among themselves may be another's
        again = export_rows(store, into, form)
        assert len(again) == len(rows)
        assert sorted(map(pairs_of, again)) == sorted(map(pairs_of, rows))


def pairs_of(row: dict[str, Any]) -> str:
    """What a row says, whatever the order of its completions."""
    if "ranks" in row:
        return json.dumps([row["prompt"], sorted(zip(said(row), row["ranks"], row["models"], strict=True))])
    return json.dumps([row["prompt"], row["completion"]])


# --- others' formats ------------------------------------------------------------------------------


def test_hh_rlhf(tmp_path: Path) -> None:
    begun = "\n\nHuman: Hello?\n\nAssistant: Hi, how can I help?\n\nHuman: A joke, please.\n\nAssistant:"
    (row,) = read(
        tmp_path / "hh.jsonl", "hh-rlhf", {"chosen": f"{begun} Knock knock.", "rejected": f"{begun} I can't."}
    )
    assert [turn["role"] for turn in row["prompt"]] == ["user", "assistant", "user"]
    assert row["prompt"][-1]["content"] == "A joke, please."
    assert (said(row), row["ranks"]) == (["Knock knock.", "I can't."], [1, 2])


def test_summarize_from_feedback(tmp_path: Path) -> None:
    info = {"id": "t3_1", "post": "My cat will not eat.", "title": "Cat", "subreddit": "r/pets"}
    summaries = [{"text": " Cat eats.", "policy": "ref"}, {"text": " Cat won't eat.", "policy": "sup4"}]
    reddit, news = read(
        tmp_path / "x.jsonl",
        "summarize-from-feedback",
        {"info": info, "summaries": summaries, "choice": 1, "worker": "w7", "split": "train"},
        {"info": {"article": "Rain fell."}, "summaries": summaries, "choice": 0, "worker": "w8"},
    )
    assert said(reddit) == ["Cat eats.", "Cat won't eat."]
    assert (reddit["ranks"], reddit["labeler"], reddit["models"]) == ([2, 1], "w7", ["ref", "sup4"])
    assert (
        reddit["prompt"][0]["content"] == "SUBREDDIT: r/pets\nTITLE: Cat\nPOST: My cat will not eat.\nTL;DR:"
    )
    assert (news["ranks"], news["prompt"][0]["content"]) == ([1, 2], "Rain fell.\n\nTL;DR:")


@pytest.mark.parametrize("name", ["u.jsonl", "u.json"])
def test_ultrafeedback(tmp_path: Path, name: str) -> None:
    completions = [
        {"model": "m1", "response": "a", "fine-grained_score": 3.5, "overall_score": 9.0},
        {"model": "m2", "response": "b", "fine-grained_score": 4.5, "overall_score": 1.0},
        {"model": "m3", "response": "c", "fine-grained_score": 3.5},
    ]
    (row,) = read(tmp_path / name, "ultrafeedback", {"instruction": "Hello?", "completions": completions})
    assert (said(row), row["ranks"], row["models"]) == (["a", "b", "c"], [2, 1, 2], ["m1", "m2", "m3"])
    assert row["simulated"] is True


ITEMS = [{"id": name, "title": "T", "body": f"body of {name}"} for name in ("x", "y", "z")]


def exported(value: Any, **more: Any) -> dict[str, Any]:
    result = [{"type": "ranker", "from_name": "rank", "to_name": "list", "value": {"ranker": value}}]
    annotation = {"id": 1, "completed_by": 4, "was_cancelled": False, "lead_time": 12.5, "result": result}
    return {"id": 9, "data": {"prompt": "Hello?", "items": ITEMS}, "annotations": [{**annotation, **more}]}


def test_label_studios_ranker(tmp_path: Path) -> None:
    for value in ({"rank": ["z", "x", "y"]}, ["z", "x", "y"]):
        (row,) = read(tmp_path / "ls.json", "label-studio", exported(value))
        assert (said(row)[0], row["ranks"]) == ("body of x", [2, 3, 1])
        assert (row["labeler"], row["seconds"]) == ("4", 12.5)


def test_label_studios_buckets_are_ties(tmp_path: Path) -> None:
    task = exported({"_": ["x"], "good": ["y"], "bad": ["z"]}, completed_by={"id": 5, "email": "a@b.c"})
    (row,) = read(tmp_path / "ls.json", "label-studio", task, buckets=("good", "_", "bad"))
    assert (row["ranks"], row["labeler"]) == ([2, 1, 3], "5")
    task = exported({"good": ["y", "x"], "bad": ["z"]})
    (row,) = read(tmp_path / "ls.json", "label-studio", task, buckets=("good", "bad"))
    assert row["ranks"] == [1, 1, 3]
    assert read(tmp_path / "ls.json", "label-studio", exported(["x"], was_cancelled=True)) == []


@pytest.mark.parametrize(
    ("format", "row", "words"),
    [
        ("trl", {"prompt": "x"}, "no preference"),
        ("trl", {"messages": ASKED}, "a prompt is a text or a list"),
        ("trl", {"prompt": "x", "completion": 5}, "must be one text"),
        ("hh-rlhf", {"chosen": "x", "rejected": "y"}, "does not begin with"),
        ("hh-rlhf", {"chosen": "\n\nHuman: x"}, "no 'rejected'"),
        ("summarize-from-feedback", {"info": {}, "summary": {}}, "only comparisons"),
        ("summarize-from-feedback", {"info": {}, "summaries": [], "choice": 0}, "two summaries"),
        ("ultrafeedback", {"instruction": "x", "completions": [{"response": "y"}]}, "needs a number"),
        ("ultrafeedback", {"instruction": "x"}, "no 'completions'"),
        ("label-studio", {"data": {"prompt": "x"}, "annotations": []}, "one list of objects"),
        ("label-studio", exported(["x", "y"]), "ranks 2 ids, the list has 3"),
        ("label-studio", exported({"good": ["x"], "bad": ["y", "z"]}), "name all from best to worst"),
        ("label-studio", exported("x"), "neither a list"),
    ],
)
def test_a_broken_row_is_named(tmp_path: Path, format: str, row: dict[str, Any], words: str) -> None:
    path = tmp_path / ("x.json" if format == "label-studio" else "x.jsonl")
    with pytest.raises(UserError, match=words) as error:
        read(path, format, row)
    assert str(error.value).startswith(str(path))


def test_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=", ".join(FORMATS)):
        read(tmp_path / "x.jsonl", "csv")


# --- into a store ---------------------------------------------------------------------------------


def ranked(labeler: str, best_first: str, **more: Any) -> dict[str, Any]:
    """A ranking of a, b, c; the file lists them from the best to the worst."""
    return {
        "prompt": "Hello?",
        "completions": list(best_first),
        "ranks": [1, 2, 3],
        "labeler": labeler,
        **more,
    }


def project_of(store: Store, kind: Kind = "ranking", n: int = 1) -> int:
    return add_project(store, ProjectSettings("imported", (kind,), labelers_per_item=n))


def test_labelers_of_the_same_outputs_share_an_item(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    project = project_of(store, n=3)
    rows = [ranked("L1", "abc"), ranked("L2", "cab", order=[2, 0, 1]), ranked("L1", "bac")]
    path = file_of(tmp_path / "x.jsonl", *rows)
    assert import_labels(store, project, read_labels(path, "trl"), "x.jsonl").answers == 3
    first, second = list_items(store, project)  # L1 ranked twice: the second time is an item of its own
    assert [output.text for output in first.outputs] == ["a", "b", "c"]
    out = export_rows(store, project, "ranked")
    assert [row["ranks"] for row in out] == [[1, 2, 3], [2, 3, 1], [1, 2, 3]]
    assert [row.get("order") for row in out] == [None, [1, 2, 0], None]  # shown were b, c, a
    (agreement,) = figures(store, project).agreement
    assert (agreement.units, agreement.percent) == (3, pytest.approx(1 / 3))  # only a above b alike
    assert {one.name for one in list_labelers(store) if one.imported} == {"L1", "L2"}
    ada = add_labeler(store, "Ada")[0].id
    task = next_task(store, ada, project)  # people fill the slots that are left
    assert task is not None
    assert task.item_id in (first.id, second.id)


def test_all_or_nothing(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    project = project_of(store)
    for bad, words in (
        ({"prompt": "x", "completion": "y", "label": True}, "label 2: good or bad is no task"),
        ({"prompt": "x", "completion": "y"}, "label 2: project imported has no task kind demonstration"),
        ({"prompt": "x", "completions": list("abcdefghij"), "ranks": [1] * 10}, "10 completions"),
    ):
        path = file_of(tmp_path / "x.jsonl", ranked("L", "abc"), bad)
        with pytest.raises(UserError, match=words):
            import_labels(store, project, read_labels(path, "trl"), "x.jsonl")
    assert list_items(store, project) == []
    assert list_labelers(store) == []


def test_what_does_not_fit_can_be_left_out(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    project = project_of(store)
    two_turns = [{"role": "assistant", "content": "x"}] * 2
    bad = {"prompt": "x", "completions": [two_turns, two_turns], "ranks": [1, 2], "labeler": "nobody"}
    path = file_of(tmp_path / "x.jsonl", ranked("L", "abc"), bad, ranked("M", "abc"))
    done = import_labels(store, project, read_labels(path, "trl"), "x.jsonl", skip_unfit=True)
    assert done.answers == 2
    assert done.left_out == [
        "x.jsonl: label 2: a completion must be one text, or one message of the assistant"
    ]
    assert [one.name for one in list_labelers(store)] == ["L", "M"]


def test_simulated_stays_simulated(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    project = project_of(store)
    path = file_of(tmp_path / "x.jsonl", ranked("rule", "abc", simulated=True))
    import_labels(store, project, read_labels(path, "trl"), "x.jsonl")
    (row,) = export_rows(store, project, "ranked")
    assert row["simulated"] is True
    assert next_task(store, add_labeler(store, "Ada")[0].id, project) is not None  # a rule fills no slot
