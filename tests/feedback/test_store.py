from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sql
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from fledge.errors import UserError
from fledge.feedback.database import DERIVED, metadata
from fledge.feedback.events import KINDS, read_events
from fledge.feedback.exports import FORMS, export_rows, jsonl
from fledge.feedback.forms import ProjectSettings
from fledge.feedback.labelling import next_task, progress
from fledge.feedback.people import add_labeler, purge_labeler, renew_token, revoke
from fledge.feedback.store import (
    Store,
    add_item,
    add_prefill,
    add_project,
    edit_project,
    fail_item,
    get_project,
    list_projects,
    list_tasks,
)

from .making import Clock, busy_project, project_with

POSTGRES = os.environ.get("FLEDGE_TEST_POSTGRES_URL")


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A new database of each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/labels.db"
        return
    if not POSTGRES:
        pytest.skip("FLEDGE_TEST_POSTGRES_URL names no server")
    admin = sql.create_engine(
        sql.make_url(POSTGRES).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT"
    )
    name = f"fledge_test_{os.getpid()}_{time.time_ns()}"
    with admin.connect() as connection:
        connection.execute(sql.text(f"CREATE DATABASE {name}"))
    yield sql.make_url(POSTGRES).set(database=name).render_as_string(hide_password=False)
    with admin.connect() as connection:
        connection.execute(sql.text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    store = Store(url, clock=Clock())
    yield store
    store.close()


def full(store: Store) -> int:
    """A project in which everything that can happen has happened."""
    project = busy_project(store)
    edit_project(store, project, instructions="New ones.", labelers_per_item=3, prefill=True)
    add_prefill(store, list_tasks(store, project)[0].id, {"text": "judged"}, "rule")
    fail_item(store, add_item(store, project, "never answered"), "no model")
    people = [add_labeler(store, name)[0].id for name in ("leaves", "comes back")]
    for person in people:
        revoke(store, person)
    renew_token(store, people[1])
    return project


def dump(store: Store) -> dict[str, list[tuple[object, ...]]]:
    with store.reading() as connection:
        return {
            table.name: sorted(tuple(row) for row in connection.execute(sql.select(table)))
            for table in DERIVED
        }


def exports(store: Store, project: int) -> list[bytes]:
    return [jsonl(export_rows(store, project, form)).encode() for form in FORMS]


@pytest.mark.parametrize("purged", [False, True])
def test_the_events_alone_give_the_same_state_and_bytes(store: Store, purged: bool) -> None:
    project = full(store)
    with store.reading() as connection:
        busiest = connection.scalar(
            sql.text("SELECT labeler_id FROM answers GROUP BY labeler_id ORDER BY count(*) DESC")
        )
    if purged:
        purge_labeler(store, busiest)
    tables, files = dump(store), exports(store, project)
    assert all(files)
    assert store.rebuild() > 50
    assert dump(store) == tables
    assert exports(store, project) == files
    with store.reading() as connection:
        seen = {event.kind for event in read_events(connection)}
    assert seen == set(KINDS) - (set() if purged else {"labeler_purged"})


def test_a_lost_state_comes_back(store: Store) -> None:
    project = full(store)
    files = exports(store, project)
    with store.writing() as connection:
        for table in DERIVED:
            connection.execute(sql.delete(table))
    assert list_projects(store) == []
    store.rebuild()
    assert exports(store, project) == files


def test_events_are_only_ever_added(store: Store) -> None:
    project = busy_project(store)
    with store.reading() as connection:
        before = list(read_events(connection))
    busy_project(store, seed=1)
    edit_project(store, project, labelers_per_item=9)
    with store.reading() as connection:
        after = list(read_events(connection))
    assert after[: len(before)] == before
    assert [event.id for event in after] == list(range(1, len(after) + 1))


def test_migrations_make_the_tables_of_the_code(store: Store) -> None:
    with store.engine.connect() as connection:
        options = {"compare_type": True}
        assert compare_metadata(MigrationContext.configure(connection, opts=options), metadata) == []
        version = connection.scalar(sql.text("SELECT version_num FROM alembic_version"))
    assert version == "0001"


def test_many_open_a_new_store_at_once(url: str) -> None:
    with ThreadPoolExecutor(6) as pool:
        stores = list(pool.map(lambda _: Store(url), range(6)))
    assert [list_projects(store) for store in stores] == [[]] * 6
    for store in stores:
        store.close()


def test_two_people_at_once_get_two_slots(url: str, store: Store) -> None:
    project = project_with(store, "ranking", items=1, n=2)
    people = [add_labeler(store, f"p{i}")[0].id for i in range(6)]
    stores = [Store(url) for _ in people]

    def ask(pair: tuple[Store, int]) -> bool:
        return next_task(pair[0], pair[1], project) is not None

    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(ask, zip(stores, people, strict=True)))
    assert sum(got) == 2
    for own in stores:
        own.close()


def test_wal_and_full_sync(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "deep" / "labels.db"))
    with store.reading() as connection:
        assert connection.scalar(sql.text("PRAGMA journal_mode")) == "wal"
        assert connection.scalar(sql.text("PRAGMA synchronous")) == 2
    store.close()


WORK = """
import sys
from pathlib import Path
from fledge.feedback.labelling import next_task, save_draft, submit
from fledge.feedback.store import Store

store = Store(sys.argv[1])
project, labeler, saved = int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
with saved.open("a") as file:
    while task := next_task(store, labeler, project):
        save_draft(store, labeler, task.task_id, {"ranks": [1]}, 1)
        submit(store, labeler, task.task_id, {"ranks": [1, 2]}, order=task.order, seconds=1)
        file.write(f"{task.task_id}\\n")
        file.flush()
"""


@pytest.mark.slow
def test_kill_loses_nothing_that_was_answered(tmp_path: Path) -> None:
    """A worker is killed 25 times, each time somewhere else between asking, draft and answer."""
    path, saved = str(tmp_path / "labels.db"), tmp_path / "saved"
    store = Store(path)
    project = project_with(store, "ranking", items=3000, outputs=2)
    labeler = add_labeler(store, "Ada")[0].id
    saved.touch()
    answered: list[int] = []
    for number in range(25):
        worker = subprocess.Popen([sys.executable, "-c", WORK, path, str(project), str(labeler), str(saved)])
        size, begun = saved.stat().st_size, time.monotonic()
        while saved.stat().st_size == size and worker.poll() is None and time.monotonic() < begun + 60:
            time.sleep(0.002)
        time.sleep(0.0037 * number)
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        told = [int(line) for line in saved.read_text().split()]
        with store.reading() as connection:
            kept = connection.scalars(sql.text("SELECT task_id FROM answers ORDER BY task_id")).all()
            assert connection.scalar(sql.text("PRAGMA integrity_check")) == "ok"
        assert set(told) <= set(kept)  # what the worker was told is safe, is
        assert len(kept) <= len(told) + number + 1  # and at most the answer under way was kept untold
        answered.append(len(kept))
    assert answered == sorted(answered)
    assert answered[-1] > answered[0]
    tables = dump(store)
    store.rebuild()
    assert dump(store) == tables  # no event without its state, no state without its event
    store.close()


# --- opening --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("sqlite://", "need a file"),
        ("mysql://localhost/labels", "mysql is not supported"),
        ("://", "not a database URL"),
        ("postgresql://nobody:secret@127.0.0.1:1/none", "cannot be opened|psycopg"),  # without its driver
    ],
)
def test_a_store_that_cannot_be_opened(given: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        Store(given)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_store(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database, but quite long enough to look at " * 100)
    with pytest.raises(UserError, match=r"notes\.txt: the store cannot be opened"):
        Store(str(path))


def test_somebody_elses_tables(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "x.db") as connection:
        connection.execute("CREATE TABLE events (x)")
    connection.close()
    with pytest.raises(UserError, match="other tables with our names"):
        Store(str(tmp_path / "x.db"))


def test_a_newer_store_is_refused(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "x.db"))
    with store.writing() as connection:
        connection.execute(sql.text("UPDATE alembic_version SET version_num = '9999'"))
    store.close()
    with pytest.raises(UserError, match="newer fledge"):
        Store(str(tmp_path / "x.db"))


# --- projects -------------------------------------------------------------------------------------


def test_projects_can_be_edited_but_not_doubled(store: Store) -> None:
    project = add_project(store, ProjectSettings("p"))
    edit_project(store, project, instructions="Be kind.", labelers_per_item=5)
    settings = get_project(store, project).settings
    assert (settings.instructions, settings.labelers_per_item, settings.prefill) == ("Be kind.", 5, False)
    with pytest.raises(UserError, match="exists already"):
        add_project(store, ProjectSettings("p"))
    with pytest.raises(UserError, match="project 77: not in this store"):
        progress(store, 77)
    with pytest.raises(UserError, match="the text is empty"):
        edit_project(store, project, instructions=" ")
