"""The labelling server over HTTP: who gets in, what labelers see and never see, and that answers arrive."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from fledge.feedback.app import make_app
from fledge.feedback.people import list_labelers, revoke
from fledge.feedback.site import Site

from .live import OUTPUTS, Labelling, labelling


def client_of(made: Labelling, name: str | None = None, **site: Any) -> TestClient:
    """A browser that came with somebody's link, or with none."""
    client = TestClient(make_app(Site(made.store, made.project_id, **site)), base_url="http://localhost:8000")
    if name is not None:
        assert client.get(f"/s/{made.tokens[name]}").status_code == 200
    return client


def data_of(page: str) -> dict[str, Any]:
    """What the page hands to its script."""
    found = re.search(r'<script type="application/json" id="task">(.*?)</script>', page)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


@pytest.fixture
def ranking(tmp_path: Path) -> Labelling:
    return labelling(tmp_path, "ranking")


PAGES = [
    "/",
    "/next",
    "/history",
    "/write",
    "/task/1000",
    "/admin",
    "/admin/status",
    "/admin/people",
    "/admin/export/ranked",
]
ADMIN_PAGES = [
    "/admin",
    "/admin/status",
    "/admin/people",
    "/admin/instructions",
    "/admin/disagreements",
    "/admin/export/ranked",
    "/admin/task/1000",
    "/admin/people/1/export",
]


@pytest.mark.parametrize("path", PAGES)
def test_nobody_gets_in_without_a_link(ranking: Labelling, path: str) -> None:
    client = client_of(ranking)
    for token in ("", "wrong", ranking.tokens["ann"] + "x"):
        client.cookies.set("fledge-8000", token)
        assert client.get(path).status_code == 401
    assert client.get("/s/wrong").status_code == 401
    assert client.post("/task/1000/answer", json={}).status_code == 401


@pytest.mark.parametrize("path", ADMIN_PAGES)
def test_admin_pages_are_for_admins(ranking: Labelling, path: str) -> None:
    assert client_of(ranking, "ann").get(path).status_code == 401


@pytest.mark.parametrize(
    "path",
    [
        "/admin/people",
        "/admin/people/1/renew",
        "/admin/people/1/revoke",
        "/admin/people/1/purge",
        "/admin/instructions",
    ],
)
def test_labelers_change_nothing_of_the_admins(ranking: Labelling, path: str) -> None:
    assert client_of(ranking, "ann").post(path, json={"name": "x"}).status_code == 401
    assert [person.name for person in list_labelers(ranking.store)] == ["ann", "bob", "admin"]


def test_the_secret_is_in_a_cookie_that_scripts_cannot_read(ranking: Labelling) -> None:
    answer = client_of(ranking).get(f"/s/{ranking.tokens['ann']}", follow_redirects=False)
    assert answer.headers["location"] == "/"
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=lax" in cookie


def test_signing_out_ends_the_browser_not_the_link(ranking: Labelling) -> None:
    client = client_of(ranking, "ann")
    assert client.post("/leave", json={}).json() == {"next": "/"}
    assert client.get("/next").status_code == 401
    assert client.get(f"/s/{ranking.tokens['ann']}").status_code == 200


def test_a_revoked_link_ends_at_once(ranking: Labelling) -> None:
    client = client_of(ranking, "ann")
    assert client.get("/next").status_code == 200
    revoke(ranking.store, ranking.ids["ann"])
    assert client.get("/next").status_code == 401


def test_what_a_labeler_must_not_see(ranking: Labelling) -> None:
    page = client_of(ranking, "ann").get("/next").text
    assert "secret-model" not in page
    assert all(text.split()[0].strip("*") in page for text in OUTPUTS)


def test_orders_differ_between_labelers_and_are_recorded(tmp_path: Path) -> None:
    made = labelling(tmp_path, "ranking", people=[f"p{i}" for i in range(8)], labelers_per_item=8)
    orders = set()
    for name in (f"p{i}" for i in range(8)):
        client = client_of(made, name)
        data = data_of(client.get("/next").text)
        orders.add(tuple(data["order"]))
        # The output at place i of the page gets rank i + 1.
        body = {"answer": {"ranks": [1, 2, 3, 4]}, "order": data["order"], "seconds": 5, "key": name}
        assert client.post(f"/task/{data['id']}/answer", json=body).json() == {"next": "/next"}
        (stored,) = made.answers(name)
        assert list(stored["order"]) == data["order"]
        assert stored["answer"]["ranks"] == [1 + data["order"].index(place) for place in range(4)]
    assert len(orders) > 1


def test_nobody_sees_others_before_answering(tmp_path: Path) -> None:
    made = labelling(tmp_path, "pairwise", labelers_per_item=2, outputs=OUTPUTS[:2])
    ann, bob = client_of(made, "ann"), client_of(made, "bob")
    first = data_of(ann.get("/next").text)
    body = {"answer": {"choice": "both_bad"}, "order": first["order"], "seconds": 1, "key": "a"}
    ann.post(f"/task/{first['id']}/answer", json=body)
    page = bob.get("/next").text
    assert "What others said" not in page
    assert bob.get(f"/admin/task/{first['id']}").status_code == 401
    data = data_of(page)
    body = {"answer": {"choice": "tie"}, "order": data["order"], "seconds": 1, "key": "b"}
    bob.post(f"/task/{data['id']}/answer", json=body)
    page = bob.get(f"/task/{data['id']}").text
    assert "What others said" in page
    assert "both bad" in page
    assert ">ann<" not in page


def test_another_persons_task_is_refused(ranking: Labelling) -> None:
    data = data_of(client_of(ranking, "ann").get("/next").text)
    bob = client_of(ranking, "bob")
    assert bob.get(f"/task/{data['id']}").status_code == 400
    body = {"answer": {"ranks": [1, 2, 3, 4]}, "order": data["order"], "seconds": 1}
    assert bob.post(f"/task/{data['id']}/answer", json=body).status_code == 400
    assert ranking.answers("bob") == []


@pytest.mark.parametrize("body", [
    {}, {"answer": None}, {"answer": {"ranks": [1, 2, 3]}}, {"answer": {"ranks": [1, 2, None, 3]}},
    {"answer": {"ranks": [1, 2, 3, 4]}}, {"answer": {"ranks": [1, 2, 3, 4]}, "order": "0123"},
    {"answer": {"ranks": [1, 2, 3, 4]}, "order": [0, 1, 2, 3, 4], "seconds": "x"},
])  # fmt: skip
def test_a_broken_answer_is_one_line_and_changes_nothing(ranking: Labelling, body: dict[str, Any]) -> None:
    client = client_of(ranking, "ann")
    data = data_of(client.get("/next").text)
    answer = client.post(f"/task/{data['id']}/answer", json=body)
    assert answer.status_code == 400
    assert "\n" not in answer.json()["error"]
    assert ranking.answers("ann") == []


def test_the_same_click_counts_once(ranking: Labelling) -> None:
    client = client_of(ranking, "ann")
    data = data_of(client.get("/next").text)
    body = {"answer": {"ranks": [1, 1, 3, 4]}, "order": data["order"], "seconds": 2, "key": "click"}
    for _ in range(3):
        assert client.post(f"/task/{data['id']}/answer", json=body).status_code == 200
    (stored,) = ranking.answers("ann")
    assert stored["revisions"] == 0


def test_a_draft_comes_back(ranking: Labelling) -> None:
    client = client_of(ranking, "ann")
    data = data_of(client.get("/next").text)
    client.post(f"/task/{data['id']}/draft", json={"body": {"ranks": [2, None, None, 1]}, "seconds": 7.5})
    again = data_of(client_of(ranking, "ann").get("/next").text)
    assert (again["start"], again["seconds"]) == ({"ranks": [2, None, None, 1]}, 7.5)


def test_hostile_texts_stay_texts_everywhere(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    made = labelling(
        tmp_path, "correction", prompts=[evil], outputs=[evil], people=[evil], labelers_per_item=2
    )
    client = client_of(made, evil)
    data = data_of(client.get("/next").text)
    assert data["original"] == evil
    client.post(f"/task/{data['id']}/flag", json={"reason": evil, "key": "f"})
    body = {"answer": {"text": evil + "!"}, "order": data["order"], "seconds": 1, "key": "a"}
    assert client.post(f"/task/{data['id']}/answer", json=body).status_code == 200
    pages = [client.get(path).text for path in ("/", "/history", f"/task/{data['id']}")]
    admin = client_of(made, "admin")
    paths = ("/admin", "/admin/people", "/admin/disagreements", f"/admin/task/{data['id']}")
    pages += [admin.get(path).text for path in paths]
    for page in pages:
        assert "<img" not in page
        assert not re.search(r"<script(?! src| type)", page)
        assert page.count("<script") == page.count("</script>")
    assert sum("alert(1)" in page for page in pages) >= 6


def test_simulated_labels_are_marked_on_every_page(tmp_path: Path) -> None:
    from fledge.feedback.labelling import next_task, submit
    from fledge.feedback.people import add_labeler

    made = labelling(tmp_path, "pairwise", outputs=OUTPUTS[:2], labelers_per_item=2)
    assert "simulated" not in client_of(made, "ann").get("/").text
    labeler, _ = add_labeler(made.store, "a rule", simulated=True)
    task = next_task(made.store, labeler.id, made.project_id)
    assert task is not None
    submit(made.store, labeler.id, task.task_id, {"choice": "a"}, order=task.order, seconds=1)
    pages = ("/admin", "/admin/people", "/admin/instructions", "/admin/disagreements")
    admin_pages = (*pages, f"/admin/task/{task.task_id}")
    for name, paths in {"ann": ("/", "/next", "/history"), "admin": admin_pages}.items():
        client = client_of(made, name)
        for path in paths:
            assert '<span class="badge open">simulated</span>' in client.get(path).text, path


def test_the_admin_invites_renews_ends_and_purges(ranking: Labelling) -> None:
    admin = client_of(ranking, "admin")
    made = admin.post("/admin/people", json={"name": "Cleo", "role": "labeler"}).json()
    path = made["link"].removeprefix("http://localhost:8000")
    cleo = client_of(ranking)
    assert cleo.get(path).status_code == 200
    cleo_id = next(person.id for person in list_labelers(ranking.store) if person.name == "Cleo")
    second = admin.post(f"/admin/people/{cleo_id}/renew", json={}).json()["link"]
    assert cleo.get("/next").status_code == 401
    assert cleo.get(second.removeprefix("http://localhost:8000")).status_code == 200
    assert admin.get(f"/admin/people/{cleo_id}/export").json()["labeler"]["name"] == "Cleo"
    assert admin.post(f"/admin/people/{cleo_id}/revoke", json={}).status_code == 200
    assert cleo.get("/next").status_code == 401
    assert admin.post(f"/admin/people/{cleo_id}/purge", json={}).status_code == 200
    assert "Cleo" not in admin.get("/admin/people").text
    # Nobody shuts themselves out.
    assert admin.post(f"/admin/people/{ranking.ids['admin']}/purge", json={}).status_code == 409
    assert admin.post("/admin/people", json={"name": " "}).status_code == 400


def test_settings_are_changed_and_shown(ranking: Labelling) -> None:
    admin = client_of(ranking, "admin")
    body = {"instructions": "Be *strict*.", "labelers_per_item": 3, "prefill": True}
    assert admin.post("/admin/instructions", json=body).status_code == 200
    assert "Be <em>strict</em>." in client_of(ranking, "ann").get("/next").text
    assert 'value="3"' in admin.get("/admin/instructions").text
    assert admin.post("/admin/instructions", json={"labelers_per_item": 0}).status_code == 400


def test_a_prefill_is_shown_as_such_and_only_where_it_is_on(tmp_path: Path) -> None:
    from fledge.feedback.store import add_prefill, edit_project, list_tasks

    made = labelling(tmp_path, "pairwise", outputs=OUTPUTS[:2])
    (task,) = list_tasks(made.store, made.project_id)
    add_prefill(made.store, task.id, {"choice": "a"}, "judge-7")
    page = client_of(made, "ann").get("/next").text
    assert "judge-7" not in page
    assert data_of(page)["start"] is None
    edit_project(made.store, made.project_id, prefill=True)
    page = client_of(made, "ann").get("/next").text
    assert "filled in by a judge" in page
    data = data_of(page)
    assert data["start"] == {"choice": "a" if data["order"] == [0, 1] else "b"}


def test_exports_are_downloads(ranking: Labelling) -> None:
    client = client_of(ranking, "ann")
    data = data_of(client.get("/next").text)
    body = {"answer": {"ranks": [1, 2, 2, 4]}, "order": data["order"], "seconds": 2, "key": "k"}
    client.post(f"/task/{data['id']}/answer", json=body)
    admin = client_of(ranking, "admin")
    answer = admin.get("/admin/export/ranked")
    assert "attachment" in answer.headers["content-disposition"]
    (row,) = map(json.loads, answer.text.splitlines())
    texts = [messages[-1]["content"] for messages in row["completions"]]
    by_text = dict(zip(texts, row["ranks"], strict=True))
    assert by_text == {OUTPUTS[place]: (1, 2, 2, 4)[i] for i, place in enumerate(data["order"])}
    assert admin.get("/admin/export/nothing").status_code == 404


def test_it_says_when_prompts_are_being_prepared(tmp_path: Path) -> None:
    from fledge.feedback.store import add_item, fail_item, list_items

    made = labelling(tmp_path, "ranking", prompts=[])
    add_item(made.store, made.project_id, "Soon?")
    waiting = client_of(made, "ann", status=lambda: {"running": True, "error": None}).get("/next").text
    assert "1 prompt is still getting outputs" in waiting
    assert "data-check-again" in waiting
    assert "Nothing is left" in client_of(made, "ann").get("/next").text
    admin = client_of(made, "admin", status=lambda: {"running": False, "error": "no <b>connection"})
    assert "no &lt;b&gt;connection" in admin.get("/admin").text
    (item,) = list_items(made.store, made.project_id)
    fail_item(made.store, item.id, "the prompt is too long")
    page = admin.get("/admin").text
    assert "1 could not be answered" in page
    assert "the prompt is too long" in page


@pytest.mark.parametrize("name", ["../app.py", "task.html", "..%2fapp.py", "nothing.js", "%2e%2e/app.py"])
def test_only_assets_are_served(ranking: Labelling, name: str) -> None:
    assert client_of(ranking, "ann").get(f"/assets/{name}").status_code == 404
    assert client_of(ranking).get("/assets/task.js").headers["content-type"].startswith("text/javascript")
