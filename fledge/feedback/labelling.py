"""What labelers do: get a task, save a draft, answer, skip, flag, go back, write a prompt of their own.

Every function raises UserError with one line for the page to show.
"""

from __future__ import annotations

import math
from typing import Any

import sqlalchemy as sql
from sqlalchemy import Connection

from fledge.errors import UserError
from fledge.feedback.database import answers, drafts, flags, items, prefills, tasks
from fledge.feedback.events import find_key, pack, unpack
from fledge.feedback.forms import (
    MAX_REASON_CHARACTERS,
    Answer,
    check_answer,
    check_prompt,
    check_text,
    to_shown,
    to_stored,
)
from fledge.feedback.records import (
    Assignment,
    Done,
    Draft,
    ItemState,
    Labeler,
    Prefill,
    Progress,
    StoredAnswer,
)
from fledge.feedback.slots import begun, check_had, delete_of, end, free, has_answer, reserve
from fledge.feedback.state import (
    Task,
    answers_of,
    item_of,
    labeler_of,
    project_of,
    stable_order,
    task_of,
)
from fledge.feedback.store import Store

MAX_DRAFT_CHARACTERS = 1_000_000

# More than anybody spends on a task; a clock gone wrong must not make a number that no column holds.
MOST_SECONDS = 1e9


def next_task(store: Store, labeler_id: int, project_id: int) -> Assignment | None:
    """The labeler's next task, reserved for them; the same one until they answer or skip it (reload).

    None: nothing is left for them now. The last free slot of a task is never given to two people; a
    reservation ends `store.reserved_seconds` after the last draft.
    """
    with store.writing() as connection:
        project_of(connection, project_id)
        _active(connection, labeler_id)
        now = store.clock()
        task_id = begun(connection, labeler_id, project_id, now) or connection.scalar(
            sql.select(tasks.c.id)
            .where(free(project_id, labeler_id, connection, now))
            .order_by(tasks.c.id)
            .limit(1)
        )
        if task_id is None:
            return None
        reserve(store, connection, task_id, labeler_id)
        return _assignment(connection, task_of(connection, task_id), labeler_id)


def open_task(store: Store, labeler_id: int, task_id: int) -> Assignment:
    """Go back to a task that this labeler has had, with what they said, to look at it or change it."""
    with store.reading() as connection:
        _active(connection, labeler_id)
        task = task_of(connection, task_id)
        check_had(connection, task_id, labeler_id)
        return _assignment(connection, task, labeler_id)


def save_draft(
    store: Store, labeler_id: int, task_id: int, body: dict[str, Any], seconds: float = 0.0
) -> None:
    """Keep what the page holds and prolong the reservation; the next draft or the answer replaces it."""
    if not isinstance(body, dict):
        raise UserError("draft: not a JSON object")
    packed = pack({"body": body, "seconds": _check_seconds(seconds)})
    if len(packed) > MAX_DRAFT_CHARACTERS:
        raise UserError(f"draft: too long to keep ({len(packed):,} characters)")
    with store.writing() as connection:
        _active(connection, labeler_id)
        task_of(connection, task_id)
        check_had(connection, task_id, labeler_id)
        if not has_answer(connection, task_id, labeler_id):
            reserve(store, connection, task_id, labeler_id)
        delete_of(connection, drafts, task_id, labeler_id)
        connection.execute(sql.insert(drafts).values(task_id=task_id, labeler_id=labeler_id, body=packed))


def submit(
    store: Store,
    labeler_id: int,
    task_id: int,
    answer: Answer,
    *,
    order: list[int] | tuple[int, ...],
    seconds: float,
    key: str | None = None,
) -> int:
    """Record an answer, given in the order shown; its event's id. It supersedes the labeler's earlier one.

    `order` is `Assignment.order`, `seconds` the time spent. `key` is a text that the page makes up once per
    click: sent again, it changes nothing. An answer that comes after its reservation ended counts too.
    """
    with store.writing() as connection:
        if (known := find_key(connection, key, labeler_id)) is not None:
            return known
        _active(connection, labeler_id)
        task = task_of(connection, task_id)
        check_had(connection, task_id, labeler_id)
        return record_answer(store, connection, task, labeler_id, answer, order, seconds, key)


def record_answer(
    store: Store,
    connection: Connection,
    task: Task,
    labeler_id: int,
    answer: Answer,
    order: list[int] | tuple[int, ...],
    seconds: float,
    key: str | None = None,
) -> int:
    """Check an answer and append its event: `submit`, whether or not the labeler was given the task."""
    item = item_of(connection, task.item_id)
    settings = project_of(connection, task.project_id).settings
    expected = shown_order(settings.seed, task, labeler_id)
    if tuple(order) != expected:
        raise UserError("answer: the page shows the outputs in another order than the store; reload the page")
    texts = [item.outputs[place].text for place in expected]
    stored = to_stored(task.kind, check_answer(task.kind, answer, texts, settings.questions), expected)
    body = {"task_id": task.id, "answer": stored, "order": list(expected), "seconds": _check_seconds(seconds)}
    prefill = prefill_of(connection, task.id) if settings.prefill else None
    if prefill and not labeler_of(connection, labeler_id).simulated:
        body |= {"judge": prefill.judge, "changed": stored != prefill.answer}
    event_id = store.append(connection, "answered", body, labeler_id, key)
    end(connection, task.id, labeler_id)
    return event_id


def skip(
    store: Store, labeler_id: int, task_id: int, reason: str, *, seconds: float = 0.0, key: str | None = None
) -> int:
    """Leave a task to others, with a reason; the id of its event. It supersedes the labeler's answer."""
    check_text(reason, "reason", MAX_REASON_CHARACTERS)
    with store.writing() as connection:
        if (known := find_key(connection, key, labeler_id)) is not None:
            return known
        _active(connection, labeler_id)
        task_of(connection, task_id)
        check_had(connection, task_id, labeler_id)
        body = {"task_id": task_id, "reason": reason, "seconds": _check_seconds(seconds)}
        event_id = store.append(connection, "skipped", body, labeler_id, key)
        end(connection, task_id, labeler_id)
        return event_id


def flag(store: Store, labeler_id: int, task_id: int, reason: str, *, key: str | None = None) -> int:
    """Ask the admin to look at a task, which stays with the labeler; the id of the event."""
    check_text(reason, "reason", MAX_REASON_CHARACTERS)
    with store.writing() as connection:
        if (known := find_key(connection, key, labeler_id)) is not None:
            return known
        _active(connection, labeler_id)
        task_of(connection, task_id)
        check_had(connection, task_id, labeler_id)
        return store.append(connection, "flagged", {"task_id": task_id, "reason": reason}, labeler_id, key)


def write_prompt(
    store: Store,
    labeler_id: int,
    project_id: int,
    prompt: str,
    text: str,
    *,
    seconds: float = 0.0,
    key: str | None = None,
) -> int:
    """Add a prompt of the labeler's own with its ideal answer (demonstrations only); the id of the event."""
    checked = check_prompt(check_text(prompt, "prompt"))
    check_text(text, "answer")
    with store.writing() as connection:
        if (known := find_key(connection, key, labeler_id)) is not None:
            return known
        _active(connection, labeler_id)
        if "demonstration" not in project_of(connection, project_id).settings.kinds:
            raise UserError(f"project {project_id}: it takes no demonstrations, so no prompts of labelers")
        body = {"project_id": project_id, "prompt": checked, "text": text, "seconds": _check_seconds(seconds)}
        return store.append(connection, "prompt_written", body, labeler_id, key)


def history(store: Store, labeler_id: int, project_id: int) -> list[Done]:
    """What a labeler has answered or skipped, in the order in which they first did: for going back."""
    joined = sql.join(answers, tasks, answers.c.task_id == tasks.c.id)
    query = sql.select(answers, tasks.c.kind).select_from(joined)
    query = query.where(answers.c.labeler_id == labeler_id, tasks.c.project_id == project_id)
    with store.reading() as connection:
        rows = [(row, unpack(row.body)) for row in connection.execute(query)]
    rows.sort(key=lambda pair: pair[1]["first_event_id"])
    return [Done(row.task_id, row.kind, row.state, body["at"]) for row, body in rows]


def others(store: Store, labeler_id: int, task_id: int) -> list[StoredAnswer]:
    """What the others said to a task, in the item's order. UserError before the labeler's own answer."""
    with store.reading() as connection:
        _active(connection, labeler_id)
        task = task_of(connection, task_id)
        given = answers_of(connection, task.project_id, task_id=task_id)
    if not any(a.labeler.id == labeler_id and a.state == "answered" for a in given):
        raise UserError(f"task {task_id}: answer it first; then the others' answers are shown")
    return [a for a in given if a.labeler.id != labeler_id]


def progress(store: Store, project_id: int, labeler_id: int | None = None) -> Progress:
    """How far a project is, and one labeler in it."""
    count = sql.func.count()
    with store.reading() as connection:
        wanted = project_of(connection, project_id).settings.labelers_per_item
        states: dict[ItemState, int] = {"waiting": 0, "ready": 0, "failed": 0}
        by_state = sql.select(items.c.state, count).where(items.c.project_id == project_id)
        states.update((row[0], row[1]) for row in connection.execute(by_state.group_by(items.c.state)))
        enough = sql.case((tasks.c.answered > wanted, wanted), else_=tasks.c.answered)
        asked = sql.select(count, sql.func.sum(enough))
        asked = asked.where(tasks.c.project_id == project_id, tasks.c.closed == 0)
        number, filled = connection.execute(asked).one()
        done = Progress(states, number * wanted, int(filled or 0))
        if labeler_id is None:
            return done
        mine = answers_of(connection, project_id, labeler_id=labeler_id)
        answered = sum(answer.state == "answered" for answer in mine)
        open_tasks = sql.select(count).where(free(project_id, labeler_id, connection, store.clock()))
        left = int(connection.scalar(open_tasks) or 0)
        return Progress(states, done.slots, done.filled, answered, len(mine) - answered, left)


# --- what a labeler sees --------------------------------------------------------------------------


def shown_order(seed: int, task: Task, labeler_id: int) -> tuple[int, ...]:
    """The order in which a labeler sees the outputs of a task: drawn by hash, so always the same."""
    return stable_order(task.outputs, "shown", seed, task.id, labeler_id)


def prefill_of(connection: Connection, task_id: int) -> Prefill | None:
    """A judge's answer to a task, in the item's order."""
    text = connection.scalar(sql.select(prefills.c.body).where(prefills.c.task_id == task_id))
    return Prefill(**unpack(text)) if text else None


def _assignment(connection: Connection, task: Task, labeler_id: int) -> Assignment:
    item = item_of(connection, task.item_id)
    settings = project_of(connection, task.project_id).settings
    order = shown_order(settings.seed, task, labeler_id)

    def one(column: sql.Column[str], table: sql.Table) -> Any:
        mine = (table.c.task_id == task.id) & (table.c.labeler_id == labeler_id)
        text = connection.scalar(sql.select(column).where(mine))
        return unpack(text) if text else {}

    draft, given = one(drafts.c.body, drafts), one(answers.c.body, answers)
    prefill = prefill_of(connection, task.id) if settings.prefill else None
    mine = (flags.c.task_id == task.id) & (flags.c.labeler_id == labeler_id)
    flagged = connection.scalars(sql.select(flags.c.body).where(mine).order_by(flags.c.event_id)).all()
    return Assignment(
        task_id=task.id,
        item_id=item.id,
        project_id=item.project_id,
        kind=task.kind,
        prompt=item.prompt,
        outputs=tuple(item.outputs[place].text for place in order),
        order=order,
        questions=settings.questions if task.kind == "rating" else (),
        instructions=settings.instructions,
        draft=Draft(**draft) if draft else None,
        answer=to_shown(task.kind, given["answer"], order) if "answer" in given else None,
        skipped=given.get("reason"),
        prefill=Prefill(to_shown(task.kind, prefill.answer, order), prefill.judge) if prefill else None,
        flags=tuple(unpack(body)["reason"] for body in flagged),
    )


def _active(connection: Connection, labeler_id: int) -> Labeler:
    labeler = labeler_of(connection, labeler_id)
    if labeler.revoked or labeler.purged:
        raise UserError("this personal link has ended; ask for a new one")
    return labeler


def _check_seconds(seconds: float) -> float:
    is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if not is_number or not abs(seconds) < math.inf:
        raise UserError("seconds: the time spent must be a number of seconds")
    if seconds < 0:
        raise UserError("seconds: the time spent is negative")
    return round(float(min(seconds, MOST_SECONDS)), 3)
