"""Writing files so that a crash leaves the old or the new one, never a half; reading with clear errors."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from io import BufferedReader
from pathlib import Path
from typing import Any

from fledge.errors import UserError


@contextmanager
def new_directory(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory beside `path` that takes its name when the block ends without an error.

    A crash at any moment leaves either the old directory, the new one, or none; never a half.
    Raises UserError if `path` exists and `overwrite` is not set.
    """
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists already; choose another name or pass --overwrite")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        _sync_tree(temporary)
        if path.exists():
            old = path.parent / f".{path.name}.tmp-{os.getpid()}-old"
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete a file or directory; a directory is renamed first: a crash leaves no half under its name."""
    if path.is_dir() and not path.is_symlink():
        hidden = path.parent / f".{path.name}.tmp-{os.getpid()}-old"
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
        shutil.rmtree(hidden)
    else:
        path.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Whether a path has a temporary name of this module."""
    return fnmatch(path.name, ".*.tmp-*")


def remove_leftovers(directory: Path) -> None:
    """Delete what a crash left in `directory` under temporary names."""
    for path in list(directory.iterdir()) if directory.is_dir() else []:
        if not is_leftover(path):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(directory: Path) -> None:
    for file in directory.rglob("*"):
        _sync(file)
    _sync(directory)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text through a temporary name, so that readers see the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON (see `write_text`)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256(paths: Iterable[Path]) -> str:
    """The SHA-256 of the contents of files, one behind the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    """Read a JSON file; UserError that names the file if it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def read_text(path: Path) -> str:
    """Read a UTF-8 file; UserError that names file and line if it cannot be read or is not UTF-8."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: not valid UTF-8 (byte {error.start} of the file); convert it, or leave it out"
        ) from None


@contextmanager
def open_binary(path: Path) -> Iterator[BufferedReader]:
    """Open a file for reading bytes; UserError that names it if it cannot be opened."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    with file:
        yield file


def parse_json_object(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object of a line. Raises UserError, which begins with `where`, for invalid UTF-8, broken JSON,
    text with half of a surrogate pair, or anything that is no object.
    """
    try:
        value = json.loads(raw.decode("utf-8"))
        if b"\\ud" in raw.lower():  # only an escape can hold half of a pair
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not valid UTF-8 (byte {error.start} of the line)") from None
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise UserError(f"{where}: {half!a} is half of a surrogate pair, not a character") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: a line must be a JSON object, found {type(value).__name__}")
    return value


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON Lines file with their line numbers, blank lines left out.

    Raises UserError with file and line (see `parse_json_object`).
    """
    with open_binary(path) as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                yield number, parse_json_object(raw, f"{path}:{number}")
