"""Readers: every kind of file gives the same documents, and says in one line what is wrong with it."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
import unittest.mock
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

import fledge.data.plain_text
from fledge.data.plain_text import PIECE_CHARACTERS, SEPARATOR_LINE, cut
from fledge.data.readers import file_documents, kind_of, need
from fledge.data.sources import BadLines, Source, read_records
from fledge.errors import UserError

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".ZST": zstandard.ZstdCompressor().compress,
}


def read(path: Path, bad: BadLines | None = None, field: str = "text") -> list[str]:
    return list(file_documents(path, field, BadLines(advice="") if bad is None else bad))


def documents(path: Path, content: str | bytes) -> list[str]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read(path)


def fault(path: Path, content: bytes) -> str:
    """The one line that is said of a file."""
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(f"{path}:")
    assert "\n" not in message
    return message.removeprefix(str(path))


# Text.


def test_a_text_file_is_cut_at_separator_lines(tmp_path: Path) -> None:
    content = "\n\none\n\n1\n<|endoftext|>\n\n<|endoftext|>  \r\n two \n<|endoftext|>"
    assert documents(tmp_path / "a.txt", content) == ["one\n\n1", " two "]


def test_the_separator_inside_a_line_is_text(tmp_path: Path) -> None:
    content = "documents end with <|endoftext|>\n x<|endoftext|> \n<|endoftext|>x"
    assert documents(tmp_path / "a.txt", content) == [content]


def test_windows_line_breaks_and_signature(tmp_path: Path) -> None:
    content = "one\r\n1\r\n<|endoftext|>\r\ntwo\r\n"
    assert documents(tmp_path / "a.txt", content) == ["one\r\n1", "two"]
    assert documents(tmp_path / "a.txt", content.encode("utf-8-sig")) == ["one\r\n1", "two"]


@given(st.lists(st.text(st.sampled_from("ab \n\u2028é"), max_size=200), min_size=1, max_size=4))
def test_nothing_is_lost_but_line_breaks_at_the_borders(texts: list[str]) -> None:
    """The pieces of a document, joined, are the document, but for a last piece of nothing but white space."""
    with unittest.mock.patch.object(fledge.data.plain_text, "PIECE_CHARACTERS", 16):
        each = [list(cut([text])) for text in texts]
        joined = list(cut(["\n<|endoftext|>\n".join(texts)]))
    assert joined == [piece for pieces in each for piece in pieces]
    for text, pieces in zip(texts, each, strict=True):
        assert text.strip("\n").startswith("".join(pieces))
        assert "".join(pieces).rstrip() == text.strip("\n").rstrip()
        assert max(map(len, pieces), default=0) <= 16


def whole_cut(text: str, limit: int) -> Iterator[str]:
    """What `cut` promises, for a text in memory."""
    for document in SEPARATOR_LINE.split(text):
        document = document.strip("\r\n")
        while len(document) > limit:
            window = document[limit // 2 : limit]
            ends = [window.rfind("\n\n") + 2, window.rfind("\n") + 1]
            end = next((limit // 2 + e for e, least in zip(ends, (2, 1), strict=True) if e >= least), limit)
            yield document[:end]
            document = document[end:]
        if document.strip():
            yield document


@given(
    st.lists(
        st.sampled_from([*"ab\n\r \t", "\n\n", "<|endoftext|>", "\n<|endoftext|>\n", "<|"]), max_size=40
    ),
    st.lists(st.integers(0, 200), max_size=12),
)
def test_where_a_text_is_cut_does_not_depend_on_blocks(parts: list[str], borders: list[int]) -> None:
    text = "".join(parts)
    places = [0, *sorted(borders), len(text)]
    blocks = [text[a:b] for a, b in pairwise(places)]
    with unittest.mock.patch.object(fledge.data.plain_text, "PIECE_CHARACTERS", 16):
        assert list(cut(blocks)) == list(whole_cut(text, 16))


@pytest.mark.parametrize(
    ("unit", "end"),
    [("a" * 99 + "\n\n", "\n\n"), ("a" * 99 + "\n", "\n"), ("a" * 100, "a"), ("é" * 100, "é")],
)
def test_a_long_document_is_cut_where_it_hurts_least(unit: str, end: str, tmp_path: Path) -> None:
    content = (unit * (10 * PIECE_CHARACTERS // len(unit))).rstrip("\n")
    pieces = documents(tmp_path / "a.txt", content)
    assert "".join(pieces) == content
    assert len(pieces) >= 10
    assert all(piece.endswith(end) for piece in pieces[:-1])
    assert all(PIECE_CHARACTERS // 2 <= len(piece) <= PIECE_CHARACTERS for piece in pieces[:-1])


@given(
    st.lists(st.text(st.sampled_from("ab\né€😀"), max_size=40), max_size=10),
    st.sampled_from([5, 8, 64]),
)
def test_characters_are_whole_whatever_the_block(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str], block: int
) -> None:
    text = "".join(parts)
    path = tmp_path_factory.mktemp("blocks") / "a.txt"
    with unittest.mock.patch.object(fledge.data.plain_text, "BLOCK_BYTES", block):
        assert documents(path, text) == list(cut([text]))


# Not resource.ru_maxrss, which starts at what the parent process has.
MEMORY = """
import sys
from pathlib import Path
from fledge.data.sources import Source, read_documents

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

before = peak()
count = sum(len(text) for text in read_documents(Source("a", sys.argv[1], None)))
print(count, peak() - before)
"""
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a process's peak")


def memory(path: Path) -> tuple[int, int]:
    """The characters read in a process of its own, and by how many kB it grew."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", MEMORY, str(path)]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    count, grown = map(int, made.stdout.split())
    return count, grown


@needs_proc
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "one-line.txt", "a.jsonl.zst"])
def test_a_file_is_not_in_memory_as_a_whole(name: str, tmp_path: Path) -> None:
    line = b"word " * 19 + (b"word" if name.startswith("one") else b"word\n")
    if "jsonl" in name:
        line = json.dumps({"text": line.decode() * 100}).encode() + b"\n"
    content = line * (40_000_000 // len(line))
    (tmp_path / name).write_bytes(PACK.get(Path(name).suffix, bytes)(content))
    del content
    count, grown = memory(tmp_path / name)
    assert count > 38_000_000
    assert grown < 20_000


@needs_proc
def test_a_row_group_is_not_in_memory_as_a_whole(tmp_path: Path) -> None:
    """Of 120 MB; the package itself takes some 60 MB."""
    noise = random.Random(0).randbytes(6_000_000).hex()
    texts = [noise[i : i + 4000] for i in range(0, len(noise), 4000)] * 10
    pq.write_table(
        pa.table({"text": texts}), tmp_path / "a.parquet", use_dictionary=False, compression="none"
    )
    count, grown = memory(tmp_path / "a.parquet")
    assert count == 120_000_000
    assert grown < 110_000


# Endings, and what files are packed in.


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.txt", "text"),
        ("a", "text"),
        ("a.py.gz", "text"),
        ("A.JSONL", "jsonl"),
        ("a.jsonl.gz", "jsonl"),
        ("a.Jsonl.ZST", "jsonl"),
        ("a.ndjson", "jsonl"),
        ("a.json", "text"),
        ("a.parquet", "parquet"),
        ("a.warc.gz", "warc"),
        ("a.warc.wet.gz", "warc"),
        ("a.wet", "warc"),
        ("a.tar.gz", "archive"),
        ("a.zip", "archive"),
    ],
)
def test_a_kind_is_told_by_the_ending(name: str, kind: str) -> None:
    assert kind_of(Path("x.parquet") / name) == kind


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_packed_files_hold_the_same(ending: str, parts: int, tmp_path: Path) -> None:
    """In one part, or in several behind each other, as tools that pack in parallel or append write them."""
    text = "\n".join(f"line {number} é" for number in range(5000)).encode()
    rows = b"\n".join(json.dumps({"text": f"row {number}"}).encode() for number in range(5000))
    for name, content in (("a.txt", text), ("a.jsonl", rows)):
        plain = documents(tmp_path / name, content)
        size = len(content) // parts + 1
        packed = b"".join(PACK[ending](content[i : i + size]) for i in range(0, len(content), size))
        assert documents(tmp_path / f"{name}{ending}", packed) == plain
        assert len(plain) == 5000 if "jsonl" in name else "".join(plain) == content.decode()


def test_padding_after_gzip_and_long_zstandard_windows(tmp_path: Path) -> None:
    padded = gzip.compress(b"te") + bytes(10_000) + gzip.compress(b"xt") + bytes(3)
    assert documents(tmp_path / "a.txt.gz", padded) == ["text"]
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=28, enable_ldm=True)
    long = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    assert documents(tmp_path / "a.txt.zst", long.compress(b"text") + long.flush()) == ["text"]


ROWS = b"".join(json.dumps({"text": f"row {n} {n**9}"}).encode() + b"\n" for n in range(20_000))


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_file_that_is_cut_off_ends_with_one_fault(name: str, ending: str, tmp_path: Path) -> None:
    """What stands before the end is read; the readers of gzip and zstandard alone do not all notice."""
    packed = PACK[ending](ROWS)
    path = tmp_path / (name + ending)
    message = fault(path, packed[: len(packed) // 2])
    assert ": ends too soon, after line " in message
    assert 1000 < int(message.split("line ")[1].split(";")[0]) < 19_000
    bad = BadLines(skip=True)
    text = "\n".join(read(path, bad))
    assert bad.count == 1
    assert bad.examples == [str(path) + message]
    assert "row 999 " in text
    assert "row 19999 " not in text
    for end in (0, 3, len(packed) - 1):
        assert ": ends too soon" in fault(path, packed[:end])


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_broken_packed_data_is_named(ending: str, tmp_path: Path) -> None:
    name = {".gz": "gzip", ".zst": "zstandard"}[ending]
    path = tmp_path / f"a.jsonl{ending}"
    assert f": cannot be read on after line 0 (broken {name} data" in fault(path, b"plain text after all")
    packed = bytearray(PACK[ending](ROWS))
    packed[len(packed) // 2 : len(packed) // 2 + 400] = bytes(400)
    message = fault(path, bytes(packed))
    assert f"(broken {name} data" in message or ":" in message.split("line")[0]
    bad = BadLines(skip=True)
    assert len(read(path, bad)) > 1000
    assert bad.count >= 1


def test_gzip_checks_its_sum(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(b"text\n"))
    packed[-5] ^= 1  # of the sum
    assert "incorrect data check" in fault(tmp_path / "a.txt.gz", bytes(packed))


def test_a_file_that_becomes_shorter_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(ROWS)
    found = file_documents(path, "text", BadLines(skip=True))
    next(found)
    path.write_bytes(ROWS[:70_000])
    with pytest.raises(UserError, match=r"a\.jsonl: became shorter while it was read"):
        list(found)


def test_an_archive_is_no_text(tmp_path: Path) -> None:
    assert ": an archive; unpack it" in fault(tmp_path / "a.tar.gz", gzip.compress(b"text"))


# JSON Lines.


def test_jsonl_has_a_document_a_line(tmp_path: Path) -> None:
    texts = ["one\n<|endoftext|>\n1", "two", "", " \n", "x" * 40_000]
    content = "\n\n".join(json.dumps({"text": text, "id": 3}) for text in texts)
    kept = ["one\n<|endoftext|>\n1", "two", "x" * 40_000]
    assert documents(tmp_path / "a.jsonl", content) == kept
    assert documents(tmp_path / "a.jsonl", "\ufeff" + content) == kept
    (tmp_path / "b.jsonl").write_text('{"text": 1, "body": "here"}')
    assert read(tmp_path / "b.jsonl", field="body") == ["here"]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_an_empty_file_has_no_documents(name: str, tmp_path: Path) -> None:
    for content in (b"", b"\n"):
        assert documents(tmp_path / name, PACK.get(Path(name).suffix, bytes)(content)) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\ntwo\n\xff", ":3: not valid UTF-8 (byte 8 of the text)"),
        ("a.txt", b"one\n" * 400_000 + b"a\xe9b\n", ":400001: not valid UTF-8 (byte 1600001 of the text)"),
        ("a.txt", b"one\n\xe2\x82", ":2: not valid UTF-8 (byte 4 of the text)"),
        ("a.txt", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\xff", ": a binary file, not text; leave it out"),
        ("a.txt", "Windows".encode("utf-16"), ": UTF-16 text; convert it to UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', ":2: not valid UTF-8 (byte 10 of the line)"),
        ("a.jsonl", b'{"txt": "a", "n": 1}', ':1: the line has no field "text"; it has "txt", "n"'),
        ("a.jsonl", b'{"text": "a"}\n\n{}', ':3: the line has no field "text"; it has none'),
        ("a.jsonl", b'{"text": null}', ':1: the line holds no string in the field "text" but null'),
        ("a.jsonl", b'{"text": 3}', ':1: the line holds no string in the field "text" but int'),
        ("a.jsonl", b'{"text": "a"', ":1: not valid JSON"),
        ("a.jsonl", b'["text"]', ":1: a line must be a JSON object, found list"),
        ("a.jsonl", b'{"text": "\\udc80"}', ":1: '\\udc80' is half of a surrogate pair"),
        ("a.jsonl", b"[" * 100_000, ":1: not valid JSON"),
    ],
)
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_bad_content_is_named_by_file_and_line(
    name: str, content: bytes, message: str, packed: str, tmp_path: Path
) -> None:
    assert fault(tmp_path / (name + packed), PACK[packed](content)).startswith(message)


def test_many_fields_are_named_in_part(tmp_path: Path) -> None:
    row = json.dumps({f"f{n}": n for n in range(15)}).encode()
    assert fault(tmp_path / "a.jsonl", row).endswith('"f8", "f9" and 5 more')


@pytest.mark.parametrize(
    ("name", "content", "kept", "count"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text"}\n{"text": 1}\n{}\n[]\n{"text": "b"}', ["a", "b"], 4),
        ("a.jsonl", b'{"text": "\xff"}\n{"text": "\\ud800"}\n{"text": "b"}', ["b"], 2),
        ("a.txt", b"one\n\xff\ntwo\n\xfe\xff", ["one\ntwo"], 2),
        ("a.txt", b"\x00\xff\none\n", [], 1),
        ("a.tar", b"one", [], 1),
    ],
)
@pytest.mark.parametrize("packed", ["", ".zst"])
def test_bad_lines_can_be_skipped(
    name: str, content: bytes, kept: list[str], count: int, packed: str, tmp_path: Path
) -> None:
    path = tmp_path / (name + packed)
    path.write_bytes(PACK[packed](content))
    bad = BadLines(skip=True)
    assert read(path, bad) == kept
    assert bad.count == count == len(bad.examples)
    assert all(message.startswith(str(path)) for message in bad.examples)


@given(st.lists(st.sampled_from([b"good\n", b"b\xffd\n", "\u20ac\n".encode(), b"\n"]), max_size=60))
def test_good_lines_stay_whatever_the_block(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    path.write_bytes(b"".join(lines))
    bad = BadLines(skip=True)
    with unittest.mock.patch.object(fledge.data.plain_text, "BLOCK_BYTES", 16):
        found = read(path, bad)
    good = b"".join(line for line in lines if b"\xff" not in line)
    assert found == list(cut([good.decode()]))
    assert bad.count == lines.count(b"b\xffd\n")


# Parquet.


def parquet(path: Path, table: dict[str, list[object]], **options: object) -> Path:
    pq.write_table(pa.table(table), path, **options)
    return path


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
@pytest.mark.parametrize("options", [{}, {"row_group_size": 7}, {"compression": "zstd"}])
def test_parquet_has_a_document_a_row(kind: pa.DataType, options: dict[str, object], tmp_path: Path) -> None:
    texts = [f"text {number} é" for number in range(200)]
    table = {"id": list(range(200)), "text": pa.array(texts, kind), "a.b": texts[::-1]}
    path = parquet(tmp_path / "a.PARQUET", table, **options)
    assert read(path) == texts
    assert read(path, field="a.b") == texts[::-1]
    rows = list(read_records(Source("a", str(path), None)))
    assert rows[3] == {"id": 3, "text": texts[3], "a.b": texts[-4]}
    assert len(rows) == 200


def test_parquet_holds_conversations(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}]
    path = parquet(tmp_path / "a.parquet", {"messages": [messages]})
    assert list(read_records(Source("a", str(path), None))) == [{"messages": messages}]


def test_what_is_wrong_with_parquet_is_named(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"txt": ["a"], "n": [1]})
    content = path.read_bytes()
    assert fault(path, content) == ': has no column "text"; it has "txt", "n"'
    assert ": cannot be read on after row 0 (" in fault(path, content[:-20])
    assert ": cannot be read on after row 0 (" in fault(path, b"")
    path = parquet(tmp_path / "b.parquet", {"text": ["a", None, "b"]})
    content = path.read_bytes()
    assert fault(path, content).startswith(': row 2: the line holds no string in the field "text" but null')
    bad = BadLines(skip=True)
    assert (read(path, bad), bad.count) == (["a", "b"], 1)
    path = parquet(tmp_path / "c.parquet", {"text": [b"a", b"\xff"]})
    assert fault(path, path.read_bytes()).endswith('in the field "text" but bytes')
    assert ": a Parquet file is read in parts" in fault(tmp_path / "c.parquet.gz", gzip.compress(content))


def test_a_broken_page_of_parquet_ends_the_file(tmp_path: Path) -> None:
    texts = [f"{number:050}" for number in range(3000)]
    path = parquet(
        tmp_path / "a.parquet",
        {"text": texts},
        row_group_size=1000,
        compression="zstd",
        use_dictionary=False,
        write_page_checksum=True,
    )
    group = pq.ParquetFile(path).metadata.row_group(2).column(0)
    content = bytearray(path.read_bytes())
    middle = group.data_page_offset + group.total_compressed_size // 2
    content[middle : middle + 50] = bytes(50)
    path.write_bytes(content)
    bad = BadLines(skip=True)
    found = read(path, bad)
    assert found == texts[: len(found)]
    assert 1000 <= len(found) <= 2000
    assert bad.count == 1


def test_text_in_parquet_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    raw = pa.py_buffer(b"ab\xffcd")
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 2, 3, 5)))
    text = pa.StringArray.from_buffers(3, offsets, raw)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": text}), path)
    assert fault(path, path.read_bytes()) == ": row 2: not valid UTF-8"
    bad = BadLines(skip=True)
    assert (read(path, bad), bad.count) == (["ab", "cd"], 1)


# Optional packages.


def test_a_missing_package_is_named() -> None:
    with pytest.raises(UserError, match=r"needs the package no_such_package .*pip install 'fledge\[data\]'"):
        need("no_such_package.part", "data")


# Texts made of several fields.


def test_a_field_with_placeholders_joins_fields(tmp_path: Path) -> None:
    """Placeholders in the values are text; braces that name no field stay."""
    rows = [{"q": "2+{a}?", "a": "{q}", "n": 3}, {"q": "é", "a": "", "n": 0.5}]
    field = "{n}. Q: {q}\nA: {a} {}"
    expected = ["3. Q: 2+{a}?\nA: {q} {}", "0.5. Q: é\nA:  {}"]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(path, field=field) == expected
    pq.write_table(pa.table({"q": ["2+{a}?"], "a": ["{q}"], "other": [b"\xff"]}), tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet", field="Q: {q} A: {a}") == ["Q: 2+{a}? A: {q}"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"q": "x"}, 'the line has no field "a"; it has "q"'),
        ({"q": "x", "a": None}, 'holds no string in the field "a" but null'),
        ({"q": ["x"], "a": "y"}, 'holds no string in the field "q" but list'),
    ],
)
def test_a_missing_placeholder_is_named(row: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(UserError) as error:
        read(path, field="{q} {a}")
    assert str(error.value).startswith(f"{path}:1: ")
    assert message in str(error.value)
