"""Who may have which task: n slots a task, reservations that end, drafts."""

from __future__ import annotations

import sqlalchemy as sql
from sqlalchemy import ColumnElement, Connection

from fledge.errors import UserError
from fledge.feedback.database import answers, drafts, projects, reservations, tasks
from fledge.feedback.store import Store


def free(project_id: int, labeler_id: int, connection: Connection, now: float) -> ColumnElement[bool]:
    """Tasks with room for this labeler: not theirs yet, and fewer answers and reservations than wanted."""
    wanted = connection.scalar(sql.select(projects.c.labelers_per_item).where(projects.c.id == project_id))
    mine = sql.exists().where(answers.c.task_id == tasks.c.id, answers.c.labeler_id == labeler_id)
    held = reservations.alias()  # an answer or a skip ends the reservation
    others_hold = sql.select(sql.func.count()).where(
        held.c.task_id == tasks.c.id, held.c.labeler_id != labeler_id, held.c.until > now
    )
    return sql.and_(
        tasks.c.project_id == project_id,
        tasks.c.closed == 0,
        tasks.c.answered < wanted,
        ~mine.correlate(tasks),
        tasks.c.answered + others_hold.correlate(tasks).scalar_subquery() < wanted,
    )


def begun(connection: Connection, labeler_id: int, project_id: int, now: float) -> int | None:
    """A task that the labeler has open: still reserved, or with room left for them."""
    mine = (reservations.c.task_id == tasks.c.id) & (reservations.c.labeler_id == labeler_id)
    answered = sql.exists().where(answers.c.task_id == tasks.c.id, answers.c.labeler_id == labeler_id)
    query = (
        sql.select(tasks.c.id)
        .select_from(sql.join(tasks, reservations, mine))
        .where(tasks.c.project_id == project_id, ~answered)
        .where(sql.or_(reservations.c.until > now, free(project_id, labeler_id, connection, now)))
    )
    return connection.scalar(query.order_by(tasks.c.id).limit(1))


def reserve(store: Store, connection: Connection, task_id: int, labeler_id: int) -> None:
    """Keep a task for a labeler from now on."""
    delete_of(connection, reservations, task_id, labeler_id)
    values = {"task_id": task_id, "labeler_id": labeler_id, "until": store.clock() + store.reserved_seconds}
    connection.execute(sql.insert(reservations).values(**values))


def end(connection: Connection, task_id: int, labeler_id: int) -> None:
    """Drop what was only kept until the answer: draft and reservation."""
    for table in (drafts, reservations):
        delete_of(connection, table, task_id, labeler_id)


def delete_of(connection: Connection, table: sql.Table, task_id: int, labeler_id: int) -> None:
    """Drop a labeler's row on a task from `drafts` or `reservations`."""
    mine = (table.c.task_id == task_id) & (table.c.labeler_id == labeler_id)
    connection.execute(sql.delete(table).where(mine))


def has_answer(connection: Connection, task_id: int, labeler_id: int) -> bool:
    """Whether a labeler has answered or skipped a task."""
    mine = (answers.c.task_id == task_id) & (answers.c.labeler_id == labeler_id)
    return connection.scalar(sql.select(answers.c.event_id).where(mine)) is not None


def check_had(connection: Connection, task_id: int, labeler_id: int) -> None:
    """UserError if a labeler was never given a task."""
    held = (reservations.c.task_id == task_id) & (reservations.c.labeler_id == labeler_id)
    reserved = connection.scalar(sql.select(reservations.c.task_id).where(held)) is not None
    if not reserved and not has_answer(connection, task_id, labeler_id):
        raise UserError(f"task {task_id}: not yours; ask for the next task first")
