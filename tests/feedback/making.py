"""What the tests of the store share: projects with people and answers in them."""

from __future__ import annotations

import random
from pathlib import Path

from fledge.feedback.forms import QUESTION_KEYS, Answer, Kind, ProjectSettings
from fledge.feedback.labelling import flag, next_task, save_draft, skip, submit, write_prompt
from fledge.feedback.people import add_labeler
from fledge.feedback.records import Assignment, Output
from fledge.feedback.store import Store, add_item, add_project

NASTY = "<script>alert(1)</script> \x00 \ud800 𝄞 ' \" \\ \u2028 %s"


class Clock:
    """A clock that goes on by itself, one second a look."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def new_store(path: Path) -> Store:
    return Store(str(path / "labels.db"), clock=Clock())


def project_with(
    store: Store, *kinds: Kind, items: int = 1, outputs: int = 4, name: str = "p", n: int = 1
) -> int:
    """A project whose item i has the outputs "i.0", "i.1", ... by model-0, model-1, ..."""
    project = add_project(store, ProjectSettings(name, kinds, labelers_per_item=n))
    for i in range(items):
        made = [Output(f"{i}.{j}", f"model-{j}") for j in range(outputs)]
        add_item(store, project, f"prompt {i}", outputs=made)
    return project


def any_answer(rng: random.Random, task: Assignment) -> Answer:
    """A valid answer to a task, drawn at random."""
    count = len(task.outputs)
    if task.kind == "ranking":
        return {"ranks": [rng.randint(1, count) for _ in range(count)]}
    if task.kind == "rating":
        return {
            "ratings": [
                {
                    "overall": rng.randint(1, 7),
                    "questions": {key: rng.choice([True, False, None]) for key in QUESTION_KEYS},
                }
                for _ in range(count)
            ]
        }
    if task.kind == "pairwise":
        return {"choice": rng.choice(["a", "b", "tie", "both_bad"])}
    return {"text": f"{NASTY} {rng.random()}"}


def busy_project(store: Store, seed: int = 0) -> int:
    """Three people at work on every kind of task, with skips, flags, drafts, edits, own prompts."""
    rng = random.Random(seed)
    kinds: tuple[Kind, ...] = ("demonstration", "rating", "ranking", "pairwise", "correction")
    project = add_project(store, ProjectSettings(f"busy {seed}", kinds, labelers_per_item=2))
    for i in range(3):
        made = [Output(f"{NASTY} {i}.{j}", f"model-{j}") for j in range(3)]
        add_item(store, project, f"{NASTY} prompt {i}", outputs=made, gold=f"gold {i}")
    people = [add_labeler(store, f"person {i}")[0].id for i in range(3)]
    left = set(people)
    while left:
        person = rng.choice(sorted(left))
        task = next_task(store, person, project)
        if task is None:
            left.discard(person)
            continue
        what = rng.random()
        if what < 0.1:
            skip(store, person, task.task_id, f"no idea {NASTY}", seconds=rng.random())
            continue
        if what < 0.2:
            flag(store, person, task.task_id, NASTY)
        if what < 0.3:
            save_draft(store, person, task.task_id, {"half": NASTY}, 1.5)
            continue
        for _ in range(1 + (what < 0.5)):
            answer = any_answer(rng, task)
            submit(store, person, task.task_id, answer, order=task.order, seconds=rng.random() * 60)
        if what > 0.95:
            write_prompt(store, person, project, f"own {NASTY}", "the answer", seconds=3)
    return project
