"""What the server refuses, and the headers of all it says."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI
from starlette.testclient import TestClient

from fledge.errors import UserError
from fledge.web.security import MAX_BODY_BYTES, json_body, protected


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()

    def take(body: Annotated[dict[str, Any], Depends(json_body)]) -> dict[str, Any]:
        return body

    app.post("/take")(take)
    app.get("/page")(lambda: {"a": 1})
    return TestClient(protected(app), base_url="http://here.example")


def test_every_answer_has_the_headers(client: TestClient) -> None:
    for answer in (client.get("/page"), client.get("/nowhere"), client.post("/take", content="x")):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://here.example:81", "http://here.example.evil.example"]
)
def test_another_sites_page_changes_nothing(client: TestClient, origin: str) -> None:
    assert client.post("/take", json={}, headers={"origin": origin}).status_code == 403


def test_what_a_form_can_send_is_refused(client: TestClient) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert client.post("/take", content="{}", headers={"content-type": kind}).status_code == 403
    assert client.post("/take", json={"a": 1}, headers={"origin": "http://here.example"}).json() == {"a": 1}


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '"a"', '{"a": "\\ud800"}', "[" * 100_000, "x" * (MAX_BODY_BYTES + 1)]
)
def test_what_is_no_json_object_is_a_users_mistake(client: TestClient, content: str) -> None:
    with pytest.raises(UserError):
        client.post("/take", content=content, headers={"content-type": "application/json"})
