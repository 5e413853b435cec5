"""The chat page in a real browser, over a server that answers by script."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fledge.data.preferences import read_rankings

from .scripted import ANSWER, CALLS, Scripted, answers, say, served, texts

pytestmark = pytest.mark.slow


# --- asking ---------------------------------------------------------------------------------------


def test_a_conversation(visit: Any) -> None:
    with served(Scripted()) as made:
        page = visit(made)
        page.keyboard.type("first")  # the field has the focus
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("line")
        page.keyboard.press("Enter")
        page.wait_for_selector(".figures:has-text('tokens')")
        assert answers(page) == [ANSWER]
        assert page.input_value("#prompt") == ""
        say(page, "second")
        first, second = made.requests
        assert texts(first["messages"]) == [("user", "first\nline")]
        asked = [("user", "first\nline"), ("assistant", ANSWER), ("user", "second")]
        assert texts(second["messages"]) == asked
        assert (first["stream"], first["logprobs"], first["top_logprobs"]) == (True, True, 10)
        assert first["stream_options"] == {"include_usage": True}
        assert (first["temperature"], first["max_tokens"]) == (0.8, 512)
        assert "seed" not in first and "continue_final_message" not in first
        page.reload()
        page.wait_for_selector("html[data-ready]")
        assert answers(page) == [ANSWER, ANSWER]  # it survives a reload
        page.click("#clear")
        assert answers(page) == []
        page.click("#line >> text=Undo")
        assert answers(page) == [ANSWER, ANSWER]
        page.click("#clear")
        page.reload()
        page.wait_for_selector("#welcome:visible")
        assert answers(page) == []


def test_stopping_tells_the_server(visit: Any) -> None:
    with served(Scripted()) as made:
        page = visit(made)
        stops = (
            lambda: page.keyboard.press("Escape"),
            lambda: page.click("#stop"),
            lambda: page.click(".answer >> text=Stop"),
        )
        for stop in stops:
            page.fill("#prompt", "slow")
            page.press("#prompt", "Enter")
            page.wait_for_selector(".turn:last-child .token >> nth=5")
            stop()
            page.wait_for_selector(".turn:last-child .note:has-text('Stopped.')")
            page.click("#clear")
        for _ in range(50):
            if len(made.gone) == 3:
                break
            page.wait_for_timeout(50)
        assert made.gone == ["slow"] * 3


def test_continuing_what_was_cut(visit: Any) -> None:
    with served(Scripted()) as made:
        page = visit(made)
        say(page, "cut")
        assert "Cut off at max tokens." in answers(page)[0]
        page.click("text=Continue")
        page.wait_for_selector("#send:visible")
        assert answers(page)[0].startswith(ANSWER + " Then it goes on.")
        body = made.requests[-1]
        assert texts(body["messages"]) == [("user", "cut"), ("assistant", ANSWER)]
        assert (body["add_generation_prompt"], body["continue_final_message"]) == (False, True)


def test_editing_asks_anew_and_can_be_undone(visit: Any) -> None:
    with served(Scripted()) as made:
        page = visit(made)
        for text in ("one", "two", "three"):
            say(page, text)
        page.click(".turn:nth-child(2) .user >> text=Edit")
        page.keyboard.press("Control+a")
        page.keyboard.type("other")
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("#line >> text=Undo")
        page.wait_for_selector("#send:visible")
        assert page.locator(".said").all_inner_texts() == ["one", "other"]
        assert [text for _, text in texts(made.requests[-1]["messages"])] == ["one", ANSWER, "other"]
        page.click("#line >> text=Undo")
        assert page.locator(".said").all_inner_texts() == ["one", "two", "three"]
        page.focus("#prompt")
        page.keyboard.press("ArrowUp")  # edits the last message
        assert page.input_value(".turn:nth-child(3) .user textarea") == "three"
        page.keyboard.press("Escape")
        assert page.locator(".said").all_inner_texts() == ["one", "two", "three"]
        # An answer too: what the reader wrote goes to the model.
        page.click(".turn:nth-child(3) .answer >> text=Edit")
        page.fill(".turn:nth-child(3) .editor textarea", "Mine.")
        page.click("text=Keep")
        say(page, "four")
        assert texts(made.requests[-1]["messages"])[-2:] == [("assistant", "Mine."), ("user", "four")]


def test_regenerating_keeps_both_versions(visit: Any) -> None:
    with served(Scripted()) as made:
        page = visit(made)
        say(page, "markdown")
        page.click("text=Regenerate")
        page.wait_for_selector("#send:visible")
        assert page.text_content(".versions .small") == "2/2"
        page.click(".versions button >> nth=0")
        assert page.text_content(".versions .small") == "1/2"
        page.reload()
        page.wait_for_selector("html[data-ready]")
        assert page.text_content(".versions .small") == "1/2"


def test_models_side_by_side(visit: Any) -> None:
    with served(Scripted(models=("base", "sft", "aligned"))) as made:
        page = visit(made)
        say(page, "hello")
        boxes = [box.bounding_box() for box in page.locator(".answer").all()]
        assert [round(box["y"]) for box in boxes] == [round(boxes[0]["y"])] * 3  # columns
        page.click(".chip:text-is('sft')")
        say(page, "again")
        assert page.locator(".turn:nth-child(2) .answer").count() == 2
        for body in made.requests[3:]:  # each model reads its own answers
            assert body["messages"][1]["content"].startswith(f"{body['model']} says")
        page.click(".chip:text-is('sft')")
        say(page, "third")
        sft = next(body for body in made.requests[5:] if body["model"] == "sft")
        said = [
            message["content"].split()[0] for message in sft["messages"] if message["role"] == "assistant"
        ]
        assert said == ["sft", "base"]  # another's where it wasn't asked
        for name in ("base", "sft", "aligned"):
            page.click(f".chip:text-is('{name}')")
        page.fill("#prompt", "nobody")
        page.press("#prompt", "Enter")
        assert "Choose a model" in page.inner_text("#line")
        assert page.input_value("#prompt") == "nobody"
        assert len(made.requests) == 8


def test_settings_are_sent(visit: Any) -> None:
    with served(Scripted()) as made:
        page = visit(made)
        page.click("#settings")
        page.fill("#system", "Be brief.")
        values = {
            "temperature": "0",
            "top_p": "0.5",
            "top_k": "40",
            "min_p": ".1",
            "max_tokens": "9",
            "seed": "3",
        }
        for name, value in values.items():
            page.fill(f"#{name}", value)
        say(page, "hello")
        body = made.requests[0]
        sent = {name: body[name] for name in values}
        assert sent == {"temperature": 0, "top_p": 0.5, "top_k": 40, "min_p": 0.1, "max_tokens": 9, "seed": 3}
        assert texts(body["messages"]) == [("system", "Be brief."), ("user", "hello")]
        page.fill("#top_p", "much")
        page.fill("#prompt", "again")
        page.press("#prompt", "Enter")
        assert page.inner_text("#line") == "top_p is much; it must be a number."
        page.fill("#top_p", "")
        page.click("summary")
        page.fill("#tools", '[{"name": "add"')
        page.press("#prompt", "Enter")
        assert "no valid JSON" in page.inner_text("#line")
        assert len(made.requests) == 1
        page.fill("#tools", '[{"name": "add", "parameters": {}}]')
        say(page, "again")
        assert "top_p" not in made.requests[1]
        add = {"type": "function", "function": {"name": "add", "parameters": {}}}
        assert made.requests[1]["tools"] == [add]


def test_calls_of_tools(visit: Any) -> None:
    with served(Scripted()) as made:
        page = visit(made)
        say(page, "tool")
        assert page.locator(".call h4").all_inner_texts() == ["Calls get_weather", "Calls get_time"]
        assert json.loads(page.inner_text(".call pre >> nth=0")) == {"city": "Paris"}
        page.fill(".call textarea >> nth=0", "18 degrees")
        page.fill(".call textarea >> nth=1", "noon")
        page.click("text=Send results")
        page.wait_for_selector("#send:visible")
        _, call, first, second = made.requests[-1]["messages"]
        named = [(one["function"]["name"], one["function"]["arguments"]) for one in call["tool_calls"]]
        assert (call["content"], named) == ("Let me see.", CALLS)
        assert first == {"role": "tool", "tool_call_id": "call_0", "content": "18 degrees"}
        assert second == {"role": "tool", "tool_call_id": "call_1", "content": "noon"}
        assert ANSWER in answers(page)[0]
        assert "18 degrees" in answers(page)[0]


# --- what leaves the page -------------------------------------------------------------------------


def test_a_correction(tmp_path: Path, visit: Any) -> None:
    path = tmp_path / "corrections.jsonl"
    with served(Scripted(path)) as made:
        page = visit(made)
        say(page, "one")
        say(page, "two")
        page.click(".turn:nth-child(2) >> text=This answer is wrong")
        page.click("#store")
        assert page.inner_text("#wrong-problem") == "Nothing changed yet."
        page.fill("#correction", "Better.\n\u20ac")
        page.route("**/corrections", lambda route: route.abort())
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("#wrong-problem:has-text('No connection')")
        page.unroute("**/corrections")
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("#line:has-text('Stored')")
        (row,) = read_rankings(path)
        assert texts(row.prompt) == [("user", "one"), ("assistant", ANSWER), ("user", "two")]
        assert [turns[0]["content"] for turns in row.completions] == ["Better.\n\u20ac", ANSWER]
        stored = json.loads(path.read_text(encoding="utf-8"))
        assert stored["sampling"] == {"temperature": 0.8, "max_tokens": 512}
        page.problems.clear()  # the browser logs the request that was cut
    with served(Scripted()) as made:
        page = visit(made)
        say(page, "one")
        assert not page.is_visible("text=This answer is wrong")


def test_export(visit: Any) -> None:
    with served(Scripted(models=("base", "sft"))) as made:
        page = visit(made)
        say(page, "tool")

        def export(button: str) -> str:
            page.click("#export")
            with page.expect_download() as download:
                page.click(button)
            return str(download.value.path().read_text(encoding="utf-8"))

        rows = [json.loads(line) for line in export("#export-json").splitlines()]
        assert [row["model"] for row in rows] == ["base", "sft"]
        assert [message["role"] for message in rows[0]["messages"]] == ["user", "assistant"]
        assert rows[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == CALLS[0][1]
        assert rows[0]["temperature"] == 0.8
        text = export("#export-markdown")
        assert text.startswith("## You\n\ntool\n\n## base\n\nLet me see.")
        assert "```\n" + CALLS[1][1] in text


def test_a_full_tab_loses_candidates_before_texts(visit: Any) -> None:
    with served(Scripted()) as made:
        page = visit(made)
        for text in ("one", "two"):
            say(page, text)
        page.evaluate("""() => { // all the room there is
          for (let size = 2 ** 20, number = 0; size >= 64; size /= 2) {
            try {
              for (;; number += 1) sessionStorage.setItem(`fill${number}`, "x".repeat(size));
            } catch { /* full: smaller ones */ }
          }
        }""")
        for text in ("three", "four"):
            say(page, text)
        page.reload()
        page.wait_for_selector("html[data-ready]")
        assert page.locator(".said").all_inner_texts() == ["one", "two", "three", "four"]
        assert answers(page) == [ANSWER] * 4
        counts = [turn.locator(".token").count() for turn in page.locator(".turn").all()]
        assert counts[0] == 0 < counts[3]


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "line"), [
    ("busy", "The server is busy: 64 requests wait already. Try again in 2 s."),
    ("midway", "the model broke down"),
    ("lost", "The connection to the server was lost."),
])  # fmt: skip
def test_errors_are_one_line_with_a_retry(visit: Any, text: str, line: str) -> None:
    with served(Scripted()) as made:
        page = visit(made)
        say(page, text)
        assert page.inner_text(".note").replace("Retry", "").strip() == line
        assert page.input_value("#prompt") == ""
        page.click(".note >> text=Retry")
        page.wait_for_selector(".figures:has-text('tokens')")
        page.wait_for_selector("#send:visible")
        assert answers(page) == [ANSWER]
        page.problems.clear()  # the browser logs the 429


def test_a_branch_that_fails_is_tried_again_from_the_same_place(visit: Any) -> None:
    with served(Scripted(fails=0)) as made:
        page = visit(made)
        say(page, "busy")
        made.fails = 1
        page.locator(".token", has_text="says").click()
        page.click("#card .bar:has-text('Lyon')")
        page.click(".note >> text=Retry")
        page.wait_for_selector("#send:visible")
        assert answers(page) == ["tiny Lyon Then it goes on."]
        page.problems.clear()


def test_a_server_that_is_gone(visit: Any) -> None:
    with served(Scripted()) as made:
        page = visit(made)
        page.route("**/v1/**", lambda route: route.abort())
        say(page, "hello")
        assert answers(page)[0].startswith("No connection to the server.")
        page.unroute("**/v1/**")
        page.click("text=Retry")
        page.wait_for_selector("#send:visible")
        assert answers(page) == [ANSWER]
        page.problems.clear()


def test_leaving_in_the_middle(visit: Any) -> None:
    with served(Scripted()) as made:
        page = visit(made)
        page.fill("#prompt", "slow")
        page.press("#prompt", "Enter")
        page.wait_for_selector(".token >> nth=5")
        page.reload()
        page.wait_for_selector(".note.bad-text >> text=Retry")
        assert answers(page)[0].startswith("0 1 2 3")


def test_what_the_tab_holds_may_be_broken(visit: Any) -> None:
    with served(Scripted()) as made:
        page = visit(made)
        for kept in ("{", '{"turns": 5}', '{"turns": [{"user": "x"}]}'):
            keep = "kept => addEventListener('pagehide', () => sessionStorage.setItem('fledge-chat', kept))"
            page.evaluate(keep, kept)
            page.reload()
            page.wait_for_selector("#welcome:visible")
        page.wait_for_selector("html[data-ready]")
        say(page, "hello")
        assert answers(page) == [ANSWER]


def test_a_key_is_asked_for(visit: Any) -> None:
    with served(Scripted(key="secret")) as made:
        page = visit(made, ready=False)
        page.wait_for_selector("#key-dialog[open]")
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#line:has-text('API key')")
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#api-key", "secret")
        page.keyboard.press("Enter")
        page.wait_for_selector("html[data-ready]")
        say(page, "hello")
        page.reload()
        page.wait_for_selector("html[data-ready]")  # the tab remembers
        assert answers(page) == [ANSWER]
        assert page.evaluate("Object.keys(localStorage).length") == 0
        page.problems.clear()  # the browser logs the 401
