"""WARC and WET: whose text is read, and which record is at fault."""

from __future__ import annotations

import gzip
import io
import logging
import unittest.mock
from pathlib import Path

import pytest

import fledge.data.warc
from fledge.data.readers import file_documents
from fledge.data.sources import BadLines
from fledge.errors import UserError

pytest.importorskip("warcio", reason="needs the `data` extra")
pytest.importorskip("trafilatura", reason="needs the `data` extra")

PARAGRAPH = "The library opens at nine and closes at five, except on the days when it does not open at all. "


def read(path: Path, bad: BadLines | None = None) -> list[str]:
    return list(file_documents(path, "text", BadLines(advice="") if bad is None else bad))


def fault(path: Path, content: bytes) -> str:
    """The one line that is said of a file."""
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(f"{path}:")
    assert "\n" not in message
    return message.removeprefix(str(path))


def page(number: int, charset: str = "utf-8") -> bytes:
    body = f"<p>Page {number} of the café. {PARAGRAPH * 3}</p><p>{PARAGRAPH * 2}</p>"
    html = f"<html><head><title>T</title></head><body><nav>Menu</nav><main>{body}</main></body></html>"
    return html.encode(charset)


def warc(path: Path, records: list[tuple[str, dict[str, str], bytes]], packed: bool = True) -> Path:
    """Records of (WARC type, HTTP headers or content type, payload)."""
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    out = io.BytesIO()
    writer = WARCWriter(out, gzip=packed)
    for kind, headers, payload in records:
        status = headers.pop("status", "200 OK")
        http = StatusAndHeaders(status, list(headers.items()), protocol="HTTP/1.1")
        writer.write_record(
            writer.create_warc_record(
                "http://example.org/",
                kind,
                payload=io.BytesIO(payload),
                length=len(payload),
                http_headers=http if kind == "response" else None,
                warc_content_type="text/plain" if kind == "conversion" else "",
            )
        )
    path.write_bytes(out.getvalue())
    return path


def html(charset: str = "") -> dict[str, str]:
    return {"Content-Type": f"text/html{'; charset=' if charset else ''}{charset}"}


def chunked(payload: bytes) -> bytes:
    parts = [payload[i : i + 100] for i in range(0, len(payload), 100)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz"])
def test_pages_give_their_text(name: str, tmp_path: Path) -> None:
    records = [
        ("request", {}, b"GET / HTTP/1.1\r\n\r\n"),
        ("response", html("utf-8"), page(1)),
        ("response", html("iso-8859-1"), page(2, "iso-8859-1")),
        ("response", {**html(), "Content-Encoding": "gzip"}, gzip.compress(page(3))),
        ("response", {**html(), "Transfer-Encoding": "chunked"}, chunked(page(4))),
        ("response", {"Content-Type": "application/xhtml+xml"}, page(5)),
        ("response", html("no-such-charset"), page(6)),
        ("response", {"Content-Type": "image/png"}, page(7)),
        ("response", {**html(), "status": "404 Not Found"}, page(8)),
        ("response", html(), b""),
        ("response", {**html(), "Content-Encoding": "gzip"}, b"broken"),
        ("response", html(), b"\x00\xff\xfe<<<>>"),
        ("resource", {}, page(9)),
    ]
    bad = BadLines(skip=True)
    found = read(warc(tmp_path / name, records, name.endswith("gz")), bad)
    assert [text.partition(".")[0] for text in found] == [f"Page {n} of the café" for n in range(1, 7)]
    assert all("Menu" not in text and "<p>" not in text for text in found)
    assert found[0].count(PARAGRAPH.strip()) == 5
    assert bad.count == 0


@pytest.mark.parametrize("name", ["a.wet", "a.wet.gz", "a.warc.wet.gz"])
def test_conversions_are_text_as_they_are(name: str, tmp_path: Path) -> None:
    texts = ["one\n<b>1</b> é", "  two\n", " \n"]
    records = [("conversion", {}, text.encode()) for text in texts]
    path = warc(tmp_path / name, [("warcinfo", {}, b"software: x"), *records], name.endswith("gz"))
    assert read(path) == texts[:2]


def test_pages_without_text_are_passed_over_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG):
        assert read(warc(tmp_path / "a.warc", [("response", html(), b"<html></html>")], False)) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"Content-Length: 5\r\n", b"Content-Length: 4\r\n", "its Content-Length is not its length"),
        (b"Content-Length: 5\r\n", b"Content-Length: 9\r\n", "its Content-Length is not its length"),
        (b"Content-Length: 5\r\n", b"", "its header has no Content-Length"),
        (b"Content-Length: 5\r\n", b"Content-Length: x\r\n", "its header has no Content-Length"),
        (b"two!!", b"two\xff!", "not valid UTF-8 (byte 3 of its text)"),
        (b"WARC/1.0", b"rubbish!", "no record begins where one should"),
    ],
)
def test_a_broken_record_is_named_and_can_be_skipped(
    old: bytes, new: bytes, message: str, tmp_path: Path
) -> None:
    """The second of four; those after it are read."""
    whole = warc(
        tmp_path / "a.wet", [("conversion", {}, t) for t in (b"one", b"two!!", b"three3", b"4444")], False
    )
    content = whole.read_bytes()
    start = content.index(b"WARC/1.0", 5)
    broken = content[:start] + content[start:].replace(old, new, 1)
    assert fault(whole, broken) == f": record 2: {message}; the file is damaged there"
    bad = BadLines(skip=True)
    assert read(whole, bad)[0] == "one"
    assert read(whole, BadLines(skip=True))[-1] == "4444"
    assert bad.count == 1


def test_a_warc_file_that_is_cut_off(tmp_path: Path) -> None:
    path = warc(tmp_path / "a.wet.gz", [("conversion", {}, b"text " * 400)] * 3)
    content = path.read_bytes()
    assert fault(path, content[:-30]).startswith(": ends too soon, after record 2;")
    plain = gzip.decompress(content)
    for end in (len(plain) - 30, len(plain) // 3 + 40):
        assert ": ends too soon, after record " in fault(tmp_path / "a.wet", plain[:end])
    assert ": record 1: no record begins where one should" in fault(tmp_path / "b.warc", b"plain text")


def test_records_too_large_for_text_are_passed_over(tmp_path: Path) -> None:
    records = [("conversion", {}, text) for text in (b"a" * 50_000, b"b" * 2_000_000, b"c" * 50_000)]
    path = warc(tmp_path / "a.wet", records, False)
    with unittest.mock.patch.object(fledge.data.warc, "RECORD_BYTES", 100_000):
        assert [text[0] for text in read(path)] == ["a", "c"]
