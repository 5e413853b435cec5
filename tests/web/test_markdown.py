"""A model's output as HTML: a fixed list of tags, nothing that runs or loads, and nothing that hides."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.web.markdown import MAX_MARKDOWN_CHARACTERS, markdown, plain, prose, visible

TAGS = {
    "div", "p", "br", "em", "strong", "s", "code", "pre", "ul", "ol", "li", "blockquote", "hr", "span",
    "table", "thead", "tbody", "tr", "th", "td",
}  # fmt: skip
ATTRIBUTES = {
    "class": re.compile(
        r"markdown|plain|link|address|language|unseen|heading-[1-6]|left|center|right"
    ),
    "dir": re.compile("auto"), "role": re.compile("heading"), "aria-level": re.compile("6"),
    "start": re.compile(r"\d{1,9}"),
}  # fmt: skip
HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "</div><script>1</script>",
    "[a](javascript:alert(1))",
    "[a](data:text/html;base64,PHNjcmlwdD4=)",
    "![a](http://evil.example/pixel.png)",
    "[a](http://evil.example \"x' onmouseover='alert(1)\")",
    '<http://evil.example/?"onclick=alert(1)>',
    '```html" onload="alert(1)\n</code></pre><script>alert(1)</script>\n```',
    "`</code><script>alert(1)</script>`",
    "| <script>alert(1)</script> | [x](javascript:alert(1)) |\n|---|---|\n| <b onclick=alert(1)> | 2 |",
    "<!-- <script>alert(1)</script> -->",
    '<a href="javascript:alert(1)">x</a>',
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "<style>body{display:none}</style>",
    "<iframe src=//evil.example></iframe>",
    "<form action=//evil.example>",
    '[ref]: javascript:alert(1) "<script>"\n[ref]',
    "\x00<scr\x00ipt>alert(1)</script>",
    "{{ 7 * 7 }} {% raw %}",
    "<base href=//evil.example>",
    "<meta http-equiv=refresh content=0;url=//evil.example>",
    "\u2028<script>\u2029",
]


class Shown(HTMLParser):
    """The text that a reader sees; fails on a tag or attribute that is not on the list."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text, self.open = "", 0
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS, tag
        for name, value in attrs:
            assert name in ATTRIBUTES, (tag, name)
            assert ATTRIBUTES[name].fullmatch(value or ""), (name, value)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"comment {data!r}")

    handle_decl = unknown_decl = handle_pi = handle_comment


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("show", [markdown, plain, prose, visible])
def test_nothing_runs_or_loads(show, text: str) -> None:  # type: ignore[no-untyped-def]
    Shown(str(show(text)))


@given(st.text(st.sampled_from("<>&\"'[]()!`*_~#|-:\n\\ \tax1./=;{}\x00\u202e\u200b"), max_size=60))
def test_any_text_gives_only_listed_tags(text: str) -> None:
    for show in (markdown, plain, prose):
        Shown(str(show(text)))


@given(st.text(max_size=80))
def test_plain_shows_every_character(text: str) -> None:
    """What cannot be seen is shown by its number; all else is as it was written."""
    shown = re.sub(
        r'<span class="unseen">U\+([0-9A-F]{4,6})</span>', lambda m: chr(int(m[1], 16)), str(visible(text))
    )
    for entity, character in (("&lt;", "<"), ("&gt;", ">"), ("&#34;", '"'), ("&#39;", "'"), ("&amp;", "&")):
        shown = shown.replace(entity, character)
    assert shown == re.sub("\r\n?", "\n", text)


def test_markdown_is_read() -> None:
    source = (
        "# Head\n\na **b** *c* ~~d~~ `e<f>`\nnext\n\n- one\n- two\n\n3. three\n\n> said\n\n"
        "| x | y |\n|:--|--:|\n| 1 | 2 |\n"
    )
    made = str(markdown(source))
    for part in (
        '<p role="heading" aria-level="6" class="heading-1">Head</p>',
        "<strong>b</strong>",
        "<em>c</em>",
        "<s>d</s>",
        "<code>e&lt;f&gt;</code><br>",
        "<ul><li>one</li><li>two</li></ul>",
        '<ol start="3"><li>three</li></ol>',
        "<blockquote><p>said</p></blockquote>",
        '<th class="left">x</th>',
        '<td class="right">2</td>',
    ):
        assert part in made
    assert "<br>" not in str(prose("wrapped\nline"))


def test_links_show_where_they_lead_and_lead_nowhere() -> None:
    made = str(markdown('[my bank](http://evil.example/a "t") ![cat](http://evil.example/p.png)'))
    assert "<a" not in made
    assert "<img" not in made
    shown = Shown(made).text
    assert 'my bank (http://evil.example/a "t")' in shown
    assert "[picture: cat] (http://evil.example/p.png)" in shown


@pytest.mark.parametrize(
    "hidden", ["[a]: http://x.example 'secret'", "<!-- secret -->", "<div hidden>secret</div>"]
)
def test_nothing_is_swallowed(hidden: str) -> None:
    assert "secret" in Shown(str(markdown(f"before\n\n{hidden}\n\nafter"))).text


def test_hidden_characters_are_shown() -> None:
    made = str(plain("a\u202eb\u200bc\x1bd\U000e0041e"))
    assert re.findall(r"U\+[0-9A-F]+", made) == ["U+202E", "U+200B", "U+001B", "U+E0041"]
    family = "\N{MAN}\N{ZERO WIDTH JOINER}\N{WOMAN}"
    assert family in str(plain(family))


@pytest.mark.parametrize("text", [
    "[" * 20_000, ">" * 20_000, "*a " * 10_000, "`" * 20_000, "[a](" * 8_000, "**a*" * 8_000, "![" * 10_000,
    "|" * 2_000 + "\n" + "|-" * 2_000, "\n".join("  " * i + "- a" for i in range(300)), "<" * 20_000,
])  # fmt: skip
def test_texts_made_to_break_a_parser_end(text: str) -> None:
    Shown(str(markdown(text)))


def test_a_very_long_text_is_shown_as_written() -> None:
    text = "**a** " * (MAX_MARKDOWN_CHARACTERS // 6 + 1)
    assert markdown(text) == plain(text)
