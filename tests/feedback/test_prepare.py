"""Prompt files, and outputs made in the background."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fledge.engine.remote import EndpointError
from fledge.engine.text import TextCompletion
from fledge.errors import UserError
from fledge.feedback.forms import Kind, ProjectSettings
from fledge.feedback.prepare import (
    GIVEN,
    Preparation,
    Writer,
    add_prompts,
    judge_rule,
    read_prompts,
    write_outputs,
)
from fledge.feedback.records import Item, Output
from fledge.feedback.store import Store, add_item, add_project, list_items, list_tasks
from fledge.types import Message, SamplingParams


class Scripted:
    """A chat model that says what a function of (prompt, seed, number) says."""

    def __init__(self, say: Callable[[str, int, int], str]) -> None:
        self.say = say
        self.batches: list[tuple[int, SamplingParams]] = []

    def replies(
        self, conversations: Sequence[Sequence[Message]], params: SamplingParams
    ) -> list[TextCompletion]:
        self.batches.append((len(conversations), params))
        return [
            TextCompletion(self.say(str(messages[-1]["content"]), params.seed, number), [], [], "stop")
            for messages in conversations
            for number in range(params.n)
        ]

    def stream(self, messages: Sequence[Message], params: SamplingParams) -> Iterator[str]:
        raise NotImplementedError


def different(prompt: str, seed: int, number: int) -> str:
    return f"{prompt} {seed} {number}"


def items_of(number: int) -> list[Item]:
    return [Item(10 + i, 1, [{"role": "user", "content": f"p{i}"}], "waiting") for i in range(number)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(str(tmp_path / "labels.db"))
    yield store
    store.close()


def project(store: Store, prompts: int, **settings: Any) -> int:
    project_id = add_project(store, ProjectSettings("p", **settings))
    for number in range(prompts):
        add_item(store, project_id, f"prompt {number}")
    return project_id


# --- prompt files ---------------------------------------------------------------------------------


def rows_of(tmp_path: Path, *rows: Any, kinds: tuple[Kind, ...] = ("ranking",)) -> list[Any]:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return [row[:3] for row in read_prompts(path, kinds)]


def test_rows_of_a_prompt_file(tmp_path: Path) -> None:
    user, assistant = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    given = [Output("a", GIVEN), Output("b", "m")]
    rows = rows_of(
        tmp_path, {"prompt": "Hi"}, {"prompt": [user]}, {"messages": [user, assistant], "other": 1},
        {"prompt": "Hi", "completions": ["a", {"text": "b", "model": "m"}], "gold": "g"},
    )  # fmt: skip
    plain = ([user], None, None)
    assert rows == [plain, plain, ([user], None, "Hello"), ([user], given, "g")]
    chat = {"messages": [user, assistant]}
    assert rows_of(tmp_path, chat, kinds=("correction",)) == [([user], [Output("Hello", GIVEN)], None)]


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"prompt": ""},
        {"prompt": 3},
        {"prompt": []},
        {"prompt": "a", "completions": []},
        {"prompt": "a", "completions": [3]},
        {"prompt": "a", "gold": 3},
        {"messages": [{"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]},
        {"prompt": ["a"]},
        {"prompt": "a", "completions": ["one"]},
        {"prompt": "a", "completions": ["many"] * 10},
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: Any) -> None:
    with pytest.raises(UserError, match=r"prompts\.jsonl:2") as error:
        rows_of(tmp_path, {"prompt": "good"}, row)
    assert "\n" not in str(error.value)


def test_rows_are_added_once(store: Store) -> None:
    project_id = project(store, 0)
    rows = [([{"role": "user", "content": text}], None, None, f"f:{text}") for text in "ab"]
    assert add_prompts(store, project_id, rows[:1]) == 1
    assert add_prompts(store, project_id, rows) == 1
    moved = [(prompt, outputs, gold, f"g:{where}") for prompt, outputs, gold, where in rows]
    assert add_prompts(store, project_id, moved) == 0  # other lines, another name of the file
    assert add_prompts(store, project_id, [*moved, moved[0]]) == 1  # as often as the file asks it
    assert len(list_items(store, project_id)) == 3


# --- outputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wanted", "writers"), [(4, 1), (4, 2), (5, 2), (9, 4), (4, 3), (2, 3)])
def test_writers_share_the_outputs(wanted: int, writers: int) -> None:
    made = [Writer(f"m{i}", Scripted(lambda *asked, i=i: f"{i} {asked}")) for i in range(writers)]
    counts = {writer.name: 0 for writer in made}
    for outputs in write_outputs(made, items_of(12), wanted, SamplingParams()):
        assert len({output.text for output in outputs}) == wanted
        each = [sum(output.model == writer.name for output in outputs) for writer in made]
        assert max(each) - min(each) <= 1
        for writer, number in zip(made, each, strict=True):
            counts[writer.name] += number
    assert len(set(counts.values())) == 1  # over 12 prompts, the rest is shared too


def test_what_was_said_already_or_is_empty_is_asked_anew() -> None:
    def say(prompt: str, seed: int, number: int) -> str:
        return ["same", " same\n", "", f"new {seed}"][number % 4]

    chat = Scripted(say)
    (outputs,) = write_outputs([Writer("m", chat)], items_of(1), 4, SamplingParams())
    assert [output.text.split()[0] for output in outputs] == ["same", "new"]
    assert len({params.seed for _, params in chat.batches}) == len(chat.batches) > 1
    chat = Scripted(say)
    write_outputs([Writer("m", chat)], items_of(1), 4, SamplingParams(temperature=0))
    assert len(chat.batches) == 1  # it would only say the same


def test_labelling_begins_before_the_last_prompt_is_ready(store: Store) -> None:
    from fledge.feedback.labelling import next_task
    from fledge.feedback.people import add_labeler

    project_id = project(store, 20)
    ann = add_labeler(store, "ann")[0].id
    first, go_on = threading.Event(), threading.Event()

    def report(done: int, total: int) -> None:
        assert (total, done % 8 in (0, 4)) == (20, True)
        first.set()
        go_on.wait(30)

    preparation = Preparation(store, project_id, [Writer("m", Scripted(different))], SamplingParams(), report)
    preparation.start()
    assert first.wait(30)
    assert preparation.status() == {"running": True, "error": None}
    assert next_task(store, ann, project_id) is not None
    assert 0 < len(list_tasks(store, project_id)) < 20
    go_on.set()
    preparation.stop(30)
    assert preparation.status()["running"] is False


def test_a_stopped_preparation_goes_on_later(store: Store) -> None:
    project_id = project(store, 20)
    writer = Writer("m", Scripted(different))
    stopping = Preparation(store, project_id, [writer], SamplingParams(), lambda done, total: stopping.stop())
    stopping.run()
    assert len(list_tasks(store, project_id)) == 8
    Preparation(store, project_id, [writer], SamplingParams()).run()
    assert len(list_tasks(store, project_id)) == 20


def test_a_prompt_at_fault_fails_alone(store: Store) -> None:
    def say(prompt: str, seed: int, number: int) -> str:
        if prompt == "prompt 3":
            raise UserError("the prompt is too long")
        return "always the same" if prompt == "prompt 5" else different(prompt, seed, number)

    project_id = project(store, 8)
    Preparation(store, project_id, [Writer("m", Scripted(say))], SamplingParams()).run()
    items = list_items(store, project_id)
    assert [item.state for item in items] == ["ready"] * 3 + ["failed", "ready", "failed"] + ["ready"] * 2
    assert items[3].error == "the prompt is too long"
    assert items[5].error == "the models gave only 1 different outputs"


def test_an_endpoint_that_is_down_fails_no_prompt(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    def say(prompt: str, seed: int, number: int) -> str:
        raise EndpointError("http://x: refused")

    project_id = project(store, 3)
    preparation = Preparation(store, project_id, [Writer("m", Scripted(say))], SamplingParams())
    preparation.start()
    preparation.wait(30)
    assert preparation.status() == {"running": False, "error": "http://x: refused"}
    assert {item.state for item in list_items(store, project_id)} == {"waiting"}
    assert "refused" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "score"), [("7", 7.0), ("Rating: 2/7", 2.0), ("10", 4.0), ("", 4.0), ("good", 4.0)]
)
def test_a_judge_gives_the_number_it_says(said: str, score: float) -> None:
    asked: list[str] = []

    def say(prompt: str, seed: int, number: int) -> str:
        asked.append(prompt)
        return said

    assert judge_rule(Scripted(say))([{"role": "user", "content": "Why?"}], "Because.", None) == score
    assert "user: Why?\nassistant: Because." in asked[0]
