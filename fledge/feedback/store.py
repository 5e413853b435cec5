"""The store of a labelling project: append-only events, and tables derived from them.

Any number of processes and threads may share one store: writers take turns, readers never wait (SQLite in
WAL mode, or PostgreSQL). What a person gave is safe once the function that took it has returned; before that,
a crash loses at most the draft.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sql
from sqlalchemy import Connection

from fledge.errors import UserError
from fledge.feedback import state
from fledge.feedback.database import connect, items, prefills, projects, tasks, writing
from fledge.feedback.events import append
from fledge.feedback.forms import (
    Answer,
    Message,
    ProjectSettings,
    check_answer,
    check_prompt,
    check_settings,
    check_text,
)
from fledge.feedback.records import Item, Output, Project
from fledge.feedback.state import item_of, project_of

RESERVED_SECONDS = 30 * 60
"""How long a task stays reserved for a labeler who neither answers nor types."""


class Store:
    """An open database. `clock` gives Unix seconds (tests pass their own)."""

    def __init__(
        self, url: str, clock: Callable[[], float] = time.time, reserved_seconds: float = RESERVED_SECONDS
    ) -> None:
        """Open a store, and make or upgrade it where needed.

        `url`: a file name, `sqlite:///FILE`, or `postgresql://USER:PASSWORD@HOST/NAME`. Raises UserError
        if it cannot be opened, or belongs to a newer fledge.
        """
        self.clock = clock
        self.reserved_seconds = reserved_seconds
        self.engine = connect(url)

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection that sees one moment of the store."""
        with self.engine.connect() as connection:
            if connection.dialect.name == "postgresql":  # else each statement would see a moment of its own
                connection = connection.execution_options(isolation_level="REPEATABLE READ")
            with connection.begin():
                yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that no other writer overlaps: all of it happens, or nothing."""
        with writing(self.engine) as connection:
            yield connection

    def append(
        self,
        connection: Connection,
        kind: str,
        body: dict[str, Any],
        labeler_id: int | None = None,
        key: str | None = None,
    ) -> int:
        """Record an event and bring the derived tables up to date; its id. Inside `writing()` only."""
        event = append(connection, kind, body, self.clock(), labeler_id, key)
        state.apply(connection, event)
        return event.id

    def rebuild(self) -> int:
        """Make every derived table anew from the events alone; how many events there were."""
        with self.writing() as connection:
            return state.rebuild(connection)


# --- projects -------------------------------------------------------------------------------------


def add_project(store: Store, settings: ProjectSettings) -> int:
    """Begin a project; its id. UserError for settings that cannot be, or a name that is taken."""
    check_settings(settings)
    with store.writing() as connection:
        if any(found.settings.name == settings.name for found in _projects(connection)):
            raise UserError(f"project {settings.name}: exists already; choose another name")
        return store.append(connection, "project_added", {"settings": state.settings_to_json(settings)})


def edit_project(
    store: Store,
    project_id: int,
    *,
    instructions: str | None = None,
    labelers_per_item: int | None = None,
    prefill: bool | None = None,
    by: int | None = None,
) -> None:
    """Change what may change in a running project; `by` is the admin's labeler id."""
    changes = {"instructions": instructions, "labelers_per_item": labelers_per_item, "prefill": prefill}
    changes = {name: value for name, value in changes.items() if value is not None}
    if instructions is not None:
        check_text(instructions, "instructions")
    if labelers_per_item is not None and labelers_per_item < 1:
        raise UserError(f"labelers_per_item is {labelers_per_item}; at least 1")
    with store.writing() as connection:
        project_of(connection, project_id)
        body = {"project_id": project_id, "changes": changes}
        store.append(connection, "project_edited", body, labeler_id=by)


def get_project(store: Store, project_id: int) -> Project:
    """One project; UserError if there is none with this id."""
    with store.reading() as connection:
        return project_of(connection, project_id)


def list_projects(store: Store) -> list[Project]:
    """All projects, oldest first."""
    with store.reading() as connection:
        return _projects(connection)


def _projects(connection: Connection) -> list[Project]:
    ids = connection.scalars(sql.select(projects.c.id).order_by(projects.c.id)).all()
    return [project_of(connection, project_id) for project_id in ids]


# --- items ----------------------------------------------------------------------------------------


def add_item(
    store: Store,
    project_id: int,
    prompt: str | Sequence[Message],
    *,
    outputs: Sequence[Output] | None = None,
    gold: str | None = None,
    source: str | None = None,
) -> int:
    """Add a prompt; its item id. Without `outputs` it waits for them (demonstrations wait for nothing)."""
    return add_items(store, project_id, [(prompt, outputs, gold, source)])[0]


def add_items(
    store: Store,
    project_id: int,
    rows: Iterable[tuple[str | Sequence[Message], Sequence[Output] | None, str | None, str | None]],
) -> list[int]:
    """Add many prompts at once: (prompt, outputs or None, gold or None, source or None); their ids."""
    ids = []
    with store.writing() as connection:
        project = project_of(connection, project_id)
        for prompt, outputs, gold, source in rows:
            body = {"project_id": project_id, "prompt": check_prompt(prompt), "gold": gold, "source": source}
            ids.append(store.append(connection, "item_added", body))
            if outputs is not None:
                _add_outputs(store, connection, project, ids[-1], outputs)
    return ids


def waiting_items(store: Store, project_id: int, limit: int | None = None) -> list[Item]:
    """Items that have no outputs yet, oldest first: what the background job works through."""
    query = sql.select(items.c.id).where(items.c.project_id == project_id, items.c.state == "waiting")
    with store.reading() as connection:
        ids = connection.scalars(query.order_by(items.c.id).limit(limit)).all()
        return [item_of(connection, item_id) for item_id in ids]


def list_items(store: Store, project_id: int) -> list[Item]:
    """All items of a project, oldest first."""
    with store.reading() as connection:
        query = sql.select(items.c.id).where(items.c.project_id == project_id).order_by(items.c.id)
        return [item_of(connection, item_id) for item_id in connection.scalars(query).all()]


def get_item(store: Store, item_id: int) -> Item:
    """One item; UserError if there is none with this id."""
    with store.reading() as connection:
        return item_of(connection, item_id)


def add_outputs(store: Store, item_id: int, outputs: Sequence[Output]) -> None:
    """Give an item its outputs: from now on people get it. UserError if it has some already."""
    with store.writing() as connection:
        project = project_of(connection, item_of(connection, item_id).project_id)
        _add_outputs(store, connection, project, item_id, outputs)


def _add_outputs(
    store: Store, connection: Connection, project: Project, item_id: int, outputs: Sequence[Output]
) -> None:
    if item_of(connection, item_id).outputs:
        raise UserError(f"item {item_id}: it has its outputs already")
    least = 2 if {"ranking", "pairwise"} & set(project.settings.kinds) else 1
    if not least <= len(outputs) <= 9:
        raise UserError(f"item {item_id}: {len(outputs)} outputs; this project needs {least} to 9")
    body = {"item_id": item_id, "outputs": [{"text": o.text, "model": o.model} for o in outputs]}
    store.append(connection, "outputs_added", body)


def fail_item(store: Store, item_id: int, reason: str) -> None:
    """Record that no outputs could be made; `add_outputs` may still give some later."""
    with store.writing() as connection:
        item_of(connection, item_id)
        store.append(connection, "item_failed", {"item_id": item_id, "reason": reason})


def list_tasks(store: Store, project_id: int) -> list[state.Task]:
    """All tasks of a project, in the order people get them: what a judge works through."""
    with store.reading() as connection:
        query = sql.select(tasks).where(tasks.c.project_id == project_id).order_by(tasks.c.id)
        return [state.task_from(row) for row in connection.execute(query)]


def add_prefill(store: Store, task_id: int, answer: Answer, judge: str) -> None:
    """Store a judge's answer to a task (in the item's order); the newest counts.

    People see it only where the project's `prefill` is on.
    """
    with store.writing() as connection:
        task = state.task_of(connection, task_id)
        item = item_of(connection, task.item_id)
        settings = project_of(connection, item.project_id).settings
        texts = [item.outputs[place].text for place in task.outputs]
        checked = check_answer(task.kind, answer, texts, settings.questions)
        store.append(connection, "prefilled", {"task_id": task_id, "answer": checked, "judge": judge})


def prefill_count(store: Store, project_id: int) -> int:
    """How many tasks of a project have a judge's answer."""
    of_project = sql.select(tasks.c.id).where(tasks.c.project_id == project_id)
    query = sql.select(sql.func.count()).where(prefills.c.task_id.in_(of_project))
    with store.reading() as connection:
        return int(connection.scalar(query) or 0)
