"""Labelers and admins: personal links, revoking, and what a person may ask for (a copy, removal).

A link holds 256 random bits; the store keeps only their SHA-256, so who reads the database can't sign in.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Any, get_args

import sqlalchemy as sql

from fledge.errors import UserError
from fledge.feedback.database import drafts, forget_deleted, labelers, reservations
from fledge.feedback.events import blank, read_events, unpack
from fledge.feedback.records import Labeler, Role
from fledge.feedback.state import all_labelers, labeler_of
from fledge.feedback.store import Store

MAX_NAME_CHARACTERS = 100


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def add_labeler(
    store: Store, name: str, role: Role = "labeler", *, simulated: bool = False, imported: bool = False
) -> tuple[Labeler, str]:
    """A new labeler and the secret of their link, which is shown this once and can't be read back.

    Simulated and imported labelers have no link; their token is "".
    """
    if role not in get_args(Role):
        raise UserError(f"labeler: unknown role {role!r}; choose {' or '.join(get_args(Role))}")
    name = " ".join(name.split())
    if not 0 < len(name) <= MAX_NAME_CHARACTERS:
        raise UserError(f"labeler: a name has 1 to {MAX_NAME_CHARACTERS} characters")
    token = "" if simulated or imported else secrets.token_urlsafe(32)
    body = {"name": name, "role": role, "simulated": simulated, "imported": imported}
    with store.writing() as connection:
        body["token_hash"] = _hash(token) if token else None
        labeler_id = store.append(connection, "labeler_added", body)
        return labeler_of(connection, labeler_id), token


def sign_in(store: Store, token: str) -> Labeler | None:
    """Whose link this is; None for an unknown, replaced or revoked one."""
    if not token:
        return None
    with store.reading() as connection:
        found = connection.scalar(sql.select(labelers.c.id).where(labelers.c.token_hash == _hash(token)))
        labeler = labeler_of(connection, found) if found is not None else None
    return labeler if labeler and not labeler.revoked else None


def renew_token(store: Store, labeler_id: int, by: int | None = None) -> str:
    """The secret of a new link; the old link ends. Also lifts a revocation. `by`: the admin's id."""
    token = secrets.token_urlsafe(32)
    with store.writing() as connection:
        labeler = labeler_of(connection, labeler_id)
        if labeler.purged or labeler.simulated or labeler.imported:
            raise UserError(f"labeler {labeler_id}: purged, simulated and imported labelers have no link")
        body = {"token_hash": _hash(token), "by": by}
        store.append(connection, "labeler_token_renewed", body, labeler_id)
    return token


def revoke(store: Store, labeler_id: int, by: int | None = None) -> None:
    """End a labeler's link; what they gave stays, what they hold goes back to the others."""
    with store.writing() as connection:
        labeler_of(connection, labeler_id)
        store.append(connection, "labeler_revoked", {"labeler_id": labeler_id, "by": by})
        connection.execute(sql.delete(reservations).where(reservations.c.labeler_id == labeler_id))


def get_labeler(store: Store, labeler_id: int) -> Labeler:
    """One labeler; UserError if there is none with this id."""
    with store.reading() as connection:
        return labeler_of(connection, labeler_id)


def list_labelers(store: Store) -> list[Labeler]:
    """Everybody, oldest first: admins, simulated, imported, revoked and purged ones too."""
    with store.reading() as connection:
        return list(all_labelers(connection).values())


def export_labeler(store: Store, labeler_id: int) -> dict[str, Any]:
    """All that the store knows of a person, as JSON: every event of theirs in order, and unsaved drafts."""
    with store.reading() as connection:
        labeler = labeler_of(connection, labeler_id)
        events = [
            {"id": event.id, "at": event.at, "kind": event.kind, "body": _without_hash(event.body)}
            for event in read_events(connection, labeler_id)
        ]
        of_labeler = sql.select(drafts).where(drafts.c.labeler_id == labeler_id).order_by(drafts.c.task_id)
        kept = [{"task_id": row.task_id, **unpack(row.body)} for row in connection.execute(of_labeler)]
    return {"labeler": vars(labeler), "events": events, "drafts": kept}


def _without_hash(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name != "token_hash"}


def purge_labeler(store: Store, labeler_id: int, by: int | None = None) -> None:
    """Remove a person: name, link, answers, skips, flags, drafts and prompts they wrote. Can't be undone.

    A tombstone stays: that labeler N existed and was purged, and number, time and kind of their events.
    Their slots open for others. Deleted content is also wiped from the database's files, as far as it can.
    """
    with store.writing() as connection:
        labeler_of(connection, labeler_id)
        store.append(connection, "labeler_purged", {"labeler_id": labeler_id, "by": by})
        blank(connection, labeler_id)
        for table in (drafts, reservations):
            connection.execute(sql.delete(table).where(table.c.labeler_id == labeler_id))
    forget_deleted(store.engine)
