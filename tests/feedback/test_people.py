from __future__ import annotations

import json
from pathlib import Path

import pytest
import sqlalchemy as sql

from fledge.errors import UserError
from fledge.feedback.events import read_events
from fledge.feedback.exports import FORMS, export_rows
from fledge.feedback.labelling import flag, next_task, open_task, progress, save_draft, submit, write_prompt
from fledge.feedback.people import (
    add_labeler,
    export_labeler,
    get_labeler,
    list_labelers,
    purge_labeler,
    renew_token,
    revoke,
    sign_in,
)
from fledge.feedback.store import Store, list_items

from .making import busy_project, new_store, project_with


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path)


def test_a_link_opens_until_it_is_revoked_or_renewed(store: Store) -> None:
    ada, token = add_labeler(store, "  Ada \n Lovelace ", "admin")
    assert (ada.name, ada.role) == ("Ada Lovelace", "admin")
    assert sign_in(store, token) == ada
    assert sign_in(store, token[:-1]) is None
    assert sign_in(store, "") is None
    assert sign_in(store, "\ud800") is None
    second = renew_token(store, ada.id)
    assert sign_in(store, token) is None
    assert sign_in(store, second) is not None
    revoke(store, ada.id)
    assert sign_in(store, second) is None
    assert sign_in(store, renew_token(store, ada.id)) is not None


def test_tokens_are_long_different_and_not_in_the_file(store: Store, tmp_path: Path) -> None:
    tokens = [add_labeler(store, "x")[1] for _ in range(50)]
    assert len(set(tokens)) == 50
    assert min(map(len, tokens)) >= 43  # 256 bits in base 64
    store.close()
    raw = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert not any(token.encode() in raw for token in tokens)


def test_simulated_and_imported_labelers_have_no_link(store: Store) -> None:
    for kind in ("simulated", "imported"):
        labeler, token = add_labeler(store, "x", **{kind: True})  # type: ignore[arg-type]
        assert token == ""
        assert labeler.handle == f"{kind}-{labeler.id}"
        with pytest.raises(UserError, match="have no link"):
            renew_token(store, labeler.id)


@pytest.mark.parametrize(
    ("name", "role", "words"), [("", "labeler", "1 to 100"), ("x", "boss", "unknown role")]
)
def test_wrong_labelers(store: Store, name: str, role: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        add_labeler(store, name, role)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="labeler 9: not in this store"):
        get_labeler(store, 9)


SECRET = "zanzibar-7421"


def given_by(store: Store) -> tuple[int, int]:
    """A person named SECRET who says SECRET wherever they can; the project and the person."""
    project = project_with(store, "demonstration", items=2)
    who = add_labeler(store, SECRET)[0].id
    task = next_task(store, who, project)
    assert task is not None
    submit(store, who, task.task_id, {"text": SECRET}, order=(), seconds=1, key=SECRET)
    submit(store, who, task.task_id, {"text": f"{SECRET} again"}, order=(), seconds=1)
    flag(store, who, task.task_id, SECRET)
    write_prompt(store, who, project, SECRET, SECRET)
    task = next_task(store, who, project)
    assert task is not None
    save_draft(store, who, task.task_id, {"text": SECRET})
    return project, who


def test_a_persons_data_can_be_had(store: Store) -> None:
    _, who = given_by(store)
    data = export_labeler(store, who)
    kinds = [event["kind"] for event in data["events"]]
    assert kinds == ["labeler_added", "answered", "answered", "flagged", "prompt_written"]
    assert data["labeler"]["name"] == SECRET
    assert data["drafts"][0]["body"] == {"text": SECRET}
    assert "token_hash" not in json.dumps(data)


def test_a_purge_leaves_a_tombstone_and_nothing_else(store: Store, tmp_path: Path) -> None:
    project, who = given_by(store)
    other = add_labeler(store, "Bob")[0].id
    before = progress(store, project).filled
    purge_labeler(store, who, by=other)
    assert progress(store, project).filled == before - 1
    assert next_task(store, other, project) is not None  # the slot is open again
    assert get_labeler(store, who).purged
    assert SECRET not in repr(list_labelers(store)) + repr(list_items(store, project))
    assert all(export_rows(store, project, form) == [] for form in FORMS)
    with store.reading() as connection:
        events = list(read_events(connection, who))
        assert connection.scalar(sql.text("SELECT count(*) FROM events")) == events[-1].id + 2
    assert [event.body for event in events] == [{"purged": True}] * 5
    with store.reading() as connection:
        assert connection.scalar(sql.text("SELECT count(*) FROM events WHERE key IS NOT NULL")) == 0
    assert {path.name for path in tmp_path.iterdir()} >= {"labels.db", "labels.db-wal"}
    for path in tmp_path.iterdir():  # neither in the database nor in its log, while others go on
        assert SECRET.encode() not in path.read_bytes()
    with pytest.raises(UserError, match="have no link"):
        renew_token(store, who)


def test_a_purge_leaves_the_others_alone(store: Store) -> None:
    project = busy_project(store)
    rows = export_rows(store, project, "answers")
    who = rows[0]["labeler"]
    purge_labeler(store, int(who.split("-")[1]))
    kept = [row for row in rows if row["labeler"] != who]
    assert export_rows(store, project, "answers") == kept
    store.rebuild()
    assert export_rows(store, project, "answers") == kept


def test_a_purged_labeler_cannot_go_on(store: Store) -> None:
    project, who = given_by(store)
    purge_labeler(store, who)
    with pytest.raises(UserError, match="link has ended"):
        next_task(store, who, project)
    with pytest.raises(UserError, match="link has ended"):
        open_task(store, who, 1000)
