"""The chat page over the real server; tiny models with random weights write all that a tokenizer can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from fledge.serve.app import make_app
from fledge.serve.guard import Limits
from fledge.serve.keys import Doorkeeper
from fledge.serve.service import Service

from .real import load, make_tokenizer, save_random_model, serving
from .scripted import PHONE, say
from .test_corrections import BODY

pytestmark = pytest.mark.slow

PARTS = """() => JSON.parse(sessionStorage.getItem("fledge-chat")).turns.flatMap(
  (turn) => turn.slots.flatMap((slot) => slot.versions.map((version) => version.parts[0])))"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    tokenizer, folder = make_tokenizer(), tmp_path_factory.mktemp("models")
    for name in ("base", "aligned"):
        save_random_model(folder / name, tokenizer, tied=name == "base")
    return [folder / "base", folder / "aligned"]


def greedy(page: Any, tokens: int) -> None:
    page.click("#settings")
    page.fill("#temperature", "0")
    page.fill("#max_tokens", str(tokens))
    page.click("#settings")


def test_answers_their_tokens_and_a_branch(models: list[Path], visit: Any) -> None:
    with serving(*(load(model, model.name) for model in models)) as server:
        page = visit(server)
        greedy(page, 40)
        say(page, "Hello")
        assert page.locator(".answer").count() == 2
        for part in page.evaluate(PARTS):
            assert part["error"] is None
            assert part["finish"] in ("length", "stop")
            told = "".join(token["t"] for token in part["tokens"] if "x" not in token)
            assert part["text"] in (told, told + "\ufffd")  # the end may be half a character
            for token in part["tokens"]:
                logps = [candidate["l"] for candidate in token["c"]]
                assert len(logps) == 10
                assert logps == sorted(logps, reverse=True)
                assert token["l"] == logps[0]  # greedy
        # Branching with the token that came anyway changes nothing, where its text is cut the same way again.
        before = page.evaluate(PARTS)[1]
        assert all("b" not in token for token in before["tokens"][:3])
        page.locator(".answer[data-model=aligned] .token[data-token='2']").first.click()
        page.click("#card .bar.came")
        page.wait_for_selector("#send:visible")
        again = page.evaluate(PARTS)[2]
        first = before["tokens"][2]
        assert again["from"]["text"] == sum(len(token["t"]) for token in before["tokens"][:3])
        assert again["text"][: len(before["text"])] == before["text"]
        assert again["tokens"][2] == first
        # Another candidate: what the reader took stands there, and the model went on from it.
        page.locator(".answer[data-model=aligned] .token[data-token='1']").first.click()
        page.click("#card .bar:not(.came):not(.rest):not(:disabled) >> nth=0")
        page.wait_for_selector("#send:visible")
        other = page.evaluate(PARTS)[3]
        assert other["error"] is None
        assert other["text"].startswith(before["tokens"][0]["t"] + other["tokens"][1]["t"])
        assert other["tokens"][1]["t"] != before["tokens"][1]["t"]
        page.click("#view")
        page.click("#shade")
        say(page, "And then?")
        assert [part["error"] for part in page.evaluate(PARTS)] == [None] * 6


def test_one_column_on_a_phone_and_stopping(models: list[Path], visit: Any) -> None:
    with serving(*(load(model, model.name) for model in models)) as server:
        page = visit(server, **PHONE)
        greedy(page, 900)
        page.fill("#prompt", "Hello")
        page.tap("#send")
        page.wait_for_selector(".token >> nth=20")
        page.tap("#stop")
        page.wait_for_selector("#send:visible")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        first, second = (one.bounding_box() for one in page.locator(".answer").all())
        assert second["y"] >= first["y"] + first["height"]


def test_the_servers_own_errors_are_told(models: list[Path], visit: Any) -> None:
    with serving(load(models[0], "base"), keys=("a-secret-key",)) as server:
        page = visit(server, ready=False)
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#api-key", "a-secret-key")
        page.keyboard.press("Enter")
        page.wait_for_selector("html[data-ready]")
        page.problems.clear()  # the browser logs the 401
        page.click("#settings")
        page.fill("#top_p", "7")
        say(page, "Hello")
        assert "top_p" in page.inner_text(".note")
        page.fill("#top_p", "")
        page.fill("#max_tokens", "5")
        page.click("text=Retry")
        page.wait_for_selector(".figures:has-text('tokens')")
        page.problems.clear()  # the browser logs the 400


def test_the_page_is_open_and_corrections_want_the_key(models: list[Path], tmp_path: Path) -> None:
    served, path = load(models[0]), tmp_path / "corrections.jsonl"
    try:
        door = Doorkeeper(("a-secret-key",), True)
        app = make_app(Service({"tiny": served}, 4), limits=Limits(), door=door, corrections=path)
        browser = TestClient(app, base_url="http://localhost")
        assert browser.get("/").status_code == browser.get("/assets/chat.js").status_code == 200
        refused = browser.post("/corrections", json=BODY)
        assert (refused.status_code, path.read_bytes()) == (401, b"")
        key = {"authorization": "Bearer a-secret-key"}
        assert browser.post("/corrections", json=BODY, headers=key).status_code == 200
        assert path.read_bytes().count(b"\n") == 1
    finally:
        served.worker.close()
