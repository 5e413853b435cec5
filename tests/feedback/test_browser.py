"""The labelling pages in a real browser: whole sessions by keyboard and mouse, and what the store holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fledge.feedback.forms import QUESTION_KEYS, to_shown

from ..on_a_port import CHROMIUM
from .live import Labelling, labelling, served

pytest.importorskip("playwright.sync_api")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")]
Page = Any


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """Opens a person's next task in a browser of their own; any error on a page fails the test."""
    contexts, problems = [], []

    def open_next(made: Labelling, name: str, path: str = "/next", **context: Any) -> Page:
        contexts.append(browser.new_context(**{"viewport": {"width": 1300, "height": 900}, **context}))
        page = contexts[-1].new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
        page.on("dialog", lambda dialog: (problems.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.goto(made.link(name))
        page.goto(made.url + path)
        page.problems = problems
        return page

    yield open_next
    for context in contexts:
        context.close()
    # The server goes before the browser: an icon may be asked for too late.
    assert [line for line in problems if "ERR_CONNECTION_REFUSED" not in line] == []


def press(page: Page, keys: str) -> None:
    for key in keys.split():
        page.keyboard.press(key)


def submit(page: Page, *keys: str) -> None:
    """Send the answer by keys, or by the button, and wait for the page behind it."""
    with page.expect_navigation():
        if keys:
            press(page, " ".join(keys))
        else:
            page.click("#submit")
    page.wait_for_load_state()


def ready(page: Page) -> Page:
    page.wait_for_selector("html[data-ready]")
    return page


def saved(page: Page) -> None:
    page.wait_for_selector("#status:text-is('Draft saved')")


def board(page: Page) -> list[int | None]:
    """The places that the ranking on the page shows, by output, and that each output's card says the same."""
    ranks: list[int | None] = [None] * page.locator(".cards .card").count()
    for level in page.locator(".level").all():
        for chip in level.locator("[data-chip]").all():
            ranks[int(chip.get_attribute("data-chip"))] = int(level.get_attribute("data-value"))
    for place, rank in enumerate(ranks):
        said = page.locator(".cards .card").nth(place).locator("[data-place]").text_content()
        tied = rank is not None and ranks.count(rank) > 1
        assert said == ("" if rank is None else f"place {rank}, tied" if tied else f"place {rank}")
    return ranks


def last(made: Labelling, name: str) -> tuple[Any, Any]:
    """The newest answer of a person as they saw it, and all that is stored with it."""
    row = made.answers(name)[-1]
    return to_shown(row["kind"], row["answer"], row["order"]), row


def centre(page: Page, selector: str) -> tuple[float, float]:
    box = page.locator(selector).bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def drag(page: Page, start: str, target: str) -> None:
    page.locator(start).scroll_into_view_if_needed()
    page.mouse.move(*centre(page, start))
    page.mouse.down()
    page.mouse.move(*(value + 10 for value in centre(page, start)))
    page.mouse.move(*centre(page, target), steps=4)
    page.mouse.up()


# --- each kind of task ----------------------------------------------------------------------------


@pytest.mark.parametrize(("keys", "ranks"), [
    ("1 2 3 4", [1, 2, 3, 4]), ("4 3 2 1", [4, 3, 2, 1]), ("1 2 2 3", [1, 2, 2, 4]),
    ("3 3 3 3", [1, 1, 1, 1]), ("2 1 2 1", [3, 1, 3, 1]), ("d 1 a 2 c 2 b 4", [2, 4, 2, 1]),
    # Arrows: D ties with C, passes it, ties with B; A falls to a tie with B and D, and behind them.
    ("1 2 3 4 ArrowUp ArrowUp ArrowUp a ArrowDown ArrowDown", [3, 1, 4, 1]),
    ("1 2 3 4 b 0 4", [1, 3, 2, 3]),
])  # fmt: skip
def test_ranking_by_keyboard(tmp_path: Path, visit: Any, keys: str, ranks: list[int]) -> None:
    with served(labelling(tmp_path, "ranking")) as made:
        page = ready(visit(made, "ann"))
        press(page, keys)
        assert board(page) == ranks
        submit(page, "Enter")
        assert "Nothing is left" in page.text_content("h1")
        answer, row = last(made, "ann")
        assert answer == {"ranks": ranks}
        assert sorted(row["order"]) == [0, 1, 2, 3]
        # Going back shows what the store holds.
        page.goto(f"{made.url}/task/{row['task_id']}")
        assert board(ready(page)) == ranks


def test_ranking_by_dragging(tmp_path: Path, visit: Any) -> None:
    with served(labelling(tmp_path, "ranking")) as made:
        page = ready(visit(made, "ann"))
        drag(page, "[data-chip='0']", ".level[data-value='1']")
        assert board(page) == [1, None, None, None]
        drag(page, "[data-chip='1']", ".level[data-value='1']")  # a tie
        drag(page, ".card[data-output='2'] .letter", ".level[data-value='4']")  # by its card
        assert board(page) == [1, 1, 4, None]
        drag(page, "[data-chip='3']", ".gap[data-value='1']")  # above all others
        assert board(page) == [2, 2, 4, 1]
        drag(page, "[data-chip='2']", ".gap[data-value='2']")  # between
        assert board(page) == [3, 3, 2, 1]
        drag(page, "[data-chip='3']", ".tray")
        assert board(page) == [3, 3, 2, None]
        page.click("#submit")
        assert page.text_content("#problem") == "Rank D too."
        assert made.answers("ann") == []
        drag(page, "[data-chip='3']", ".level[data-value='2']")
        shown = board(page)
        assert shown == [3, 3, 1, 1]
        submit(page)
        assert last(made, "ann")[0] == {"ranks": shown}


def test_ranking_by_buttons(tmp_path: Path, visit: Any) -> None:
    with served(labelling(tmp_path, "ranking")) as made:
        page = ready(visit(made, "ann"))
        for output, rank in enumerate((2, 1, 2, 3)):
            page.click(f".card[data-output='{output}'] [data-rank='{rank}']")
        assert board(page) == [2, 1, 2, 4]
        page.click(".card[data-output='3'] [data-move='-1']")
        assert board(page) == [2, 1, 2, 2]
        page.click(".card[data-output='0'] [data-move='1']")
        assert board(page) == [4, 1, 2, 2]
        submit(page, "Enter")  # a click leaves no focus on a button
        assert last(made, "ann")[0] == {"ranks": [4, 1, 2, 2]}


def test_ranking_by_finger(tmp_path: Path, visit: Any) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with served(labelling(tmp_path, "ranking")) as made:
        page = ready(visit(made, "ann", **phone))
        for output, rank in enumerate((1, 2, 2, 3)):
            page.tap(f".card[data-output='{output}'] [data-rank='{rank}']")
        page.tap("#submit")
        page.wait_for_url("**/next")
        assert last(made, "ann")[0] == {"ranks": [1, 2, 2, 4]}


def test_rating_by_keyboard(tmp_path: Path, visit: Any) -> None:
    with served(labelling(tmp_path, "rating")) as made:
        page = ready(visit(made, "ann"))
        press(page, "5 y n u y Enter 1 ArrowDown ArrowDown n Enter 7 Enter")
        press(page, "a 6 ArrowUp n d 3")
        submit(page, "Enter")
        ratings = last(made, "ann")[0]["ratings"]
        assert [rating["overall"] for rating in ratings] == [6, 1, 7, 3]
        given = [
            {key: value for key, value in rating["questions"].items() if value is not None}
            for rating in ratings
        ]
        first, second, third, fourth, *_ = QUESTION_KEYS
        assert given == [{first: False, second: False, fourth: True}, {third: False}, {}, {}]


def test_rating_by_mouse(tmp_path: Path, visit: Any) -> None:
    with served(labelling(tmp_path, "rating")) as made:
        page = ready(visit(made, "ann"))
        for output, overall in enumerate((2, 4, 6, 7)):
            screen = f".rating-one[data-output='{output}']"
            page.wait_for_selector(screen)
            assert page.locator(".rating-one:visible").count() == 1  # each output alone
            page.click(f"{screen} [data-overall='{overall}']")
            page.click(f"{screen} [data-key=hallucination] [data-value=true]")
            if output == 1:  # once more takes it back
                page.click(f"{screen} [data-key=hallucination] [data-value=true]")
            if output < 3:
                page.click("#submit")
        submit(page)
        answer, row = last(made, "ann")
        assert [rating["overall"] for rating in answer["ratings"]] == [2, 4, 6, 7]
        assert [rating["questions"]["hallucination"] for rating in answer["ratings"]] == [
            True,
            None,
            True,
            True,
        ]
        page.goto(f"{made.url}/task/{row['task_id']}")
        shown = [step.text_content().split()[-1] for step in ready(page).locator("[data-step]").all()]
        assert shown == ["2", "4", "6", "7"]


def test_pairwise_by_keyboard_and_mouse(tmp_path: Path, visit: Any) -> None:
    prompts = [f"Question {i}?" for i in range(8)]
    with served(labelling(tmp_path, "pairwise", prompts=prompts, outputs=("yes", "no"))) as made:
        page = ready(visit(made, "ann"))
        for key, choice in {"a": "a", "ArrowRight": "b", "t": "tie", "x": "both_bad"}.items():
            texts = page.locator(".pair .written").all_text_contents()
            press(page, key)
            assert page.get_attribute(f".verdict [data-choice={choice}]", "aria-checked") == "true"
            submit(page, "Enter")
            answer, row = last(made, "ann")
            assert answer == {"choice": choice}
            assert [("yes", "no")[place] for place in row["order"]] == texts
            ready(page)
        for choice in ("a", "b", "tie", "both_bad"):
            page.click(f".verdict [data-choice={choice}]")
            submit(page)
            assert last(made, "ann")[0] == {"choice": choice}
        assert len(made.answers("ann")) == 8


def test_demonstration_and_a_prompt_of_ones_own(tmp_path: Path, visit: Any) -> None:
    with served(labelling(tmp_path, "demonstration", prompts=["One?", "Two?"])) as made:
        page = ready(visit(made, "ann"))
        page.keyboard.type("first line")
        press(page, "Enter")
        page.keyboard.type("second sp?s")  # letters that are keys elsewhere
        submit(page, "Control+Enter")
        assert last(made, "ann")[0] == {"text": "first line\nsecond sp?s"}
        ready(page)
        page.click("#submit")
        assert page.text_content("#problem") == "Write an answer first."
        page.fill("#text", "by mouse")
        submit(page)
        assert last(made, "ann")[0] == {"text": "by mouse"}
        page.click("text=Write a prompt of your own")
        page.wait_for_url("**/write")
        ready(page).fill("#prompt", "Who wrote it?")
        page.fill("#text", "I did.")
        page.reload()
        assert page.input_value("#prompt") == "Who wrote it?"
        submit(page, "Control+Enter")
        assert "Saved" in page.text_content(".notice.good")
        assert last(made, "ann")[0] == {"text": "I did."}
        assert len(made.answers("ann")) == 3


def test_correction(tmp_path: Path, visit: Any) -> None:
    chat = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Capital of France?"},
        {"role": "assistant", "content": "Lyon."}, {"role": "user", "content": "Really?"},
    ]  # fmt: skip
    with served(labelling(tmp_path, "correction", prompts=[chat], outputs=["Yes, it is Lyon."])) as made:
        page = ready(visit(made, "ann"))
        assert page.locator(".prompt-text h3").all_text_contents()[:2] == ["System", "User"]
        press(page, "Control+Enter")
        assert "Nothing changed" in page.text_content("#problem")
        page.fill("#text", "No, it is Paris.")
        page.wait_for_selector("#difference ins")
        assert page.locator("#difference del").all_text_contents() == ["Yes,", "Lyon."]
        assert page.locator("#difference ins").all_text_contents() == ["No,", "Paris."]
        submit(page, "Control+Enter")
        assert last(made, "ann")[0] == {"text": "No, it is Paris."}


# --- habits ---------------------------------------------------------------------------------------


def test_reload_in_the_middle(tmp_path: Path, visit: Any) -> None:
    with served(labelling(tmp_path, "ranking")) as made:
        page = ready(visit(made, "ann"))
        press(page, "2 1")
        saved(page)
        page.wait_for_selector("#time:not(:text-is('0:00'))")
        press(page, "2")
        saved(page)
        texts = page.locator(".card .written").all_text_contents()
        page.reload()
        assert board(ready(page)) == [2, 1, 2, None]
        assert page.locator(".card .written").all_text_contents() == texts
        press(page, "d 4")
        submit(page, "Enter")
        answer, row = last(made, "ann")
        assert answer == {"ranks": [2, 1, 2, 4]}
        assert row["seconds"] >= 1


def test_leaving_at_once_still_saves_the_draft(tmp_path: Path, visit: Any) -> None:
    with served(labelling(tmp_path, "demonstration")) as made:
        page = ready(visit(made, "ann"))
        page.keyboard.type("quick")
        page.goto(made.url + "/history")  # sooner than the autosave
        page.goto(made.url + "/next")
        ready(page)
        assert page.input_value("#text") == "quick"


def test_skip_flag_back_and_change(tmp_path: Path, visit: Any) -> None:
    prompts = ["One?", "Two?", "Three?"]
    with served(labelling(tmp_path, "pairwise", prompts=prompts, outputs=("yes", "no"))) as made:
        page = ready(visit(made, "ann"))
        press(page, "l")
        page.keyboard.type("Typo in the prompt")
        press(page, "Enter")
        page.wait_for_selector("#status:text-is('Flagged')")
        press(page, "a")
        submit(page, "Enter")
        ready(page)
        press(page, "s")
        submit(page, "2")  # the second reason
        assert made.answers("ann")[-1]["reason"] == "I do not know enough about this"
        ready(page)
        press(page, "s Tab Tab Tab Tab Tab")
        page.keyboard.type("in 3 words")
        submit(page, "Enter")
        assert made.answers("ann")[-1]["reason"] == "in 3 words"
        # Back to the first: what was said is there, and is superseded.
        page.goto(made.url + "/history")
        assert page.locator("tbody tr").count() == 3
        page.click("text=Three?")
        ready(page)
        for _ in range(2):
            with page.expect_navigation():
                press(page, "p")
            ready(page)
        assert "One?" in page.text_content(".prompt-text")
        assert page.get_attribute(".verdict [data-choice=a]", "aria-checked") == "true"
        assert page.locator("#previous").is_disabled()
        press(page, "t")
        submit(page, "Enter")
        first = next(row for row in made.answers("ann") if row["state"] == "answered")
        assert (first["answer"], first["revisions"]) == ({"choice": "tie"}, 1)


def test_two_labelers_at_once(tmp_path: Path, visit: Any) -> None:
    prompts = [f"Question {i}?" for i in range(4)]
    with served(labelling(tmp_path, "pairwise", prompts=prompts, outputs=("yes", "no"))) as made:
        ann, bob = ready(visit(made, "ann")), ready(visit(made, "bob"))
        for choice in "ab":
            assert ann.text_content(".prompt-text") != bob.text_content(".prompt-text")
            for page in (ann, bob):
                press(page, choice)
            for page in (ann, bob):
                submit(page, "Enter")
        items = [row["item_id"] for name in ("ann", "bob") for row in made.answers(name)]
        assert len(items) == len(set(items)) == 4
        assert "Nothing is left" in ann.text_content("h1")


def test_a_lost_connection_loses_nothing(tmp_path: Path, visit: Any) -> None:
    with served(labelling(tmp_path, "demonstration")) as made:
        page = ready(visit(made, "ann"))
        page.route("**/draft", lambda route: route.abort())
        page.keyboard.type("still here")
        page.wait_for_selector("#status:text('no connection')")
        page.unroute("**/draft")
        saved(page)
        failed = []

        def lose_first(route: Any) -> None:
            if failed:
                route.continue_()
            else:  # the server takes it, the answer is lost on the way
                failed.append(route.fetch())
                route.abort()

        page.route("**/answer", lose_first)
        submit(page, "Control+Enter")
        assert len(failed) == 1
        (row,) = made.answers("ann")
        assert (row["answer"], row["revisions"]) == ({"text": "still here"}, 0)
        page.problems.clear()  # the browser logs the requests that were cut


def test_a_prefill_is_shown_as_such_and_counted(tmp_path: Path, visit: Any) -> None:
    from fledge.feedback.agreement import figures
    from fledge.feedback.store import add_prefill, list_tasks

    made = labelling(tmp_path, "ranking", prompts=["One?", "Two?"], prefill=True)
    for task in list_tasks(made.store, made.project_id):
        add_prefill(made.store, task.id, {"ranks": [1, 2, 2, 4]}, "a rule")
    with served(made):
        page = ready(visit(made, "ann"))
        assert "a rule" in page.text_content("#prefilled")
        assert sorted(board(page)) == [1, 2, 2, 4]
        submit(page, "Enter")
        assert made.answers("ann")[-1]["answer"] == {"ranks": [1, 2, 2, 4]}
        ready(page).click("#clear-prefill")
        assert board(page) == [None] * 4
        press(page, "1 1 1 1")
        submit(page, "Enter")
        found = figures(made.store, made.project_id).prefill
        assert (found.shown, found.changed) == (2, 1)


# --- hostile outputs, looks -----------------------------------------------------------------------

EVIL = """\
<script>window.pwned = 1; alert(1)</script><img src="http://evil.example/x.png" onerror="window.pwned = 2">
<svg onload="window.pwned = 3"><iframe srcdoc="<script>parent.pwned = 4</script>"></iframe>
[click](javascript:window.pwned=5) ![x](http://evil.example/pixel.png) <a href="//evil.example">x</a>
<style>* { display: none !important }</style><meta http-equiv="refresh" content="0;url=http://evil.example/">
</script></textarea></template></div></div></main><script>window.pwned = 6</script>
<form action="http://evil.example"><button autofocus onfocus="window.pwned = 7">x</button></form>
"""


@pytest.mark.parametrize("kind", ["ranking", "rating", "pairwise", "correction", "demonstration"])
def test_hostile_output_runs_and_loads_nothing(tmp_path: Path, visit: Any, kind: Any) -> None:
    outputs = [EVIL] if kind == "correction" else [EVIL, EVIL + "2"]
    with served(labelling(tmp_path, kind, prompts=[EVIL], outputs=outputs, instructions=EVIL)) as made:
        page = visit(made, "ann", path="/")
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(made.url + "/next")
        ready(page)
        for element in page.locator(".prompt-text *, .card *").all()[:200]:
            element.dispatch_event("click")
        press(page, "Escape v ?")
        page.wait_for_timeout(300)
        assert page.evaluate("window.pwned === undefined && frames.length === 0")
        assert (
            page.evaluate(
                "document.querySelectorAll('img, iframe, form, meta[http-equiv], style, svg').length"
            )
            == 0
        )
        assert all(url.startswith(made.url) for url in asked)
        assert page.url.startswith(made.url)
        # Even a fault of ours would run nothing.
        blocked = "try { document.body.innerHTML = '<b>x</b>'; 'made' } catch (error) { error.name }"
        assert page.evaluate(blocked) == "TypeError"
        page.goto("about:blank")  # what the clicks changed is saved while the server is there
        page.problems[:] = [line for line in page.problems if "TrustedHTML" not in line]


PHONE = {"width": 390, "height": 844}


@pytest.mark.parametrize("kind", ["ranking", "rating", "pairwise", "correction", "demonstration"])
def test_nothing_is_wider_than_a_phone(tmp_path: Path, visit: Any, kind: Any) -> None:
    wide = "```\n" + "x" * 300 + "\n```\n" + "y" * 300 + "\n\n|" + "long cell |" * 20 + "\n|" + "-|" * 20
    outputs = [wide] if kind == "correction" else [wide, wide + "2"]
    with served(labelling(tmp_path, kind, prompts=[wide], outputs=outputs)) as made:
        page = ready(visit(made, "ann", viewport=PHONE))
        for path in (page.url, made.url + "/", made.url + "/history"):
            page.goto(path)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, path
        admin = visit(made, "admin", path="/admin", viewport=PHONE)
        for path in ("/admin", "/admin/people", "/admin/instructions", "/admin/disagreements"):
            admin.goto(made.url + path)
            assert admin.evaluate("document.documentElement.scrollWidth") <= 390, path


def test_dark_and_light(tmp_path: Path, visit: Any) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    with served(labelling(tmp_path, "ranking", labelers_per_item=2)) as made:
        dark = ready(visit(made, "ann", color_scheme="dark"))
        light = ready(visit(made, "bob", color_scheme="light"))
        assert dark.evaluate(colour) != light.evaluate(colour)
        before = dark.evaluate(colour)
        dark.click("[data-theme-switch]")
        assert dark.evaluate(colour) == light.evaluate(colour)
        dark.reload()  # it is remembered
        assert dark.evaluate(colour) == light.evaluate(colour) != before


def test_the_admin_invites_and_purges(tmp_path: Path, visit: Any) -> None:
    with served(labelling(tmp_path, "pairwise", outputs=("yes", "no"))) as made:
        admin = ready(visit(made, "admin", path="/admin/people"))
        admin.fill("#name", "Cleo")
        admin.click("text=Make a link")
        admin.wait_for_selector("#new-link:visible")
        made.tokens["Cleo"] = admin.input_value("[data-link]").rpartition("/")[2]
        cleo = ready(visit(made, "Cleo"))
        press(cleo, "a")
        submit(cleo, "Enter")
        admin.goto(made.url + "/admin")
        assert "Cleo" in admin.text_content("main")
        with admin.expect_download() as download:
            admin.click("text=ranked.jsonl")
        (row,) = map(json.loads, download.value.path().read_text().splitlines())
        assert sorted(row["ranks"]) == [1, 2]
        admin.goto(made.url + "/admin/people")
        ready(admin).click("tr[data-name=Cleo] [data-act=purge]")
        assert admin.locator("#purge-dialog [data-send]").is_disabled()
        admin.fill("#purge-name", "Cleo")
        with admin.expect_navigation():
            admin.click("#purge-dialog [data-send]")
        assert "Cleo" not in admin.text_content("main")
        cleo.goto(made.url + "/next")
        assert "Who are you?" in cleo.text_content("h1")
        cleo.problems.clear()  # the browser logs the 401


def test_enter_starts_and_the_waiting_page_looks_again(tmp_path: Path, visit: Any) -> None:
    from fledge.feedback.records import Output
    from fledge.feedback.store import add_item, add_outputs

    made = labelling(tmp_path, "pairwise", prompts=[])
    item = add_item(made.store, made.project_id, "Soon?")
    with served(made, status=lambda: {"running": True, "error": None}):
        page = visit(made, "ann", path="/")
        with page.expect_navigation():
            press(page, "Enter")
        assert "being prepared" in page.text_content("h1")
        add_outputs(made.store, item, [Output("yes", "m"), Output("no", "m")])
        page.wait_for_selector(".verdict")
