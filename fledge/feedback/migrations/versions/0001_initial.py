"""The first tables."""

from __future__ import annotations

import sqlalchemy as sql
from alembic import op
from sqlalchemy import BigInteger, Column, Float, Integer, String, Text

revision = "0001"
down_revision = None
Id = BigInteger().with_variant(Integer, "sqlite")


def _id(name: str) -> Column[int]:
    return Column(name, Id, primary_key=True, autoincrement=False)


def upgrade() -> None:
    """Make every table; the names of indexes and constraints are those of `database.metadata`."""
    op.create_table(
        "events",
        _id("id"),
        Column("at", Float(53), nullable=False),
        Column("kind", String(40), nullable=False),
        Column("labeler_id", Id),
        Column("key", String(64), unique=True),
        Column("body", Text, nullable=False),
    )
    op.create_index("ix_events_labeler_id", "events", ["labeler_id"])
    op.create_table(
        "projects",
        _id("id"),
        Column("labelers_per_item", Integer, nullable=False),
        Column("settings", Text, nullable=False),
    )
    op.create_table(
        "labelers",
        _id("id"),
        Column("token_hash", String(64), unique=True),
        Column("body", Text, nullable=False),
    )
    op.create_table(
        "items",
        _id("id"),
        Column("project_id", Id, nullable=False),
        Column("state", String(10), nullable=False),
        Column("body", Text, nullable=False),
    )
    op.create_index("ix_items_project", "items", ["project_id", "state", "id"])
    _create_task_tables()


def _create_task_tables() -> None:
    op.create_table(
        "tasks",
        _id("id"),
        Column("item_id", Id, nullable=False),
        Column("project_id", Id, nullable=False),
        Column("kind", String(20), nullable=False),
        Column("outputs", Text, nullable=False),
        Column("answered", Integer, nullable=False),
        Column("closed", Integer, nullable=False),
    )
    op.create_index("ix_tasks_item_id", "tasks", ["item_id"])
    op.create_index("ix_tasks_open", "tasks", ["project_id", "closed", "answered", "id"])
    op.create_table(
        "answers",
        _id("task_id"),
        _id("labeler_id"),
        Column("event_id", Id, nullable=False),
        Column("state", String(10), nullable=False),
        Column("body", Text, nullable=False),
    )
    op.create_index("ix_answers_labeler", "answers", ["labeler_id", "event_id"])
    op.create_table(
        "flags",
        _id("event_id"),
        Column("task_id", Id, nullable=False),
        Column("labeler_id", Id, nullable=False),
        Column("body", Text, nullable=False),
    )
    op.create_index("ix_flags_task_id", "flags", ["task_id"])
    op.create_table("prefills", _id("task_id"), Column("body", Text, nullable=False))
    op.create_table("drafts", _id("task_id"), _id("labeler_id"), Column("body", Text, nullable=False))
    op.create_table(
        "reservations", _id("task_id"), _id("labeler_id"), Column("until", Float(53), nullable=False)
    )


def downgrade() -> None:
    """Drop every table."""
    tables = "events projects labelers items tasks answers flags prefills drafts reservations"
    for table in tables.split():
        op.execute(sql.text(f"DROP TABLE {table}"))
