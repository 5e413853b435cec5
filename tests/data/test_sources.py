"""Sources: which documents a file holds, what of them is held out, and which line is at fault."""

from __future__ import annotations

import hashlib
import json
import random
import time
import unittest.mock
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fledge.data.sources
from fledge.data.sources import (
    PIECE_CHARACTERS,
    held_out,
    parse_source,
    parse_sources,
    read_documents,
    split_documents,
)
from fledge.errors import UserError

# What --data means.


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("wiki.txt", "a:b.txt", "c=d.txt", "books/one.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "name", "path", "weight"),
    [
        ("wiki.txt", "wiki", "wiki.txt", None),
        ("w=wiki.txt", "w", "wiki.txt", None),
        ("wiki.txt:0.5", "wiki", "wiki.txt", 0.5),
        ("w=wiki.txt:2", "w", "wiki.txt", 2.0),
        ("w=wiki.txt:1e-3", "w", "wiki.txt", 0.001),
        ("books", "books", "books", None),
        ("books/:3", "books", "books/", 3.0),
        ("a:b.txt", "a:b", "a:b.txt", None),
        ("a:b.txt:3", "a:b", "a:b.txt", 3.0),
        ("x=c=d.txt", "x", "c=d.txt", None),
    ],
)
@pytest.mark.usefixtures("texts")
def test_a_source_is_read(text: str, name: str, path: str, weight: float | None) -> None:
    source = parse_source(text)
    assert (source.name, source.path, source.weight) == (name, Path(path), weight)


def test_the_current_folder_has_a_name(texts: Path) -> None:
    assert parse_source(".").name == texts.name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing.txt", "no such file or folder: nothing.txt"),
        ("w=nothing.txt:0.5", "no such file or folder: nothing.txt"),
        ("", "no path"),
        ("w=", "no path"),
        ("w=:0.5", "no path"),
        ("wiki.txt:0", "the weight must be a positive number, got 0"),
        ("wiki.txt:-1", "the weight must be a positive number, got -1"),
        ("wiki.txt:nan", "the weight must be a positive number, got nan"),
        ("wiki.txt:inf", "the weight must be a positive number, got inf"),
        ("wiki.txt:1e999", "the weight must be a positive number"),
        ("wiki.txt:half", "no such file or folder: wiki.txt:half"),
    ],
)
@pytest.mark.usefixtures("texts")
def test_a_source_that_is_none_is_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        parse_source(text)
    assert str(error.value).startswith(f"--data {text}: ")


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ((), "name at least one"),
        (("wiki.txt", "wiki.txt"), "two sources are called 'wiki'"),
        (("books=wiki.txt", "books"), "two sources are called 'books'"),
        (("wiki.txt:0.5", "books"), "source 'books' has no weight while others do"),
    ],
)
@pytest.mark.usefixtures("texts")
def test_sources_must_go_together(sources: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_sources(sources)


@pytest.mark.usefixtures("texts")
def test_all_weights_or_none() -> None:
    assert [source.weight for source in parse_sources(("wiki.txt:1", "books:3"))] == [1.0, 3.0]
    assert [source.weight for source in parse_sources(("wiki.txt", "books"))] == [None, None]


# What documents a file holds.


def documents(path: Path, content: str | bytes) -> list[str]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_documents(path))


def test_a_text_file_is_cut_at_separator_lines(tmp_path: Path) -> None:
    content = "\n\none\n\n1\n<|endoftext|>\n\n<|endoftext|>  \r\n two \n<|endoftext|>"
    assert documents(tmp_path / "a.txt", content) == ["one\n\n1", " two "]


def test_the_separator_inside_a_line_is_text(tmp_path: Path) -> None:
    content = "documents end with <|endoftext|>\n x<|endoftext|> \n<|endoftext|>x"
    assert documents(tmp_path / "a.txt", content) == [content]


def test_windows_line_breaks(tmp_path: Path) -> None:
    assert documents(tmp_path / "a.txt", "one\r\n1\r\n<|endoftext|>\r\ntwo\r\n") == ["one\r\n1", "two"]


@given(st.lists(st.text(st.sampled_from("ab \n\u2028é"), max_size=200), min_size=1, max_size=4))
def test_nothing_is_lost_but_line_breaks_at_the_borders(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    """The pieces of a document, joined, are the document, but for a last piece of nothing but white space."""
    path = tmp_path_factory.mktemp("cut") / "a.txt"
    with unittest.mock.patch.object(fledge.data.sources, "PIECE_CHARACTERS", 16):
        each = [documents(path, text) for text in texts]
        assert documents(path, "\n<|endoftext|>\n".join(texts)) == [
            piece for pieces in each for piece in pieces
        ]
    for text, pieces in zip(texts, each, strict=True):
        assert text.strip("\n").startswith("".join(pieces))
        assert "".join(pieces).rstrip() == text.strip("\n").rstrip()
        assert max(map(len, pieces), default=0) <= 16


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


def test_a_large_file_takes_time_in_proportion(tmp_path: Path) -> None:
    """30 MB in one document: cutting the rest anew for every piece would copy 30 GB."""
    content = ("word " * 19 + "word\n") * 300_000
    started = time.process_time()
    pieces = documents(tmp_path / "a.txt", content)
    assert time.process_time() - started < 3
    assert sum(map(len, pieces)) == len(content) - 1


def test_jsonl_has_a_document_a_line(tmp_path: Path) -> None:
    rows = [
        {"text": "one\n<|endoftext|>\n1"},
        {"text": "two", "id": 3},
        {"text": ""},
        {"text": " \n"},
        {"text": "x" * 40_000},
    ]
    content = "\n\n".join(json.dumps(row) for row in rows)
    read = documents(tmp_path / "a.jsonl", content)
    assert read == ["one\n<|endoftext|>\n1", "two", "x" * 40_000]


def test_a_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.jsonl", "a/.hidden", ".git/config", "c.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    assert list(read_documents(tmp_path)) == ["a/z.jsonl", "b.txt", "c.md"]


def test_an_empty_file_has_no_documents_and_an_empty_folder_is_named(tmp_path: Path) -> None:
    assert documents(tmp_path / "a.txt", "") == []
    assert documents(tmp_path / "a.jsonl", "\n") == []
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder: the folder has no files"):
        list(read_documents(tmp_path / "folder"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\ntwo\n\xff", ":3: not valid UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', ":2: not valid UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n\n{"txt": "a"}', ':3: the line has no field "text"'),
        ("a.jsonl", b'{"text": null}', ':1: the line has no field "text"'),
        ("a.jsonl", b'{"text": 3}', ':1: the line holds no string in the field "text"'),
        ("a.jsonl", b'{"text": "a"', ":1: not valid JSON"),
        ("a.jsonl", b'["text"]', ":1: a line must be a JSON object"),
        ("a.jsonl", b'{"text": "\\udc80"}', ":1: .* half of a surrogate pair"),
    ],
)
@pytest.mark.parametrize("in_folder", [False, True])
def test_bad_content_is_named_by_file_and_line(
    name: str, content: bytes, message: str, in_folder: bool, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        list(read_documents(tmp_path if in_folder else path))
    assert str(error.value).startswith(f"{path}:")
    assert "\n" not in str(error.value)


# What is held out.


def test_the_split_is_by_a_hash_of_the_text() -> None:
    """Anyone can repeat it: BLAKE2b of the UTF-8 text, 8 bytes, below share * 2^64."""
    for text in ("one", "two", "three", "é", ""):
        place = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
        assert not held_out(text, place - 1e-9)
        assert held_out(text, place + 1e-9)
        assert not held_out(text, 0.0)
        assert held_out(text, 1.0)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_the_split_is_near_the_share(share: float) -> None:
    made = [f"document {i}" for i in range(20_000)]
    training, validation = split_documents(made, share)
    deviation = (share * (1 - share) / len(made)) ** 0.5
    assert len(validation) / len(made) == pytest.approx(share, abs=4 * deviation)
    assert sorted(training + validation) == sorted(made)


@given(st.lists(st.text(max_size=3), max_size=40), st.sampled_from([0.0, 0.01, 0.3, 0.9]), st.randoms())
def test_the_split_does_not_depend_on_order_or_company(
    made: list[str], share: float, rng: random.Random
) -> None:
    training, validation = split_documents(made, share)
    assert not set(training) & set(validation)  # identical documents are on one side
    assert sorted(training + validation) == sorted(made)
    shuffled = rng.sample(made, len(made))
    again = split_documents(shuffled, share)
    assert [sorted(part) for part in again] == [sorted(training), sorted(validation)]
    more = split_documents([*made, *(f"long text {i}" for i in range(1000))], share)
    if any(held_out(text, share) for text in made):
        assert set(validation) <= set(more[1])


def test_a_small_source_gives_up_one_document() -> None:
    made = [text for text in map(str, range(20)) if not held_out(text, 0.01)]
    training, validation = split_documents([*made, *made], 0.01)
    assert len(validation) == 2
    assert len(set(validation)) == 1
    assert len(training) == 2 * len(made) - 2
    assert split_documents(["only"], 0.01) == (["only"], [])
    assert split_documents(made, 0.0) == (made, [])
