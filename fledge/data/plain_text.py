"""Documents of text files: decoded in blocks and cut, so that a file is never in memory as a whole."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from fledge.data.streams import DAMAGE, BadLines, damage, open_stream

SEPARATOR = "<|endoftext|>"
SEPARATOR_LINE = re.compile(rf"^{re.escape(SEPARATOR)}[ \t\r]*$", re.MULTILINE)
PIECE_CHARACTERS = 16_384
BLOCK_BYTES = 2**20
BOM = b"\xef\xbb\xbf"


def text_documents(path: Path, bad: BadLines) -> Iterator[str]:
    """The documents of a UTF-8 file (see `cut`). Raises UserError (see `BadLines`) with file and line."""
    return cut(text_blocks(path, bad))


def cut(blocks: Iterable[str]) -> Iterator[str]:
    """The documents of a text that comes in blocks: cut at lines `<|endoftext|>`, and what is longer than
    PIECE_CHARACTERS at blank or other lines. Line breaks at a document's borders are left out.

    Holds a block and a piece in memory, and where the text is cut does not depend on the blocks.
    """
    text = ""
    before = "\n"  # the character before `text`, which tells whether that starts a line
    begun = False  # whether something of the document was seen: until then line breaks are left out
    for block in chain(filter(None, blocks), [""]):
        text += block
        decided = len(text) if not block else _decided(text)
        start = 0
        for match in SEPARATOR_LINE.finditer(text, 0, decided):
            if match.start() == 0 and before != "\n":
                continue
            yield from _finish(text[start : match.start()], begun)
            start, begun = match.end(), False
        if not block:
            yield from _finish(text[start:], begun)
            return
        if not begun:
            start += len(text) - start - len(text[start:].lstrip("\r\n"))
            begun = start < len(text)
        for end in _ends(text, start, len(text[:decided].rstrip("\r\n"))):
            yield text[start:end]
            start = end
        if start:
            before, text = text[start - 1], text[start:]


def _decided(text: str) -> int:
    """Up to where it is known which lines are separators: the last one may go on in the next block."""
    line = text.rfind("\n") + 1
    last = text[line:]
    open_end = SEPARATOR.startswith(last) or SEPARATOR_LINE.fullmatch(last) is not None
    return line if open_end else len(text)


def _finish(document: str, begun: bool) -> Iterator[str]:
    """The rest of a document that is known to its end."""
    document = document.rstrip("\r\n") if begun else document.strip("\r\n")
    start = 0
    for end in _ends(document, 0, len(document)):
        yield document[start:end]
        start = end
    if document[start:].strip():
        yield document[start:]


def _ends(text: str, start: int, end: int) -> Iterator[int]:
    """Where the pieces of `text[start:end]` end, but for the last piece."""
    while end - start > PIECE_CHARACTERS:
        half, limit = start + PIECE_CHARACTERS // 2, start + PIECE_CHARACTERS
        blank, line = text.rfind("\n\n", half, limit), text.rfind("\n", half, limit)
        start = blank + 2 if blank >= 0 else line + 1 if line >= 0 else limit
        yield start


def text_blocks(path: Path, bad: BadLines) -> Iterator[str]:
    """The text of a UTF-8 file in blocks of whole lines, or, of endless lines, of BLOCK_BYTES."""
    raw, lines, at = b"", 0, 0  # what is not yet decoded, and the lines and bytes before it
    broken: BaseException | None = None
    final = False
    with open_stream(path) as stream:
        while not final:
            try:
                block = stream.read1(BLOCK_BYTES)
            except DAMAGE as error:
                block, broken = b"", error
            final = not block
            raw += block
            if at == 0 and raw.startswith(BOM):
                raw, at = raw[len(BOM) :], len(BOM)
            end = len(raw) if final else raw.rfind(b"\n") + 1
            if end == 0 and (final or len(raw) < BLOCK_BYTES):
                continue
            end = end or _whole_characters(raw)
            try:
                yield raw[:end].decode()
            except UnicodeDecodeError:
                if lines == 0 and (problem := _other_than_text(raw)):
                    bad.report(f"{path}: {problem}")
                    return
                yield _good_lines(raw[:end], path, lines, at, bad)
            lines, at, raw = lines + raw.count(b"\n", 0, end), at + end, raw[end:]
        if broken is not None:
            bad.report(damage(path, broken, f"line {lines}"))


def _whole_characters(raw: bytes) -> int:
    """How many bytes there are before a character that is cut off at the end."""
    for back in range(1, min(4, len(raw)) + 1):
        if raw[-back] >= 0xC0:
            return len(raw) - back
        if raw[-back] < 0x80:
            break
    return len(raw)


def _other_than_text(raw: bytes) -> str | None:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16 text; convert it to UTF-8"
    return "a binary file, not text; leave it out" if b"\0" in raw else None


def _good_lines(raw: bytes, path: Path, lines: int, at: int, bad: BadLines) -> str:
    """The lines that are UTF-8; the others are reported."""
    good = []
    for number, line in enumerate(io.BytesIO(raw), start=lines + 1):
        try:
            good.append(line.decode())
        except UnicodeDecodeError as error:
            place = f"byte {at + error.start} of the text"
            bad.report(f"{path}:{number}: not valid UTF-8 ({place}); convert it, or leave it out")
        at += len(line)
    return "".join(good)
