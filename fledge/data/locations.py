"""Where the files of a source lie: a file, a folder, a glob, or the demo corpus made for the moment."""

from __future__ import annotations

import atexit
import glob
import os
import re
import shutil
import tempfile
from functools import cache
from pathlib import Path

from fledge.data.streams import PACKED
from fledge.errors import UserError

PYTHON_PARTS = ("topics", "source", "facts", "questions")
# Conversations, so no text to learn a vocabulary from: only when asked for by name.
PYTHON_CHATS = "chats"
WILDCARD = re.compile(r"[*?\[]")


def default_name(path: str) -> str:
    """What a source is called that has no name: its file or folder without endings; for a glob the folder."""
    kind, colon, rest = path.partition(":")
    if colon and kind == "python":
        return rest or kind
    if colon and kind == "hf":
        return rest.split(":")[0].rstrip("/").rpartition("/")[2] or kind
    if is_glob(path):
        parts = Path(path).parts
        fixed = next(place for place, part in enumerate(parts) if WILDCARD.search(part))
        return Path(os.path.realpath(Path(*parts[:fixed]))).name or "files"
    found = Path(os.path.realpath(path))  # Path.resolve fails for a link to itself
    return (Path(found.stem).stem if found.suffix.lower() in PACKED else found.stem) or "files"


def is_glob(path: str) -> bool:
    """Whether a path is a pattern; a file whose name has such letters is itself."""
    return bool(WILDCARD.search(path)) and not exists(path)


def exists(path: str) -> bool:
    """Whether there is a file or folder; UserError where a folder on the way cannot be read."""
    try:
        return Path(path).exists()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def find_files(path: str) -> list[Path]:
    """The files that a file's name, a folder or a glob stands for, sorted, without hidden ones in folders.

    Raises UserError when there are none, or a folder cannot be read.
    """
    if is_glob(path):
        found = sorted(Path(name) for name in glob.glob(path, recursive=True))
        files = [file for file in found if file.is_file()]
        if not files:
            folders = "; it matches folders only: end it with /**" if found else ""
            raise UserError(f"{path}: no file matches{folders}")
        return files
    if not exists(path):
        raise UserError(f"no such file or folder: {path}")
    if Path(path).is_dir():
        files = _files_in(Path(path))
        if not files:
            raise UserError(f"{path}: the folder has no files")
        return files
    if not Path(path).is_file():
        raise UserError(f"{path}: neither a file nor a folder; sources are read more than once")
    return [Path(path)]


def _files_in(folder: Path) -> list[Path]:
    """The files in a folder and the folders in it, through links too, but no folder twice."""
    files, seen = [], set()

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}")

    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [Path(place, name) for name in names if not name.startswith(".")]
        files += [path for path in paths if path.is_file()]
    return sorted(files)


def python_parts(path: str) -> tuple[str, ...]:
    """The parts of the demo corpus that `python` or `python:PART` names; UserError for an unknown one."""
    from fledge.config import nearest

    _, colon, part = path.partition(":")
    if not colon:
        return PYTHON_PARTS
    known = (*PYTHON_PARTS, PYTHON_CHATS)
    if part not in known:
        raise UserError(
            f"{path}: no such part of the Python corpus; the nearest is {nearest(part, known)!r} "
            f"(a file of that name is ./{path})"
        )
    return (part,)


@cache
def python_corpus() -> Path:
    """The demo corpus in a temporary folder: a few seconds' work, so it stays until the process ends."""
    from fledge.data.stdlib import build_corpus

    folder = Path(tempfile.mkdtemp(prefix="fledge-python-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    build_corpus(folder)
    return folder
