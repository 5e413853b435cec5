"""Sources: which documents a file holds, what of them is held out, and which line is at fault."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.data.sources import (
    BadLines,
    Source,
    check_source,
    has_conversations,
    held_out,
    held_out_hashes,
    list_files,
    parse_source,
    parse_sources,
    read_documents,
    read_records,
    source_version,
    split_documents,
)
from fledge.errors import UserError

# What --data means.


# Files whose names could be read as name and weight.
SPLIT = ("dt=2024/x.txt", "notes:2024", "e=f:3", "a.toml", "m.toml:2")


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("wiki.txt", "a:b.txt", "c=d.txt", "books/one.txt", "rows.jsonl.gz", "[a].txt", *SPLIT):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "loop").symlink_to("loop")
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
        ("rows.jsonl.gz:2", "rows", "rows.jsonl.gz", 2.0),
        ("books/*.txt", "books", "books/*.txt", None),
        ("books/**/*.t?t:0.5", "books", "books/**/*.t?t", 0.5),
        ("x=w[i]ki*", "x", "w[i]ki*", None),
        ("[a].txt", "[a]", "[a].txt", None),
        ("python", "python", "python", None),
        ("python:0.5", "python", "python", 0.5),
        ("python:facts", "facts", "python:facts", None),
        ("p=python:source:3", "p", "python:source", 3.0),
        ("hf:owner/name", "name", "hf:owner/name", None),
        ("hf:owner/name:0.5", "name", "hf:owner/name", 0.5),
        ("hf:owner/name:test", "name", "hf:owner/name:test", None),
        ("x=hf:owner/name/part:test:2", "x", "hf:owner/name/part:test", 2.0),
        ("hf:books", "books", "hf:books", None),
        ("dt=2024/x.txt", "x", "dt=2024/x.txt", None),
        ("dt=2024", "dt=2024", "dt=2024", None),
        ("d=dt=2024/x.txt:2", "d", "dt=2024/x.txt", 2.0),
        ("notes:2024", "notes:2024", "notes:2024", None),
        ("notes:2024:0.5", "notes:2024", "notes:2024", 0.5),
        ("e=f:3", "e=f:3", "e=f:3", None),
        ("m.toml:2", "m", "m.toml:2", None),
        ("t=*.toml:2", "t", "*.toml", 2.0),
    ],
)
@pytest.mark.usefixtures("texts")
def test_a_source_is_read(text: str, name: str, path: str, weight: float | None) -> None:
    source = parse_source(text)
    assert (source.name, source.path, source.weight) == (name, path, weight)


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
        ("*.json", r"\*.json: no file matches"),
        ("b*", "it matches folders only: end it with"),
        ("python:topic", "no such part of the Python corpus; the nearest is 'topics'"),
        ("hf:", "write hf:owner/name"),
        ("hf:a/b/c/d", "no such folder, and no name"),
        ("hf:./texts", "no such folder, and no name"),
        ("dt=2025/x.txt", r"no such file or folder: 2025/x.txt \(read as NAME=PATH:WEIGHT\)$"),
        ("notes:2025", r"no such file or folder: notes \(read as NAME=PATH:WEIGHT\)$"),
        ("nothing.txt", "no such file or folder: nothing.txt$"),
        ("a.toml:0.5", "a mixture file is given alone, without name and weight$"),
        ("a=a.toml", "a mixture file is given alone, without name and weight$"),
        ("loop", "no such file or folder: loop$"),
        ("loop/*.txt", "no file matches$"),
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


# What can be set.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"contains": "a("}, r"contains = 'a\(': not a regular expression"),
        ({"lacks": "*"}, r"lacks = '\*': not a regular expression"),
        ({"field": ""}, "^field is empty; name the field"),
        ({"min_characters": -1}, r"^min_characters \(-1\) is below 0$"),
        ({"path": ""}, "^path is empty; name a file"),
        ({"min_characters": 5, "max_characters": 4}, r"max_characters \(4\) is below min_characters \(5\)"),
    ],
)
@pytest.mark.usefixtures("texts")
def test_settings_that_cannot_be_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_source(Source(**{"name": "a", "path": "wiki.txt", "weight": None, **settings}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, ["ab", "abc", "abcd", "x\ny"]),
        ({"min_characters": 3}, ["abc", "abcd", "x\ny"]),
        ({"max_characters": 3}, ["ab", "abc", "x\ny"]),
        ({"contains": "c"}, ["abc", "abcd"]),
        ({"lacks": "c"}, ["ab", "x\ny"]),
        ({"contains": "(?m)^y$"}, ["x\ny"]),
        ({"contains": "b", "lacks": "d", "min_characters": 3}, ["abc"]),
    ],
)
def test_settings_choose_documents(settings: dict[str, object], kept: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["ab", "abc", "abcd", "x\ny"]))
    source = Source("a", str(path), None, **settings)  # type: ignore[arg-type]
    assert list(read_documents(source)) == kept


# Which files.


def make(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)


def of(path: Path | str) -> Source:
    return Source("a", str(path), None)


def test_a_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    make(tmp_path, "b.txt", "a/z.jsonl", "a/.hidden", ".git/config", "c.md", "a/b/c/d")
    found = ["a/b/c/d", "a/z.jsonl", "b.txt", "c.md"]
    assert list(read_documents(of(tmp_path))) == found
    files = list_files(of(tmp_path))
    assert [str(file.path.relative_to(tmp_path)) for file in files] == found
    assert [file.bytes for file in files] == [file.path.stat().st_size for file in files]
    assert [file.modified_ns for file in files] == [file.path.stat().st_mtime_ns for file in files]


def test_links_are_followed_but_no_folder_is_read_twice(tmp_path: Path) -> None:
    make(tmp_path, "in/a.txt", "out/b.txt", "out/c.txt")
    (tmp_path / "in" / "x").symlink_to(tmp_path / "out")
    (tmp_path / "in" / "y").symlink_to(tmp_path / "out")
    (tmp_path / "in" / "z").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "d.txt").symlink_to(tmp_path / "out" / "b.txt")
    assert list(read_documents(of(tmp_path / "in"))) == ["in/a.txt", "out/b.txt", "out/b.txt", "out/c.txt"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.txt", ["a.txt", "b.txt"]),
        ("**/*.txt", ["a.txt", "b.txt", "d/c.txt", "d/e/f.txt"]),
        ("[ab].*", ["a.txt", "b.txt"]),
        ("d/?.txt", ["d/c.txt"]),
        ("d/**", ["d/c.txt", "d/e/f.txt"]),
        ("*", ["a.txt", "b.txt"]),
        (".h/*", [".h/x.txt"]),
    ],
)
def test_a_glob_is_its_files(pattern: str, found: list[str], tmp_path: Path) -> None:
    make(tmp_path, "b.txt", "a.txt", "d/c.txt", "d/e/f.txt", ".h/x.txt", ".i.txt")
    assert list(read_documents(of(tmp_path / pattern))) == found


def test_a_file_whose_name_looks_like_a_glob_is_itself(tmp_path: Path) -> None:
    make(tmp_path, "[ab].txt", "a.txt")
    assert list(read_documents(of(tmp_path / "[ab].txt"))) == ["[ab].txt"]


def test_where_no_file_is_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    for read in (list_files, lambda source: list(read_documents(source)), has_conversations):
        for path, message in (
            (tmp_path / "empty", "empty: the folder has no files"),
            (tmp_path / "*.txt", r"\*.txt: no file matches"),
            (tmp_path / "none", "no such file or folder: .*none"),
            ("/dev/null", "/dev/null: neither a file nor a folder"),
        ):
            with pytest.raises(UserError, match=message):
                read(of(path))


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused here by hand: whoever runs the tests may be allowed everything."""
    make(tmp_path, "a.txt", "locked/b.txt")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="locked: cannot be read: Permission denied"):
        list_files(of(tmp_path))


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    make(tmp_path, "a.txt", "b.txt")
    documents = read_documents(of(tmp_path))
    assert next(documents) == "a.txt"
    (tmp_path / "b.txt").unlink()
    with pytest.raises(UserError, match=r"b\.txt: no such file"):
        next(documents)


# Rows, and which of them are conversations.


def test_records_are_rows_of_all_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n\n{"y": [2]}\n')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"z": null}'))
    assert list(read_records(of(tmp_path))) == [{"x": 1}, {"y": [2]}, {"z": None}]
    (tmp_path / "c.txt").write_text("text")
    with pytest.raises(UserError, match=r"c\.txt: has no rows; only JSON Lines"):
        list(read_records(of(tmp_path)))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ('{"messages": []}', True),
        ('{"text": "a"}', False),
        ('{"messages": [], "text": "a"}', False),
        ('broken\n{"messages": []}', True),
        ("", False),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "folder/b.jsonl"])
def test_conversations_are_told_by_the_first_row(name: str, row: str, expected: bool, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(row.encode()) if name.endswith("gz") else row.encode())
    assert has_conversations(of(path)) == expected
    assert has_conversations(of(tmp_path)) == expected
    assert not has_conversations(Source("a", str(path), None, field="messages"))


def test_text_holds_no_conversations(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text('{"messages": []}')
    assert not has_conversations(of(tmp_path))
    assert not has_conversations(of("python:topics"))
    assert has_conversations(of("python:chats"))


# The demo corpus.


@pytest.fixture
def small_corpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The corpus of a few facts, whose making takes a moment."""

    def build(directory: Path) -> None:
        for part in ("topics", "source", "facts", "questions", "chats"):
            (directory / f"{part}.jsonl").write_text(json.dumps({"text": f"text of {part}"}))

    monkeypatch.setattr("fledge.data.stdlib.build_corpus", build)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    from fledge.data.locations import python_corpus

    python_corpus.cache_clear()
    yield
    python_corpus.cache_clear()


@pytest.mark.usefixtures("small_corpus")
def test_the_python_corpus_needs_no_file() -> None:
    every = ["text of topics", "text of source", "text of facts", "text of questions"]
    assert list(read_documents(of("python"))) == every
    assert list(read_documents(of("python:facts"))) == every[2:3]
    assert list(read_documents(Source("a", "python", None, field="body"))) == every
    assert list_files(of("python")) == []
    with pytest.raises(UserError, match="nearest is 'facts'"):
        list(read_documents(of("python:fact")))


def test_sources_without_files_have_a_version(tmp_path: Path) -> None:
    assert "Python 3." in source_version(of("python"))
    make(tmp_path, "a.jsonl")
    assert source_version(of(tmp_path)) == ""
    assert source_version(of("hf:owner/name")) == ""
    before = source_version(of(f"hf:{tmp_path}"))
    make(tmp_path, "b.jsonl")
    assert source_version(of(f"hf:{tmp_path}")) != before != ""


# What cannot be read.


def test_bad_lines_are_an_error_or_counted() -> None:
    with pytest.raises(UserError, match=r"^a:1: broken; --skip-bad-lines goes on without it$"):
        BadLines().report("a:1: broken")
    bad = BadLines(skip=True)
    for number in range(7):
        bad.report(f"a:{number}")
    assert (bad.count, bad.examples) == (7, [f"a:{number}" for number in range(5)])


def test_without_an_account_the_first_bad_line_is_an_error(tmp_path: Path) -> None:
    """Of a caller that has no flag to skip it, so none is spoken of."""
    (tmp_path / "a.jsonl").write_text("[]")
    with pytest.raises(UserError, match=r"a\.jsonl:1: a line must be a JSON object, found list$"):
        list(read_documents(of(tmp_path)))


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


@given(st.lists(st.text(max_size=3), max_size=40), st.sampled_from([0.0, 1e-9, 0.01, 0.3, 1 / 3, 0.9, 1.0]))
def test_hashes_alone_decide(made: list[str], share: float) -> None:
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in made)
    hashes = np.array([int.from_bytes(digest, "big") for digest in digests], dtype=np.uint64)
    held = held_out_hashes(hashes, share)
    training, validation = split_documents(made, share)
    assert [text for text, out in zip(made, held, strict=True) if out] == validation
    if any(held_out(text, share) for text in made) or len(set(made)) < 2:
        assert held.tolist() == [held_out(text, share) for text in made]
    elif share > 0:
        assert set(validation) == {min(made, key=lambda text: hashes[made.index(text)])}
    assert len(training) + len(validation) == len(made)


def test_a_limit_between_two_floats_is_exact() -> None:
    """Beyond 2^53 a comparison as floats would take neighbours for equal."""
    limit = int(0.3 * 2**64)
    hashes = np.array([limit - 1, limit, limit + 1, 2**64 - 1], dtype=np.uint64)
    assert held_out_hashes(hashes, 0.3).tolist() == [True, False, False, False]
    assert held_out_hashes(hashes, 1.0).all()
