"""What the page's addresses answer, without a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from fledge.serve.page import FOLDERS, page_routes

from .test_corrections import BODY


def client(corrections: Path | None = None, **options: Any) -> TestClient:
    return TestClient(Starlette(routes=page_routes(["tiny"], corrections)), **options)


def test_the_page_loads_only_what_the_package_holds(tmp_path: Path) -> None:
    asked = ["/"]
    for path in asked:
        answer = client().get(path)
        assert answer.status_code == 200, path
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "require-trusted-types-for 'script'" in answer.headers["content-security-policy"]
        text = answer.text
        assert not re.search(r"""(?:src|href|from|import|url)\s*[=(]?\s*["'(]?(?:https?:)?//""", text), path
        found = re.findall(r"""(?:src|href)="(/[^"]+)"|from "\./([^"]+)\"""", text)
        asked += [p for p in (whole or f"/assets/{name}" for whole, name in found) if p not in asked]
    assert {Path(path).name for path in asked[1:]} >= {file.name for file in FOLDERS[0].glob("*.[jc]s*")}


def test_no_script_makes_html_or_code() -> None:
    for file in FOLDERS[0].glob("*.js"):
        text = file.read_text(encoding="utf-8")
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text
        )


@pytest.mark.parametrize("name", ["page.py", "..%2Fpage.py", "%2e%2e", "chat.html", "none.js"])
def test_nothing_else_is_given_out(name: str) -> None:
    answer = client().get(f"/assets/{name}")
    assert answer.status_code == 404


def test_a_correction_is_stored_once(tmp_path: Path) -> None:
    path = tmp_path / "corrections.jsonl"
    browser = client(path)
    assert 'data-corrections="yes"' in browser.get("/").text
    for _ in range(2):
        assert browser.post("/corrections", json=BODY | {"key": "1"}).json() == {"stored": True}
    (row,) = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert row["chosen"][0]["content"] == BODY["correction"]


def test_refusals_are_openais_error_object(tmp_path: Path) -> None:
    browser = client(tmp_path / "corrections.jsonl")
    refused = browser.post("/corrections", json=BODY | {"model": "other"})
    assert refused.status_code == 400
    assert refused.json()["error"]["type"] == "invalid_request_error"
    assert "this server has tiny" in refused.json()["error"]["message"]
    without = client()
    assert 'data-corrections="no"' in without.get("/").text
    assert without.post("/corrections", json=BODY).status_code == 404
    assert (tmp_path / "corrections.jsonl").read_bytes() == b""


def test_another_sites_page_stores_nothing(tmp_path: Path) -> None:
    browser = client(tmp_path / "corrections.jsonl")
    there = {"origin": "http://evil.example"}
    assert browser.post("/corrections", json=BODY, headers=there).status_code == 403
    plain = {"content-type": "text/plain"}
    assert browser.post("/corrections", content=json.dumps(BODY), headers=plain).status_code == 403
    assert (tmp_path / "corrections.jsonl").read_bytes() == b""


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    browser = client(tmp_path / "corrections.jsonl")

    def full(*_: Any) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fledge.serve.corrections.CorrectionFile.add", full)
    answer = browser.post("/corrections", json=BODY)
    assert answer.status_code == 500
    assert "No space left on device" in answer.json()["error"]["message"]
