from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fledge.errors import UserError
from fledge.feedback.forms import ProjectSettings
from fledge.feedback.labelling import (
    flag,
    history,
    next_task,
    open_task,
    others,
    progress,
    save_draft,
    skip,
    submit,
    write_prompt,
)
from fledge.feedback.people import add_labeler, get_labeler, revoke
from fledge.feedback.records import Assignment, Output
from fledge.feedback.state import answers_of
from fledge.feedback.store import (
    Store,
    add_item,
    add_outputs,
    add_prefill,
    add_project,
    edit_project,
    fail_item,
    get_item,
    list_tasks,
    waiting_items,
)

from .making import Clock, new_store, project_with


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path)


def person(store: Store, name: str = "Ada") -> int:
    return add_labeler(store, name)[0].id


def given(store: Store, labeler: int, project: int) -> Assignment:
    task = next_task(store, labeler, project)
    assert task is not None
    return task


def rank(store: Store, labeler: int, task: Assignment, key: str | None = None) -> int:
    ranks = list(range(1, 1 + len(task.outputs)))
    return submit(store, labeler, task.task_id, {"ranks": ranks}, order=task.order, seconds=5, key=key)


def test_what_the_page_shows_is_what_the_store_keeps(store: Store) -> None:
    project = project_with(store, "ranking", n=9)
    for number in range(5):
        who = person(store, f"person {number}")
        task = given(store, who, project)
        # the labeler likes output "0.2" best, then "0.0" and "0.3" alike, then "0.1"
        liking = {"0.2": 1, "0.0": 2, "0.3": 2, "0.1": 4}
        submit(
            store,
            who,
            task.task_id,
            {"ranks": [liking[t] for t in task.outputs]},
            order=task.order,
            seconds=1,
        )
        assert open_task(store, who, task.task_id).answer == {"ranks": [liking[t] for t in task.outputs]}
    with store.reading() as connection:
        kept = answers_of(connection, project)
    assert [answer.answer for answer in kept] == [{"ranks": [2, 4, 1, 2]}] * 5
    assert len({answer.order for answer in kept}) > 1  # people saw different orders
    for answer in kept:
        assert sorted(answer.order) == [0, 1, 2, 3]


def test_no_models_name_reaches_a_labeler(store: Store) -> None:
    project = project_with(store, "ranking")
    assert "model-" not in repr(given(store, person(store), project))


def test_a_reload_gives_the_same_task_with_its_draft(store: Store) -> None:
    project = project_with(store, "ranking", items=3)
    ada = person(store)
    first = given(store, ada, project)
    save_draft(store, ada, first.task_id, {"ranks": [1, 1, 2, 3]}, 7.5)
    again = given(store, ada, project)
    assert (again.task_id, again.outputs) == (first.task_id, first.outputs)
    assert again.draft is not None
    assert (again.draft.body, again.draft.seconds) == ({"ranks": [1, 1, 2, 3]}, 7.5)
    rank(store, ada, again)
    assert open_task(store, ada, first.task_id).draft is None


def test_the_last_slot_is_one_persons(store: Store) -> None:
    project = project_with(store, "ranking", n=2)
    ada, bob, eve = (person(store, name) for name in ("Ada", "Bob", "Eve"))
    task = given(store, ada, project)
    assert given(store, bob, project).task_id == task.task_id
    assert next_task(store, eve, project) is None
    skip(store, bob, task.task_id, "not my field")
    assert given(store, eve, project).task_id == task.task_id
    assert next_task(store, bob, project) is None  # a skipped task does not come back


def test_a_reservation_ends_but_work_is_never_lost(tmp_path: Path) -> None:
    clock = Clock()
    store = Store(str(tmp_path / "labels.db"), clock=clock, reserved_seconds=100)
    project = project_with(store, "ranking")
    ada, bob = person(store, "Ada"), person(store, "Bob")
    task = given(store, ada, project)
    clock.now += 90
    save_draft(store, ada, task.task_id, {})
    clock.now += 90
    assert next_task(store, bob, project) is None  # the draft prolonged it
    clock.now += 20
    assert given(store, bob, project).task_id == task.task_id
    assert next_task(store, ada, project) is None  # Bob has it now
    rank(store, bob, task_for(store, bob, task.task_id))
    rank(store, ada, task)  # late, but said: it counts as one more
    assert len(current(store, project)) == 2
    assert progress(store, project).filled == progress(store, project).slots == 1


def task_for(store: Store, labeler: int, task_id: int) -> Assignment:
    return open_task(store, labeler, task_id)


def current(store: Store, project: int) -> list[object]:
    with store.reading() as connection:
        return [a for a in answers_of(connection, project) if a.state == "answered"]


def test_many_people_at_once_never_share_a_slot(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "labels.db"))
    project = project_with(store, "ranking", items=12, n=2)
    people = [person(store, f"p{i}") for i in range(8)]

    def work(labeler: int) -> int:
        own = Store(str(tmp_path / "labels.db"))  # a connection pool of its own, as another process has
        done = 0
        while task := next_task(own, labeler, project):
            rank(own, labeler, task)
            done += 1
        own.close()
        return done

    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(work, people))
    assert sum(done) == 12 * 2
    for task in list_tasks(store, project):
        with store.reading() as connection:
            assert len(answers_of(connection, project, task_id=task.id)) == 2


def test_many_people_ask_for_one_last_slot(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "labels.db"))
    project = project_with(store, "ranking", items=1, n=1)
    people = [person(store, f"p{i}") for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        tasks = list(pool.map(lambda labeler: next_task(store, labeler, project), people))
    assert sum(task is not None for task in tasks) == 1


def test_an_edit_supersedes(store: Store) -> None:
    project = project_with(store, "ranking", items=2)
    ada = person(store)
    tasks = [given(store, ada, project)]
    rank(store, ada, tasks[0])
    tasks.append(given(store, ada, project))
    rank(store, ada, tasks[1])
    submit(store, ada, tasks[0].task_id, {"ranks": [1, 1, 1, 1]}, order=tasks[0].order, seconds=2)
    assert open_task(store, ada, tasks[0].task_id).answer == {"ranks": [1, 1, 1, 1]}
    assert [done.task_id for done in history(store, ada, project)] == [task.task_id for task in tasks]
    with store.reading() as connection:
        assert [a.revisions for a in answers_of(connection, project)] == [1, 0]
    skip(store, ada, tasks[0].task_id, "on second thought: no")
    assert [done.state for done in history(store, ada, project)] == ["skipped", "answered"]
    assert progress(store, project).filled == 1  # its slot is open again


def test_a_click_sent_twice_counts_once(store: Store) -> None:
    project = project_with(store, "ranking", items=2)
    ada, bob = person(store, "Ada"), person(store, "Bob")
    task = given(store, ada, project)
    assert rank(store, ada, task, key="click 1") == rank(store, ada, task, key="click 1")
    with store.reading() as connection:
        assert answers_of(connection, project)[0].revisions == 0
    other = given(store, bob, project)
    assert rank(store, bob, other, key="click 1") != rank(
        store, ada, task, key="click 1"
    )  # keys are one's own


def test_nobody_sees_others_before_answering(store: Store) -> None:
    project = project_with(store, "ranking", n=2)
    ada, bob = person(store, "Ada"), person(store, "Bob")
    task = given(store, ada, project)
    rank(store, ada, task)
    mine = given(store, bob, project)
    with pytest.raises(UserError, match="answer it first"):
        others(store, bob, task.task_id)
    skip(store, bob, task.task_id, "hm")
    with pytest.raises(UserError, match="answer it first"):
        others(store, bob, task.task_id)
    rank(store, bob, mine)
    assert [answer.labeler.name for answer in others(store, bob, task.task_id)] == ["Ada"]


def test_what_was_not_given_cannot_be_touched(store: Store) -> None:
    project = project_with(store, "ranking", items=2)
    ada, bob = person(store, "Ada"), person(store, "Bob")
    task = given(store, ada, project)
    for act in (
        lambda: rank(store, bob, task),
        lambda: skip(store, bob, task.task_id, "x"),
        lambda: flag(store, bob, task.task_id, "x"),
        lambda: save_draft(store, bob, task.task_id, {}),
        lambda: open_task(store, bob, task.task_id),
    ):
        with pytest.raises(UserError, match="not yours"):
            act()
    with pytest.raises(UserError, match="task 5: not in this store"):
        open_task(store, ada, 5)
    with pytest.raises(UserError, match="another order"):
        submit(store, ada, task.task_id, {"ranks": [1, 2, 3, 4]}, order=task.order[::-1], seconds=1)
    for seconds in (-1.0, float("nan"), "9"):
        with pytest.raises(UserError, match="seconds"):
            submit(store, ada, task.task_id, {"ranks": [1, 2, 3, 4]}, order=task.order, seconds=seconds)  # type: ignore[arg-type]
    revoke(store, ada)
    with pytest.raises(UserError, match="link has ended"):
        rank(store, ada, task)
    assert given(store, bob, project).task_id == task.task_id  # what Ada held is free again


def test_flags_are_kept_and_the_task_stays(store: Store) -> None:
    project = project_with(store, "ranking")
    ada = person(store)
    task = given(store, ada, project)
    flag(store, ada, task.task_id, "names a real person")
    assert given(store, ada, project).flags == ("names a real person",)


def test_items_wait_for_their_outputs(store: Store) -> None:
    project = add_project(store, ProjectSettings("p", ("ranking",)))
    ada = person(store)
    first, second = (add_item(store, project, text) for text in ("one", "two"))
    assert next_task(store, ada, project) is None
    assert [item.id for item in waiting_items(store, project)] == [first, second]
    fail_item(store, first, "the model is gone")
    assert get_item(store, first).error == "the model is gone"
    with pytest.raises(UserError, match="1 outputs; this project needs 2 to 9"):
        add_outputs(store, second, [Output("x", "m")])
    add_outputs(store, second, [Output("x", "m"), Output("y", "m")])
    assert given(store, ada, project).item_id == second
    with pytest.raises(UserError, match="has its outputs already"):
        add_outputs(store, second, [Output("x", "m"), Output("y", "m")])
    assert progress(store, project).items == {"waiting": 0, "ready": 1, "failed": 1}
    add_outputs(store, first, [Output("x", "m"), Output("y", "m")])  # a second try
    assert get_item(store, first).error is None


def test_a_prompt_of_ones_own_is_nobody_elses_task(store: Store) -> None:
    project = add_project(store, ProjectSettings("p", ("demonstration",), labelers_per_item=3))
    ada, bob = person(store, "Ada"), person(store, "Bob")
    item = write_prompt(store, ada, project, "Why is the sky blue?", "Rayleigh.", key="k")
    assert write_prompt(store, ada, project, "Why is the sky blue?", "Rayleigh.", key="k") == item
    assert next_task(store, bob, project) is None
    assert get_item(store, item).author_id == ada
    (done,) = history(store, ada, project)
    again = open_task(store, ada, done.task_id)
    assert again.answer == {"text": "Rayleigh."}
    submit(store, ada, done.task_id, {"text": "Scattering."}, order=again.order, seconds=1)
    assert open_task(store, ada, done.task_id).answer == {"text": "Scattering."}
    other = project_with(store, "ranking", name="other")
    with pytest.raises(UserError, match="takes no demonstrations"):
        write_prompt(store, ada, other, "x", "y")


@pytest.mark.parametrize(("asked", "number"), [(None, 6), (2, 2), (99, 6)])
def test_a_pairwise_project_asks_about_pairs(store: Store, asked: int | None, number: int) -> None:
    project = add_project(store, ProjectSettings("p", ("pairwise",), pairs_per_prompt=asked))
    add_item(store, project, "one", outputs=[Output(f"o{j}", "m") for j in range(4)])
    pairs = [task.outputs for task in list_tasks(store, project)]
    assert len(set(pairs)) == len(pairs) == number
    assert all(first < second for first, second in pairs)


def test_a_judges_answer_is_shown_only_where_wanted(store: Store) -> None:
    project = project_with(store, "ranking", n=2)
    (task,) = list_tasks(store, project)
    add_prefill(store, task.id, {"ranks": [1, 2, 3, 4]}, "rule: shorter")
    ada, bob = person(store, "Ada"), person(store, "Bob")
    assert given(store, ada, project).prefill is None
    edit_project(store, project, prefill=True)
    for who, changes in ((ada, False), (bob, True)):
        shown = given(store, who, project)
        assert shown.prefill is not None
        # the judge ranked by the item's order; the page gets it in its own
        assert shown.prefill.answer == {"ranks": [int(text[-1]) + 1 for text in shown.outputs]}
        said = {"ranks": [1, 1, 1, 1]} if changes else shown.prefill.answer
        submit(store, who, task.id, said, order=shown.order, seconds=1)
    with store.reading() as connection:
        assert [(a.judge, a.changed) for a in answers_of(connection, project)] == [
            ("rule: shorter", False),
            ("rule: shorter", True),
        ]


def test_progress_counts(store: Store) -> None:
    project = project_with(store, "ranking", items=3, n=2)
    ada, bob = person(store, "Ada"), person(store, "Bob")
    rank(store, ada, given(store, ada, project))
    rank(store, bob, given(store, bob, project))
    task = given(store, ada, project)
    skip(store, ada, task.task_id, "x")
    found = progress(store, project, ada)
    assert (found.slots, found.filled) == (6, 2)
    assert (found.mine_answered, found.mine_skipped, found.open_for_me) == (1, 1, 1)
    assert get_labeler(store, ada).handle == f"labeler-{ada}"
