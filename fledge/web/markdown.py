"""A model's output as HTML. It is hostile until shown otherwise: nothing of it may run, load or hide.

Markdown becomes tags from a fixed list, all text is escaped, and no attribute holds text of the author's.
Links and pictures are shown with their address and lead nowhere: nobody reads an output to be sent away by
it, and a picture would tell its server who reads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup, escape

# Reading longer texts as markdown takes seconds; they are shown as they were written.
MAX_MARKDOWN_CHARACTERS = 50_000

# Control characters, half surrogates, invisible spaces and joiners, marks that turn the direction of text
# around, and "tag" characters, in which whole messages can be hidden. U+200C and U+200D are spared: Persian,
# Hindi and emoji need them.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_TAGS = {
    "paragraph": "p", "blockquote": "blockquote", "bullet_list": "ul", "list_item": "li", "table": "table",
    "thead": "thead", "tbody": "tbody", "tr": "tr", "em": "em", "strong": "strong", "s": "s",
}  # fmt: skip
_ALIGNMENTS = {"text-align:left": "left", "text-align:center": "center", "text-align:right": "right"}


def visible(text: str) -> Markup:
    """Escaped text in which hidden characters (control, direction, zero width) are shown by their number."""
    escaped = str(escape(text.replace("\r\n", "\n").replace("\r", "\n")))
    return Markup(_HIDDEN.sub(_code_point, escaped))


def _code_point(match: re.Match[str]) -> str:
    return f'<span class="unseen">U+{ord(match[0]):04X}</span>'


def plain(text: str) -> Markup:
    """The text as it was written, every line break and space kept."""
    return Markup('<div class="plain" dir="auto">{}</div>').format(visible(text))


def markdown(text: str) -> Markup:
    """The text read as markdown (CommonMark with tables and strike-through, without HTML).

    Nothing is swallowed: HTML is shown as text, and so are link definitions. A single line break breaks the
    line, as chats show it.
    """
    return _markdown(text, "<br>\n")


def prose(text: str) -> Markup:
    """`markdown` of a text of our own, whose lines may be wrapped anywhere."""
    return _markdown(text, "\n")


def _markdown(text: str, line_break: str) -> Markup:
    if len(text) > MAX_MARKDOWN_CHARACTERS:
        return plain(text)
    html = "".join(_block(token, line_break) for token in _parser().parse(text))
    return Markup('<div class="markdown" dir="auto">{}</div>').format(Markup(html))


@lru_cache(maxsize=1)
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    # A definition would vanish from the page, and so hide what it says; as HTML entities, backslashes and
    # comments may, "as written" shows the rest.
    return parser.disable("reference")


def _block(token: Token, line_break: str) -> str:
    name, _, side = token.type.rpartition("_")
    if token.type == "inline":
        return _inline(token.children or [], line_break)
    if token.type in ("fence", "code_block"):
        language = token.info.strip()
        label = f'<span class="language">{visible(language)}</span>' if language else ""
        return f"{label}<pre><code>{visible(token.content)}</code></pre>"
    if token.type == "hr":
        return "<hr>"
    if side == "open":
        return "" if token.hidden else _opening(name, token)
    if side == "close":
        if token.hidden:  # a tight list's paragraph
            return ""
        return {"heading": "</p>", "ordered_list": "</ol>", "th": "</th>", "td": "</td>"}.get(name) or (
            f"</{_TAGS[name]}>" if name in _TAGS else ""
        )
    return str(visible(token.content))


def _opening(name: str, token: Token) -> str:
    if name == "heading":  # not h1: the page has headings of its own
        return f'<p role="heading" aria-level="6" class="heading-{int(token.tag[1:])}">'
    if name == "ordered_list":
        start = token.attrGet("start")
        return "<ol>" if start is None else f'<ol start="{int(start)}">'
    if name in ("th", "td"):
        side = _ALIGNMENTS.get(str(token.attrGet("style")))
        return f'<{name} class="{side}">' if side else f"<{name}>"
    return f"<{_TAGS[name]}>" if name in _TAGS else ""


def _inline(tokens: Sequence[Token], line_break: str) -> str:
    parts: list[str] = []
    links: list[tuple[str, int]] = []  # address, and where its text starts in `parts`
    for token in tokens:
        name, _, side = token.type.rpartition("_")
        if token.type == "code_inline":
            parts.append(f"<code>{visible(token.content)}</code>")
        elif token.type in ("softbreak", "hardbreak"):
            parts.append(line_break if token.type == "softbreak" else "<br>\n")
        elif token.type == "link_open":
            links.append((_address(token, "href"), len(parts)))
            parts.append('<span class="link">')
        elif token.type == "link_close":
            address, start = links.pop()
            same = "".join(parts[start + 1 :]) == str(visible(address))
            parts.append("</span>" if same else f'</span> <span class="address">({visible(address)})</span>')
        elif token.type == "image":
            alt = visible(token.content)
            parts.append(f'<span class="address">[picture: {alt}] ({visible(_address(token, "src"))})</span>')
        elif side == "open" and name in _TAGS:
            parts.append(f"<{_TAGS[name]}>")
        elif side == "close" and name in _TAGS:
            parts.append(f"</{_TAGS[name]}>")
        else:
            parts.append(str(visible(token.content)))
    return "".join(parts)


def _address(token: Token, attribute: str) -> str:
    """Where a link or picture leads, with its title, which would show only under a pointer."""
    title = token.attrGet("title")
    return f'{token.attrGet(attribute)} "{title}"' if title else str(token.attrGet(attribute))
