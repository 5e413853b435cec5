"""Files: a failure leaves the old or the new one, and what cannot be read is named by file and line."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.errors import UserError
from fledge.files import (
    new_directory,
    read_json,
    read_jsonl,
    read_text,
    remove,
    remove_leftovers,
    sha256,
    write_json,
    write_text,
)


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("function", ["write_text", "replace"])
def test_a_failed_write_leaves_the_old_file(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")
    monkeypatch.setattr(Path, function, full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("function", ["rename", "mkdir"])
def test_a_failed_directory_leaves_the_old_one(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    with new_directory(path) as new:
        (new / "a").write_text("old")
    with monkeypatch.context() as patched:
        patched.setattr(Path, function, full_disk)
        with pytest.raises(OSError, match="No space left"), new_directory(path, overwrite=True) as new:
            (new / "a").write_text("new")
    assert (path / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@given(st.dictionaries(st.text(), st.one_of(st.none(), st.integers(), st.text(), st.floats(allow_nan=False))))
def test_json_comes_back(tmp_path_factory: pytest.TempPathFactory, value: dict[str, object]) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair is no text
        return
    path = tmp_path_factory.mktemp("json") / "a.json"
    write_json(path, value)
    assert read_json(path) == value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1', r"not valid JSON \("),
        (b"", "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (None, "no such file"),
    ],
)
def test_a_broken_json_file_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_json(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_lines_are_numbered_and_blank_ones_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    # Unicode has line separators that are not line breaks of JSON Lines
    path.write_bytes('{"a": "1\u2028\x85"}\r\n\n  \n{"a": "\U0001f600"}\n{"a": "\\ud83d\\ude00"}'.encode())
    assert list(read_jsonl(path)) == [
        (1, {"a": "1\u2028\x85"}), (4, {"a": "\U0001f600"}), (5, {"a": "\U0001f600"}),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1', "not valid JSON"),
        (b"[1]", "must be a JSON object, found list"),
        (b'"a"', "must be a JSON object, found str"),
        (b'{"a": "\xff"}', r"not valid UTF-8 \(byte 7 of the line\)"),
        (b'{"a": "\\uD800"}', r"'\\ud800' is half of a surrogate pair"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_broken_line_is_named(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b'\n{"a": 2}\n')
    with pytest.raises(UserError, match=message) as error:
        list(read_jsonl(path))
    assert str(error.value).startswith(f"{path}:3: ")
    assert "\n" not in str(error.value)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    for read in (read_text, lambda path: list(read_jsonl(path))):
        with pytest.raises(UserError, match="nothing: no such file"):
            read(tmp_path / "nothing")
        with pytest.raises(UserError, match=f"{tmp_path}: cannot be read: Is a directory"):
            read(tmp_path)


def test_invalid_text_is_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("é\nab\n".encode() + b"c\xffd\n")
    with pytest.raises(UserError, match=r"a\.txt:3: not valid UTF-8 \(byte 7 of the file\)"):
        read_text(path)


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a" * 3_000_000)
    (tmp_path / "b").write_bytes(b"bc")
    assert sha256([tmp_path / "a", tmp_path / "b"]) == hashlib.sha256(b"a" * 3_000_000 + b"bc").hexdigest()


def test_remove(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a").touch()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "directory" / "sub").mkdir(parents=True)
    for name in ("file", "link", "directory", "missing"):
        remove(tmp_path / name)
    assert list(tmp_path.rglob("*")) == [tmp_path / "kept", tmp_path / "kept" / "a"]


def test_only_leftovers_are_removed(tmp_path: Path) -> None:
    kept = {".hidden", "a.tmp-1", "model"}
    for name in kept:
        (tmp_path / name).touch()
    (tmp_path / ".metrics.jsonl.tmp-12").touch()
    (tmp_path / ".model.tmp-12" / "sub").mkdir(parents=True)
    (tmp_path / ".model.tmp-12-old").mkdir()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept
    remove_leftovers(tmp_path / "nothing")
