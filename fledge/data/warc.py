"""Text of web pages from WARC and WET files (ISO 28500), record by record."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from email.message import Message
from pathlib import Path
from typing import Any

from fledge.data.readers import need
from fledge.data.streams import DAMAGE, BadLines, damage, open_stream

# Crawlers cut pages at 1 to 5 MB; a longer record is no text.
RECORD_BYTES = 2**26
HEADER_BYTES = 2**16
TYPES = (b"response", b"conversion")
HTML = ("text/html", "application/xhtml+xml")


class _BrokenRecord(Exception):
    """What is wrong with one record."""


def warc_documents(path: Path, bad: BadLines) -> Iterator[str]:
    """The text of HTML responses and of text conversions (WET); other records, and pages in which no text is
    found, are passed over.

    A broken record is reported, and reading goes on where the next one begins.
    """
    parse = need("warcio.recordloader", "data").ArcWarcRecordLoader().parse_record_stream
    extract = _extractor()
    number = 0
    broken: BaseException | None = None
    with open_stream(path) as stream:
        try:
            for number, record in enumerate(_records(stream), start=1):
                text = ""
                try:
                    if isinstance(record, _BrokenRecord):
                        raise record
                    if record:
                        text = _text(parse(io.BytesIO(record)), extract)
                except Exception as error:  # ours, warcio's, and what odd headers lead to
                    reason = " ".join(str(error).split())
                    bad.report(f"{path}: record {number}: {reason}; the file is damaged there")
                if text.strip():
                    yield text
        except DAMAGE as error:
            broken = error
        if broken is not None:
            bad.report(damage(path, broken, f"record {number}"))


def _records(stream: io.BufferedIOBase) -> Iterator[bytes | _BrokenRecord]:
    """The bytes of each record; empty for those that cannot hold text."""
    line = stream.readline(HEADER_BYTES)
    lost = False  # until the next beginning of a record, all belongs to one fault
    while line:
        if line.startswith(b"WARC/"):
            header = line + _header(stream)
            record = _content(stream, header)
            yield record
            lost = isinstance(record, _BrokenRecord)
        elif line.strip() and not lost:
            yield _BrokenRecord("no record begins where one should")
            lost = True
        line = stream.readline(HEADER_BYTES)


def _header(stream: io.BufferedIOBase) -> bytes:
    lines = []
    while (line := stream.readline(HEADER_BYTES)).strip():
        lines.append(line)
        if sum(map(len, lines)) > HEADER_BYTES:
            return b"".join(lines)
    if not line:
        raise EOFError
    return b"".join(lines) + line


def _content(stream: io.BufferedIOBase, header: bytes) -> bytes | _BrokenRecord:
    fields = {
        name.strip().lower(): value.strip()
        for name, _, value in (line.partition(b":") for line in header.splitlines()[1:])
    }
    size = fields.get(b"content-length", b"")
    if not size.isdigit():
        return _BrokenRecord("its header has no Content-Length")
    left = int(size)
    if fields.get(b"warc-type", b"").lower() in TYPES and left <= RECORD_BYTES:
        content = stream.read(left)
        left -= len(content)
        header += content
    else:
        header = b""
    while left and (passed := stream.read(min(left, HEADER_BYTES))):
        left -= len(passed)
    if left:
        raise EOFError
    if stream.readline(HEADER_BYTES).strip():
        return _BrokenRecord("its Content-Length is not its length")
    return header


def _text(record: Any, extract: Callable[[bytes | str], str | None]) -> str:
    if record.rec_type == "conversion":
        raw = record.raw_stream.read()
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise _BrokenRecord(f"not valid UTF-8 (byte {error.start} of its text)") from None
    headers = record.http_headers
    if headers is None or not headers.get_statuscode().startswith("2"):
        return ""
    kind = Message()
    kind["Content-Type"] = headers.get_header("Content-Type", "")
    if kind.get_content_type() not in HTML:
        return ""
    content = record.content_stream()
    raw = b"".join(iter(content.read, b""))
    with contextlib.suppress(LookupError, UnicodeDecodeError):
        return extract(raw.decode(kind.get_content_charset(""))) or ""
    return extract(raw) or ""  # no encoding is given, or a wrong one: the bytes tell


def _extractor() -> Callable[[bytes | str], str | None]:
    trafilatura = need("trafilatura", "data")
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # it tells of every page without text

    def extract(page: bytes | str) -> str | None:
        try:
            text: str | None = trafilatura.extract(page, include_comments=False)
        except Exception:  # whatever a parser of broken HTML stumbles over
            return None
        return text

    return extract
