"""Tokens and their candidates on the chat page, hostile output, markdown: in a real browser."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest

from fledge.web.markdown import markdown

from .scripted import ANSWER, HOSTILE, MARKDOWN, PHONE, Scripted, answers, say, served, texts

pytestmark = pytest.mark.slow


# --- the histogram --------------------------------------------------------------------------------


def rows(page: Any) -> list[str]:
    return [" ".join(text.split()) for text in page.locator("#card .bar").all_inner_texts()]


def test_pointing_shows_the_candidates_and_one_branches(visit: Any) -> None:
    with served(Scripted()) as made:
        page = visit(made)
        say(page, "hello")
        page.locator(".token", has_text="capital").hover()
        page.wait_for_selector("#card:visible")
        assert rows(page)[:3] == ["\u2423capital 97.0%", "\u2423London 0.75%", "\u2423Lyon 0.37%"]
        assert rows(page)[-1] == "all others 1.5%"
        fill, track = (page.locator(f"#card .{name} >> nth=0").bounding_box() for name in ("fill", "track"))
        assert fill["width"] / track["width"] == pytest.approx(0.97, abs=0.01)
        page.mouse.move(5, 5)
        page.wait_for_selector("#card", state="hidden")
        page.locator(".token", has_text="capital").click()  # stays
        page.mouse.move(5, 5)
        page.wait_for_timeout(350)
        page.click("#card .bar:has-text('Lyon')")
        page.wait_for_selector("#send:visible")
        assert answers(page) == ["tiny says: the Lyon Then it goes on."]
        body = made.requests[-1]
        assert texts(body["messages"]) == [("user", "hello"), ("assistant", "tiny says: the Lyon")]
        assert (body["add_generation_prompt"], body["continue_final_message"]) == (False, True)
        # What was taken is a token with the same candidates, and what stood before has kept its own.
        page.locator(".token", has_text="Lyon").click()
        assert rows(page)[2] == "\u2423Lyon 0.37%"
        assert "came" in page.get_attribute("#card .bar >> nth=2", "class")
        page.keyboard.press("Escape")
        page.click(".versions button >> nth=0")
        assert answers(page) == [ANSWER]


def test_tokens_by_keyboard(visit: Any) -> None:
    with served(Scripted()) as made:
        page = visit(made)
        say(page, "hello")
        page.focus(".answer .body")
        for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
            page.keyboard.press(key)
        assert page.inner_text("#card .head b") == "\u2423says:"
        assert page.text_content("#said") == "\u2423says:, 60.0%"
        for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowUp"):
            page.keyboard.press(key)
        assert page.text_content("#said") == "\u2423London, 10.0%"
        page.keyboard.press("Enter")
        page.wait_for_selector("#send:visible")
        assert answers(page) == ["tiny London Then it goes on."]
        page.keyboard.press("ArrowRight")  # the focus stayed in the answer
        assert page.inner_text("#card .head b") == "tiny"
        page.keyboard.press("Escape")
        assert page.is_hidden("#card")
        assert len(made.requests) == 2


def test_tokens_by_finger(visit: Any) -> None:
    with served(Scripted()) as made:
        page = visit(made, **PHONE)
        page.fill("#prompt", "markdown")
        page.press("#prompt", "Enter")  # a new line: there the button sends
        assert made.requests == []
        page.fill("#prompt", "markdown")
        page.tap("#send")
        page.wait_for_selector("#send:visible")
        token = page.locator(".token", has_text="snake").first
        token.tap()
        page.wait_for_selector("#card:visible")
        card = page.locator("#card").bounding_box()
        box = token.bounding_box()
        assert card["y"] + card["height"] == pytest.approx(740, abs=1)
        assert box["y"] + box["height"] <= card["y"]  # the card doesn't cover what it speaks of
        page.tap("#card .bar:has-text('Lyon')")
        page.wait_for_selector("#send:visible")
        assert made.requests[-1]["messages"][-1]["content"].endswith("and Lyon")


def test_the_end_of_an_answer_is_a_candidate(visit: Any) -> None:
    with served(Scripted()) as made:
        page = visit(made)
        say(page, "hello")
        page.locator(".token", has_text="says").click()
        page.click("#card .bar:has-text('<|im_end|>')")
        assert answers(page) == ["tiny"]
        assert len(made.requests) == 1  # nothing is left to ask
        page.click("#view")
        assert page.locator(".token.loose").all_inner_texts() == ["<|im_end|>"]


def test_parts_of_characters(visit: Any) -> None:
    with served(Scripted()) as made:
        page = visit(made)
        say(page, "bytes")
        assert answers(page) == ["Price: \u20ac paid"]
        page.locator(".token", has_text="\u20ac").click()
        assert page.inner_text("#card .head b") == "\\xac"
        assert "later bytes" in page.inner_text("#card .foot")
        assert page.locator("#card button.bar:not(:disabled)").count() == 0
        page.keyboard.press("Escape")
        page.locator(".token", has_text="paid").click()
        assert page.locator("#card .bar:has-text('\\\\xc3')").is_disabled()
        page.keyboard.press("Escape")
        page.click("#view")
        assert page.locator(".token.loose").all_inner_texts()[:2] == ["\\xe2", "\\x82"]
        page.locator(".token.loose").first.click()  # where the character begins, it can be another one
        page.wait_for_selector("#card:visible")


def test_shading_and_as_written(visit: Any) -> None:
    with served(Scripted()) as made:
        page = visit(made)
        say(page, "markdown")
        token = page.locator(".token", has_text="capital").first
        colour = "one => getComputedStyle(one).backgroundColor"
        assert token.evaluate(colour) == "rgba(0, 0, 0, 0)"
        page.click("#shade")
        assert token.evaluate(colour) != "rgba(0, 0, 0, 0)"
        tints = [
            float(one.evaluate("one => one.style.getPropertyValue('--t')"))
            for one in page.locator(".token").all()[:3]
        ]
        assert max(tints) == pytest.approx(0.0737, abs=0.001)  # -log2(0.6) of 10 bits
        page.click("#view")
        assert page.text_content(".body") == MARKDOWN + "<|im_end|>"
        page.reload()
        page.wait_for_selector("html[data-ready]")
        assert page.text_content(".body") == MARKDOWN + "<|im_end|>"


# --- hostile output, looks ------------------------------------------------------------------------


def test_hostile_output_runs_and_loads_nothing(visit: Any) -> None:
    with served(Scripted(models=("tiny", "<script>window.pwned = 10</script>"))) as made:
        page = visit(made)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        say(page, "hostile")
        for view in range(2):
            for element in page.locator(".answer .body *").all()[:150:3]:
                element.dispatch_event("click")
            if view == 0:
                page.keyboard.press("Escape")
                page.click("#view")
        say(page, HOSTILE)  # the reader's own text too
        page.wait_for_timeout(200)
        assert page.evaluate("window.pwned === undefined && frames.length === 0")
        kinds = "main img, main iframe, main form, meta[http-equiv], style, svg, main a, main script"
        assert page.locator(kinds).count() == 0
        assert all(url.startswith(made.url) for url in asked)
        body = page.locator(".body").first
        assert body.text_content().startswith(HOSTILE.split("bidi:")[0])
        for mark in ("U+202E", "U+2066", "U+200B", "U+E0041", "U+001B", "U+0007"):
            assert mark in body.text_content()
        assert not set(body.text_content()) & set("\u202e\u2066\u200b\U000e0041\x1b\x07")
        # Even a fault of ours would run nothing.
        blocked = "try { document.body.innerHTML = '<b>x</b>'; 'made' } catch (error) { error.name }"
        assert page.evaluate(blocked) == "TypeError"
        page.problems[:] = [line for line in page.problems if "TrustedHTML" not in line]


def test_a_line_of_100_000_characters(visit: Any) -> None:
    with served(Scripted()) as made:
        page = visit(made, **PHONE)
        for text in ("line", "markdown", "hostile"):
            page.fill("#prompt", text)
            page.tap("#send")
            page.wait_for_selector("#send:visible")
        assert page.text_content(".body") == "x" * 100_000 + "<|im_end|>"
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.click("#settings")
        page.click("#view")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_dark_and_light(visit: Any) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    with served(Scripted()) as made:
        dark, light = visit(made, color_scheme="dark"), visit(made, color_scheme="light")
        assert dark.evaluate(colour) != light.evaluate(colour)
        dark.click("[data-theme-switch]")
        assert dark.evaluate(colour) == light.evaluate(colour)


# --- markdown -------------------------------------------------------------------------------------


class Outline(HTMLParser):
    """Tags and words of HTML in their order, without the elements that only style."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("span", "div", "br"):
            self.parts.append(f"<{tag}>")

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("span", "div", "br", "hr"):
            self.parts.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


def outline(html: str) -> str:
    parser = Outline()
    parser.feed(html)
    return "".join("".join(parser.parts).split())


RENDER = """async (texts) => {
  const { drawText } = await import("/assets/tokens.js");
  return texts.map((text) => {
    const body = document.createElement("div");
    drawText(body, text, [], [], false);
    return body.outerHTML;
  });
}"""
SAMPLES = [
    MARKDOWN, "", "a\nb\n\nc", "# One\n## Two ##x\nthree", "***both*** **a *b* c** _x_ a_b_c __y__ ~~z~~ ~q~",
    "* a\n* b\n\n  more of b\n* c", "- a\n  - b\n    - c\n- d", "3. x\n4. y\n\nafter", "1) a\n2) b",
    "> a\n> b\n>\n> - c\n\nd", "```\nx < y\n\n  z\n```\nafter", "~~~py\n```\n~~~", "```\nnever closed",
    "`` a ` b `` and `c` and ``unclosed", "\\*not\\* \\_this\\_ \\q",
    "[a](b) ![c](d) [e *f* g](h(i)j) [k](l \"m\")",
    "[x](http:a(1)) [no](a b) [half](", "a | b\n--|--\n1 | 2\n3 |\n\nafter", "***\n---\n_ _ _",
    "<b>x</b>", "2 * 3 * 4", "** a ** * b *", "**unclosed *and* more", "a*b*c", "text\n- list\n- more",
    "- a\n\n  - b\n  - c\n- d\n\npara", "1986\\. A year", "#no heading", "[a][b]\n\n[b]: c", "- \n- x",
]  # fmt: skip


def test_markdown_is_read_as_the_server_reads_it(visit: Any) -> None:
    with served(Scripted()) as made:
        page = visit(made)
        differing = []
        for text, html in zip(SAMPLES, page.evaluate(RENDER, SAMPLES), strict=True):
            expected = outline(str(markdown(text)))
            if outline(html) != expected:
                differing.append((text, outline(html), expected))
        assert differing == []


FUZZ = """async (count) => {
  const { drawText, placesOf } = await import("/assets/tokens.js");
  let seed = 1;
  const random = (n) => { seed = (seed * 48271) % 2147483647; return seed % n; };
  const pieces = ["a", "b", "\\n", "\\n\\n", " ", "  ", "*", "**", "_", "~~", "`", "```", "#", "- ", "1. ",
    "> ", "|", "|--|--|", "[", "](", ")", "!", "\\\\", "<", ":", "---", "\\t", "\\r", "\\u202e", "😀"];
  const letters = (text) => text.replace(/U\\+[0-9A-F]+/g, "").replace(/[^ab😀]/gu, "");
  for (let i = 0; i < count; i += 1) {
    let text = "";
    for (let k = random(60); k >= 0; k -= 1) text += pieces[random(pieces.length)];
    const tokens = [...text.matchAll(/[^]{1,3}/gu)].map(([t]) => ({ t, l: -1, c: [] }));
    for (const [given, written] of [[[], false], [tokens, false], [tokens, true]]) {
      const body = document.createElement("div");
      // As it streams in, block by block, and at once: the same.
      for (let end = 1; end <= text.length; end += 7) drawText(body, text.slice(0, end), [], [], written);
      drawText(body, text, given, placesOf(text, given), written);
      const whole = document.createElement("div");
      drawText(whole, text, given, placesOf(text, given), written);
      if (body.outerHTML !== whole.outerHTML) return `streamed differs: ${JSON.stringify(text)}`;
      const shown = body.textContent.replaceAll("[picture: ", "");
      const source = JSON.stringify(text);
      if (letters(shown) !== letters(text)) return `swallowed: ${source} as ${JSON.stringify(shown)}`;
      if (written && shown.replace(/U\\+202E/g, "\\u202e") !== text) return `not as written: ${source}`;
      const order = [...body.querySelectorAll(".token")].map((one) => Number(one.dataset.token));
      if (order.some((one, place) => place && one < order[place - 1])) return `order: ${source}`;
    }
  }
  return "";
}"""


def test_nothing_is_swallowed_and_every_token_is_in_its_place(visit: Any) -> None:
    with served(Scripted()) as made:
        assert visit(made).evaluate(FUZZ, 600) == ""


def test_no_text_makes_the_page_hang(visit: Any) -> None:
    draw = """async (texts) => {
      const { drawText } = await import("/assets/tokens.js");
      for (const text of texts) drawText(document.createElement("div"), text, [], [], false);
    }"""
    pieces = [
        "*",
        "**a ",
        "`",
        "``a`",
        "[",
        "[a](",
        "> ",
        "- ",
        "_a ",
        "| ",
        "~~",
        "\\",
        "![",
        "#\n",
        "1. ",
        "* a\n  * a\n    * a\n      * a\n        * a\n          * a\n",
    ]
    with served(Scripted()) as made:
        page = visit(made)
        # A time that grows with the square of the length would be minutes here.
        page.evaluate(draw, [piece * (49_000 // len(piece)) for piece in pieces])
        page.evaluate(draw, [(piece * (18_000 // len(piece)) + "\n\n") * 2 for piece in pieces])
