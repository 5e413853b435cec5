"""The tables, and how they are opened: SQLite in WAL mode, or PostgreSQL.

`events` is the truth and is only ever added to (a purge blanks what a person gave). `drafts` and
`reservations` are what may be lost. Everything else is derived from the events (`state.py`). Free text lives
in JSON, escaped to ASCII: so any output of a model fits every database (PostgreSQL's text has no NUL).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

from fledge.errors import UserError

metadata = MetaData()
Id = BigInteger().with_variant(Integer, "sqlite")  # in SQLite only INTEGER is the row's own number

events = Table(
    "events",
    metadata,
    Column("id", Id, primary_key=True, autoincrement=False),
    Column("at", Float(53), nullable=False),
    Column("kind", String(40), nullable=False),
    Column("labeler_id", Id, index=True),
    Column("key", String(64), unique=True),  # hash of what a page makes up once per click
    Column("body", Text, nullable=False),
)
projects = Table(
    "projects",
    metadata,
    Column("id", Id, primary_key=True, autoincrement=False),
    Column("labelers_per_item", Integer, nullable=False),
    Column("settings", Text, nullable=False),
)
labelers = Table(
    "labelers",
    metadata,
    Column("id", Id, primary_key=True, autoincrement=False),
    Column("token_hash", String(64), unique=True),
    Column("body", Text, nullable=False),
)
items = Table(
    "items",
    metadata,
    Column("id", Id, primary_key=True, autoincrement=False),
    Column("project_id", Id, nullable=False),
    Column("state", String(10), nullable=False),
    Column("body", Text, nullable=False),
    Index("ix_items_project", "project_id", "state", "id"),
)
tasks = Table(
    "tasks",
    metadata,
    Column("id", Id, primary_key=True, autoincrement=False),
    Column("item_id", Id, nullable=False, index=True),
    Column("project_id", Id, nullable=False),
    Column("kind", String(20), nullable=False),
    Column("outputs", Text, nullable=False),
    Column("answered", Integer, nullable=False),  # by people; simulated labelers take nobody's place
    Column("closed", Integer, nullable=False),  # 1: nobody else is asked
    Index("ix_tasks_open", "project_id", "closed", "answered", "id"),
)
answers = Table(
    "answers",
    metadata,
    Column("task_id", Id, primary_key=True, autoincrement=False),
    Column("labeler_id", Id, primary_key=True, autoincrement=False),
    Column("event_id", Id, nullable=False),
    Column("state", String(10), nullable=False),
    Column("body", Text, nullable=False),
    Index("ix_answers_labeler", "labeler_id", "event_id"),
)
flags = Table(
    "flags",
    metadata,
    Column("event_id", Id, primary_key=True, autoincrement=False),
    Column("task_id", Id, nullable=False, index=True),
    Column("labeler_id", Id, nullable=False),
    Column("body", Text, nullable=False),
)
prefills = Table(
    "prefills",
    metadata,
    Column("task_id", Id, primary_key=True, autoincrement=False),
    Column("body", Text, nullable=False),
)
drafts = Table(
    "drafts",
    metadata,
    Column("task_id", Id, primary_key=True, autoincrement=False),
    Column("labeler_id", Id, primary_key=True, autoincrement=False),
    Column("body", Text, nullable=False),
)
reservations = Table(
    "reservations",
    metadata,
    Column("task_id", Id, primary_key=True, autoincrement=False),
    Column("labeler_id", Id, primary_key=True, autoincrement=False),
    Column("until", Float(53), nullable=False),
)
DERIVED = (projects, labelers, items, tasks, answers, flags, prefills)

# Writers take turns, so events get their numbers in the order in which they become visible.
_POSTGRES_TURN = sql.text("SELECT pg_advisory_xact_lock(7220517)")
_POSTGRES_HINT = "pip install 'fledge[postgres]'"


def connect(url: str) -> Engine:
    """Open a database by URL or file name and bring its tables up to date."""
    engine = _engine(url)
    shown = engine.url.render_as_string(hide_password=True)
    try:
        with writing(engine) as connection:
            _upgrade(connection, shown)
    except sql.exc.DBAPIError as error:
        engine.dispose()
        reason = str(error.orig).strip().splitlines()[0]
        raise UserError(f"{shown}: the store cannot be opened: {reason}") from None
    except UserError:
        engine.dispose()
        raise
    return engine


def _engine(url: str) -> Engine:
    if "://" not in url:
        url = f"sqlite:///{url}"
    try:
        parsed = sql.make_url(url)
    except (sql.exc.ArgumentError, ValueError):
        raise UserError(
            "store: not a database URL; give a file name, sqlite:///FILE or postgresql://..."
        ) from None
    if parsed.get_backend_name() == "sqlite":
        if not parsed.database or parsed.database == ":memory:":
            raise UserError("store: labels need a file: sqlite:///FILE")
        Path(parsed.database).absolute().parent.mkdir(parents=True, exist_ok=True)
        engine = sql.create_engine(parsed, connect_args={"timeout": 60})
        sql.event.listen(engine, "connect", _prepare_sqlite)
        sql.event.listen(engine, "begin", _begin_sqlite)
        return engine
    if parsed.get_backend_name() in ("postgresql", "postgres"):
        try:
            return sql.create_engine(parsed.set(drivername="postgresql+psycopg"))
        except ImportError:
            raise UserError(f"store: PostgreSQL needs the driver psycopg: {_POSTGRES_HINT}") from None
    raise UserError(f"store: {parsed.drivername} is not supported; use SQLite or PostgreSQL")


def _prepare_sqlite(connection: Any, _: object) -> None:
    connection.isolation_level = None  # the driver begins nothing by itself: `_begin_sqlite` does
    for setting in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"):
        connection.execute(f"PRAGMA {setting}").close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("fledge_writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction of the one writer at a time."""
    with engine.connect().execution_options(fledge_writes=True) as connection, connection.begin():
        if engine.dialect.name == "postgresql":
            connection.execute(_POSTGRES_TURN)
        yield connection


def forget_deleted(engine: Engine) -> None:
    """Wipe what was deleted or overwritten from the database's own files, as far as it lets us.

    SQLite overwrites deleted content (`secure_delete`) and empties its write-ahead log here; PostgreSQL
    drops dead rows with VACUUM FULL. Backups and PostgreSQL's own log are the operator's.
    """
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(sql.text("VACUUM FULL events, labelers, items, answers, flags, drafts"))
    if engine.dialect.name == "sqlite":
        raw = engine.raw_connection()
        try:
            raw.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            raw.close()


# --- migrations -----------------------------------------------------------------------------------


def alembic_config(connection: Connection | None = None) -> Config:
    """Alembic's settings for the migrations that lie beside this file."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _upgrade(connection: Connection, shown: str) -> None:
    config = alembic_config(connection)
    head = ScriptDirectory.from_config(config).get_current_head()
    tables = set(sql.inspect(connection).get_table_names())
    if "alembic_version" in tables:
        if connection.scalar(sql.text("SELECT version_num FROM alembic_version")) == head:
            return
    elif tables & set(metadata.tables):
        raise UserError(f"{shown}: holds other tables with our names; choose another database")
    try:
        command.upgrade(config, "head")
    except CommandError:
        raise UserError(f"{shown}: written by a newer fledge; upgrade fledge to open it") from None
