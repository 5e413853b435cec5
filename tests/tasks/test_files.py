"""A task's files: drawn from a seed, split for good, written whole, readable by the stages they are for."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fledge.data.conversations import read_conversations
from fledge.data.prompts import read_prompts
from fledge.data.sources import Source, read_documents
from fledge.errors import UserError
from fledge.rewards.verifiers import verifier
from fledge.tasks.addition import addition_task
from fledge.tasks.files import Task, draw, is_test, write_task
from fledge.tokenizer.bpe import train_bpe

from .made import TASKS


@pytest.fixture(params=TASKS)
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


def test_the_same_seed_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    first = write_task(tmp_path / "a", TASKS[name](0))
    assert write_task(tmp_path / "b", TASKS[name](0)) == first
    assert write_task(tmp_path / "c", TASKS[name](1))["fingerprint"] != first["fingerprint"]


def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    """Whatever the order in which its sets come."""
    program = (
        "import sys; from pathlib import Path; from fledge.tasks.files import write_task\n"
        "from tests.tasks.made import TASKS\n"
        "for name, task in TASKS.items(): print(write_task(Path(sys.argv[1]) / name, task(0))['fingerprint'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "theirs")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        cwd=Path(__file__).parents[2],
        check=True,
    )
    ours = [write_task(tmp_path / name, task(0))["fingerprint"] for name, task in TASKS.items()]
    assert done.stdout.split() == ours


def test_the_stages_read_the_files(name: str, tmp_path: Path) -> None:
    task = TASKS[name](0)
    manifest = write_task(tmp_path / "task", task)
    assert json.loads((tmp_path / "task/manifest.json").read_text()) == manifest
    documents = list(read_documents(Source("text", str(tmp_path / "task/text.jsonl"), 1.0)))
    assert documents == [row["text"] for row in task.text]
    tokenizer = train_bpe(documents, 270)
    chats = read_conversations(tmp_path / "task/sft.jsonl", tokenizer, max_tokens=700, cut_overlong=False)
    assert (len(chats.ids), chats.overlong) == (manifest["rows"]["sft.jsonl"], 0)
    for file, rows in (("prompts", task.prompts), ("test", task.test)):
        prompts = read_prompts(tmp_path / f"task/{file}.jsonl")
        assert [prompt.row for prompt in prompts] == rows
        assert [prompt.messages[0]["content"] for prompt in prompts] == [row["prompt"] for row in rows]


def prompts_of(rows: list[dict[str, Any]]) -> set[str]:
    """Problems as text, with numbers in order."""
    asked = [row["prompt"] if "prompt" in row else row["messages"][0]["content"] for row in rows]
    return {"|".join(sorted(text.replace("+", " ").replace("=", "").split())) for text in asked}


@pytest.mark.parametrize("other_seed", [0, 1, 2])
def test_no_test_problem_is_in_a_training_file_of_any_seed(name: str, other_seed: int) -> None:
    tests = prompts_of(TASKS[name](0).test)
    other = TASKS[name](other_seed)
    assert len(tests) == 50
    assert not tests & prompts_of(other.prompts)
    assert not tests & prompts_of(other.sft)
    texts = [{"prompt": line} for row in other.text for line in row["text"].split("\n")]
    assert not tests & prompts_of(texts)


def test_prompts_are_different_problems(name: str) -> None:
    task = TASKS[name](0)
    assert len(prompts_of(task.prompts)) == len(task.prompts) == 200


def test_worked_examples_earn_the_reward(name: str) -> None:
    """But for the recorded games: their player is weak."""
    task = TASKS[name](0)
    if name != "tictactoe":
        verify = verifier(task.reward)
        rows = {row["prompt"]: row for row in _gold_of(name, task)}
        for line in task.sft:
            asked, said = (message["content"] for message in line["messages"])
            assert verify(said, rows[asked]) == 1.0


def _gold_of(name: str, task: Task) -> list[dict[str, Any]]:
    """Rows for the worked examples, from what is asked alone."""
    found = []
    for line in task.sft:
        asked = line["messages"][0]["content"]
        if name == "addition":
            a, b = asked.rstrip("=").split("+")
            found.append({"prompt": asked, "answer": str(int(a) + int(b))[::-1]})
        else:
            target, numbers = asked.split(" from ")
            row = {"prompt": asked, "target": int(target), "numbers": list(map(int, numbers.split()))}
            found.append(row)
    return found


def test_about_a_tenth_of_all_problems_is_for_tests() -> None:
    """Five standard deviations of a binomial of 20,000 draws are 0.011."""
    assert sum(map(is_test, range(20_000))) / 20_000 == pytest.approx(0.1, abs=0.011)


def test_asking_for_more_problems_than_there_are_is_an_error() -> None:
    with pytest.raises(UserError, match="only 6 different problems for prompts"):
        draw("prompts", 0, 7, lambda rng: rng.randint(1, 6), lambda number: number)
    with pytest.raises(UserError, match="ask for fewer"):
        addition_task(0, train=100, test=1, starter=1, text=1, digits=1)


def test_a_draw_of_fewer_is_the_beginning_of_one_of_more() -> None:
    def make(rng: random.Random) -> int:
        return rng.randint(1, 10**6)

    assert draw("a", 0, 5, make, int) == draw("a", 0, 50, make, int)[:5]
    assert draw("a", 0, 5, make, int) != draw("b", 0, 5, make, int)


def test_what_is_there_is_replaced_only_when_asked_and_only_a_task(tmp_path: Path) -> None:
    task = TASKS["addition"](0)
    write_task(tmp_path / "task", task)
    with pytest.raises(UserError, match="exists already"):
        write_task(tmp_path / "task", task)
    write_task(tmp_path / "task", TASKS["tictactoe"](0), overwrite=True)
    assert json.loads((tmp_path / "task/manifest.json").read_text())["task"] == "tictactoe"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no task"):
        write_task(tmp_path / "notes", task, overwrite=True)
    assert (tmp_path / "notes/mine.txt").read_text() == "mine"
