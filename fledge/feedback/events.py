"""The log of events: what happened, in order, never changed. Only a purge blanks what a person gave."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sql
from sqlalchemy import Connection

from fledge.feedback.database import events

KINDS = (
    "project_added",
    "project_edited",
    "item_added",
    "outputs_added",
    "item_failed",
    "prefilled",
    "labeler_added",
    "labeler_token_renewed",
    "labeler_revoked",
    "labeler_purged",
    "answered",
    "skipped",
    "flagged",
    "prompt_written",
)
PURGED = {"purged": True}
"""The body of an event whose content was purged: its number, time and kind stay."""


@dataclass(frozen=True)
class Event:
    """One thing that happened. `id` counts from 1 and names what it made (an item, a labeler, an answer)."""

    id: int
    at: float
    kind: str
    labeler_id: int | None
    body: dict[str, Any]


def pack(value: Any) -> str:
    """JSON for a database column: ASCII only, the same bytes for the same value."""
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"))


def unpack(text: str) -> Any:
    """The value of a column that `pack` wrote."""
    return json.loads(text)


def append(
    connection: Connection,
    kind: str,
    body: dict[str, Any],
    at: float,
    labeler_id: int | None,
    key: str | None,
) -> Event:
    """Write an event behind the last one. The caller holds the writers' turn."""
    new = (connection.scalar(sql.select(sql.func.max(events.c.id))) or 0) + 1
    labeler_id = new if kind == "labeler_added" else labeler_id
    values = {"id": new, "at": at, "kind": kind, "labeler_id": labeler_id, "key": _own(key, labeler_id)}
    connection.execute(sql.insert(events).values(**values, body=pack(body)))
    return Event(new, at, kind, labeler_id, body)


def _own(key: str | None, labeler_id: int | None) -> str | None:
    """Keys are a labeler's own; any text fits, whatever its length."""
    return (
        None if key is None else hashlib.sha256(f"{labeler_id}/{key}".encode("utf-8", "replace")).hexdigest()
    )


def find_key(connection: Connection, key: str | None, labeler_id: int) -> int | None:
    """The event that this labeler sent under `key` before."""
    if key is None:
        return None
    return connection.scalar(sql.select(events.c.id).where(events.c.key == _own(key, labeler_id)))


def read_events(connection: Connection, labeler_id: int | None = None) -> Iterator[Event]:
    """All events in order, or those of one labeler."""
    query = sql.select(events).order_by(events.c.id)
    if labeler_id is not None:
        query = query.where(events.c.labeler_id == labeler_id)
    last = 0
    while rows := connection.execute(query.where(events.c.id > last).limit(1000)).all():
        for row in rows:
            yield Event(row.id, row.at, row.kind, row.labeler_id, unpack(row.body))
        last = rows[-1].id


def blank(connection: Connection, labeler_id: int) -> int:
    """Overwrite the content of all events that a labeler caused or that describe them; how many."""
    mine = sql.update(events).where(events.c.labeler_id == labeler_id, events.c.kind != "project_edited")
    return connection.execute(mine.values(body=pack(PURGED), key=None)).rowcount
