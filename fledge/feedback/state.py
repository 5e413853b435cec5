"""The derived tables: what each event changes in them, and how rows are read back.

`apply` is the only place that writes derived tables, for a live event and for a rebuild alike: so both end in
the same state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from typing import Any

import sqlalchemy as sql
from sqlalchemy import Connection, Row

from fledge.errors import UserError
from fledge.feedback.database import DERIVED, answers, flags, items, labelers, prefills, projects, tasks
from fledge.feedback.events import PURGED, Event, pack, read_events, unpack
from fledge.feedback.forms import Kind, ProjectSettings
from fledge.feedback.records import Item, Labeler, Output, Project, StoredAnswer

TASKS_PER_ITEM = 1000
"""A task's id is its item's id times this, plus its place: 9 outputs make 36 pairs and 11 other tasks."""


@dataclass(frozen=True)
class Task:
    """One question to n labelers: some outputs of one item (by their places in it)."""

    id: int
    item_id: int
    project_id: int
    kind: Kind
    outputs: tuple[int, ...]


def stable_order(places: Sequence[int], *key: object) -> tuple[int, ...]:
    """The places in an order drawn by hash: the same for the same key, on every machine."""

    def draw(place: int) -> bytes:
        return hashlib.sha256("/".join(map(str, (*key, place))).encode()).digest()

    return tuple(sorted(places, key=draw))


def settings_to_json(settings: ProjectSettings) -> dict[str, Any]:
    """Settings as they stand in an event."""
    return asdict(settings)


def settings_from_json(value: dict[str, Any]) -> ProjectSettings:
    """Settings of an event; those that a later fledge added get their defaults."""
    names = {field.name for field in fields(ProjectSettings)}
    known: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in value.items() if name in names
    }
    return ProjectSettings(**known)


# --- events -> tables -----------------------------------------------------------------------------


def rebuild(connection: Connection) -> int:
    """Empty the derived tables and fill them again from the events; how many events there were."""
    for table in DERIVED:
        connection.execute(sql.delete(table))
    number = 0
    for event in read_events(connection):
        apply(connection, event)
        number += 1
    return number


def apply(connection: Connection, event: Event) -> None:
    """Change the derived tables as an event says."""
    body = event.body
    if body == PURGED and event.kind != "labeler_added":
        return
    match event.kind:
        case "project_added":
            _save_project(connection, event.id, settings_from_json(body["settings"]), new=True)
        case "project_edited":
            old = project_of(connection, body["project_id"]).settings
            _save_project(connection, body["project_id"], ProjectSettings(**{**vars(old), **body["changes"]}))
        case "item_added":
            _add_item(connection, event)
        case "outputs_added":
            _add_outputs(connection, body["item_id"], body["outputs"])
        case "item_failed":
            _change_item(connection, body["item_id"], "failed", {"error": body["reason"]})
        case "prefilled":
            row = {"answer": body["answer"], "judge": body["judge"]}
            connection.execute(sql.delete(prefills).where(prefills.c.task_id == body["task_id"]))
            connection.execute(sql.insert(prefills).values(task_id=body["task_id"], body=pack(row)))
        case "labeler_added":
            _add_labeler(connection, event)
        case "labeler_token_renewed":
            of_labeler = sql.update(labelers).where(labelers.c.id == event.labeler_id)
            connection.execute(of_labeler.values(token_hash=body["token_hash"]))
            _change_labeler(connection, event.labeler_id, {"revoked": False})
        case "labeler_revoked":
            _change_labeler(connection, body["labeler_id"], {"revoked": True})
        case "labeler_purged":
            _purge(connection, body["labeler_id"])
        case "answered" | "skipped":
            _record(connection, event, body["task_id"], event.kind)
        case "flagged":
            values = {"event_id": event.id, "task_id": body["task_id"], "labeler_id": event.labeler_id}
            row = {"reason": body["reason"], "at": event.at}
            connection.execute(sql.insert(flags).values(**values, body=pack(row)))
        case "prompt_written":
            _add_written_prompt(connection, event)
        case kind:
            raise ValueError(f"event {event.id}: unknown kind {kind!r}")


def _save_project(
    connection: Connection, project_id: int, settings: ProjectSettings, new: bool = False
) -> None:
    values = {"labelers_per_item": settings.labelers_per_item, "settings": pack(settings_to_json(settings))}
    if new:
        connection.execute(sql.insert(projects).values(id=project_id, **values))
    else:
        connection.execute(sql.update(projects).where(projects.c.id == project_id).values(**values))


def _add_item(connection: Connection, event: Event) -> None:
    body = event.body
    kinds = project_of(connection, body["project_id"]).settings.kinds
    state = "ready" if kinds == ("demonstration",) else "waiting"
    row = {"prompt": body["prompt"], "gold": body["gold"], "source": body["source"]}
    values = {"id": event.id, "project_id": body["project_id"], "state": state, "body": pack(row)}
    connection.execute(sql.insert(items).values(**values))
    if "demonstration" in kinds:
        _add_tasks(connection, event.id, body["project_id"], [(0, "demonstration", ())])


def _add_tasks(
    connection: Connection,
    item_id: int,
    project_id: int,
    rows: Sequence[tuple[int, Kind, Sequence[int]]],
    closed: int = 0,
) -> None:
    shared = {"item_id": item_id, "project_id": project_id, "answered": 0, "closed": closed}
    values = [
        {"id": item_id * TASKS_PER_ITEM + n, "kind": kind, "outputs": pack(list(outputs)), **shared}
        for n, kind, outputs in rows
    ]
    if values:
        connection.execute(sql.insert(tasks), values)


def _add_outputs(connection: Connection, item_id: int, outputs: list[dict[str, str]]) -> None:
    _change_item(connection, item_id, "ready", {"outputs": outputs, "error": None})
    item = item_of(connection, item_id)
    settings = project_of(connection, item.project_id).settings
    rows: list[tuple[int, Kind, Sequence[int]]] = []
    places = range(len(outputs))
    for kind in settings.kinds:
        asked: Sequence[tuple[int, ...]] = []
        if kind in ("rating", "ranking"):
            asked = [tuple(places)]
        elif kind == "correction":
            asked = [(place,) for place in places]
        elif kind == "pairwise":
            pairs = list(combinations(places, 2))
            chosen = stable_order(range(len(pairs)), "pairs", settings.seed, item_id)
            asked = [pairs[place] for place in sorted(chosen[: settings.pairs_per_prompt])]
        rows += [(1 + len(rows) + place, kind, shown) for place, shown in enumerate(asked)]
    _add_tasks(connection, item_id, item.project_id, rows)


def _change_item(connection: Connection, item_id: int, state: str, changes: dict[str, Any]) -> None:
    body = unpack(connection.scalar(sql.select(items.c.body).where(items.c.id == item_id)) or "{}")
    values = {"state": state, "body": pack({**body, **changes})}
    connection.execute(sql.update(items).where(items.c.id == item_id).values(**values))


def _add_labeler(connection: Connection, event: Event) -> None:
    if event.body == PURGED:
        row, token_hash = PURGED_LABELER, None
    else:
        row = {name: event.body[name] for name in ("name", "role", "simulated", "imported")}
        token_hash = event.body["token_hash"]
    connection.execute(sql.insert(labelers).values(id=event.id, token_hash=token_hash, body=pack(row)))


PURGED_LABELER = {"name": "", "role": "labeler", "revoked": True, "purged": True}


def _change_labeler(connection: Connection, labeler_id: int | None, changes: dict[str, Any]) -> None:
    where = labelers.c.id == labeler_id
    body = unpack(connection.scalar(sql.select(labelers.c.body).where(where)) or "{}")
    connection.execute(sql.update(labelers).where(where).values(body=pack({**body, **changes})))


def _record(connection: Connection, event: Event, task_id: int, state: str) -> None:
    """The newest answer or skip of a labeler takes the place of the one before it."""
    mine = (answers.c.task_id == task_id) & (answers.c.labeler_id == event.labeler_id)
    old = connection.execute(sql.select(answers.c.state, answers.c.body).where(mine)).one_or_none()
    before = unpack(old.body) if old else {"first_event_id": event.id, "revisions": -1}
    row = {
        **{name: value for name, value in event.body.items() if name != "task_id"},
        "at": event.at,
        "first_event_id": before["first_event_id"],
        "revisions": before["revisions"] + 1,
    }
    connection.execute(sql.delete(answers).where(mine))
    values = {"task_id": task_id, "labeler_id": event.labeler_id, "event_id": event.id, "state": state}
    connection.execute(sql.insert(answers).values(**values, body=pack(row)))
    change = (state == "answered") - (old is not None and old.state == "answered")
    if change and not labeler_of(connection, event.labeler_id).simulated:
        of_task = sql.update(tasks).where(tasks.c.id == task_id)
        connection.execute(of_task.values(answered=tasks.c.answered + change))


def _add_written_prompt(connection: Connection, event: Event) -> None:
    body = event.body
    row = {"prompt": body["prompt"], "author_id": event.labeler_id}
    values = {"id": event.id, "project_id": body["project_id"], "state": "ready", "body": pack(row)}
    connection.execute(sql.insert(items).values(**values))
    _add_tasks(connection, event.id, body["project_id"], [(0, "demonstration", ())], closed=1)
    answer = {"answer": {"text": body["text"]}, "order": [], "seconds": body["seconds"]}
    written = Event(event.id, event.at, "answered", event.labeler_id, answer)
    _record(connection, written, event.id * TASKS_PER_ITEM, "answered")


def _purge(connection: Connection, labeler_id: int) -> None:
    if not labeler_of(connection, labeler_id).simulated:
        answered = sql.select(answers.c.task_id).where(
            answers.c.labeler_id == labeler_id, answers.c.state == "answered"
        )
        given = sql.update(tasks).where(tasks.c.id.in_(answered))
        connection.execute(given.values(answered=tasks.c.answered - 1))
    for table in (answers, flags):
        connection.execute(sql.delete(table).where(table.c.labeler_id == labeler_id))
    for item_id, body in connection.execute(sql.select(items.c.id, items.c.body)).all():
        if unpack(body).get("author_id") == labeler_id:
            connection.execute(sql.delete(items).where(items.c.id == item_id))
            connection.execute(sql.delete(tasks).where(tasks.c.item_id == item_id))
    of_labeler = sql.update(labelers).where(labelers.c.id == labeler_id)
    connection.execute(of_labeler.values(token_hash=None, body=pack(PURGED_LABELER)))


# --- tables -> values -----------------------------------------------------------------------------


def project_of(connection: Connection, project_id: int) -> Project:
    """A project by id; UserError if there is none."""
    text = connection.scalar(sql.select(projects.c.settings).where(projects.c.id == project_id))
    if text is None:
        raise UserError(f"project {project_id}: not in this store")
    return Project(project_id, settings_from_json(unpack(text)))


def item_of(connection: Connection, item_id: int) -> Item:
    """An item by id; UserError if there is none."""
    row = connection.execute(sql.select(items).where(items.c.id == item_id)).one_or_none()
    if row is None:
        raise UserError(f"item {item_id}: not in this store")
    body = unpack(row.body)
    outputs = tuple(Output(**output) for output in body.pop("outputs", ()))
    return Item(row.id, row.project_id, state=row.state, outputs=outputs, **body)


def task_of(connection: Connection, task_id: int) -> Task:
    """A task by id; UserError if there is none."""
    row = connection.execute(sql.select(tasks).where(tasks.c.id == task_id)).one_or_none()
    if row is None:
        raise UserError(f"task {task_id}: not in this store")
    return task_from(row)


def task_from(row: Row[Any]) -> Task:
    """A row of `tasks` as a value."""
    return Task(row.id, row.item_id, row.project_id, row.kind, tuple(unpack(row.outputs)))


def labeler_of(connection: Connection, labeler_id: int | None) -> Labeler:
    """A labeler by id; UserError if there is none."""
    row = connection.execute(sql.select(labelers).where(labelers.c.id == labeler_id)).one_or_none()
    if row is None:
        raise UserError(f"labeler {labeler_id}: not in this store")
    return Labeler(row.id, **unpack(row.body))


def all_labelers(connection: Connection) -> dict[int, Labeler]:
    """Every labeler by id, oldest first."""
    rows = connection.execute(sql.select(labelers).order_by(labelers.c.id))
    return {row.id: Labeler(row.id, **unpack(row.body)) for row in rows}


def answers_of(
    connection: Connection, project_id: int, *, task_id: int | None = None, labeler_id: int | None = None
) -> list[StoredAnswer]:
    """The current answers and skips of a project, by task, then labeler."""
    joined = sql.join(answers, tasks, answers.c.task_id == tasks.c.id)
    query = sql.select(answers, tasks.c.item_id, tasks.c.kind, tasks.c.outputs).select_from(joined)
    query = query.where(tasks.c.project_id == project_id)
    if task_id is not None:
        query = query.where(answers.c.task_id == task_id)
    if labeler_id is not None:
        query = query.where(answers.c.labeler_id == labeler_id)
    people = all_labelers(connection)
    found = []
    for row in connection.execute(query.order_by(answers.c.task_id, answers.c.labeler_id)):
        body = unpack(row.body)
        body.pop("first_event_id")
        found.append(
            StoredAnswer(
                event_id=row.event_id,
                task_id=row.task_id,
                item_id=row.item_id,
                kind=row.kind,
                labeler=people[row.labeler_id],
                outputs=tuple(unpack(row.outputs)),
                state=row.state,
                answer=body.pop("answer", None),
                order=tuple(body.pop("order", ())),
                **body,
            )
        )
    return found
