"""Documents from files, data sets and the Python installation: what `--data name=path:weight` names."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fledge.data.locations import (
    PYTHON_CHATS,
    default_name,
    exists,
    find_files,
    is_glob,
    python_corpus,
    python_parts,
)
from fledge.data.readers import fields_of, file_documents, file_rows, kind_of, row_texts
from fledge.data.streams import BadLines as BadLines
from fledge.errors import UserError


@dataclass(frozen=True)
class Source:
    """A named source of documents."""

    name: str
    path: str
    """File, folder or glob; `python` or `python:topics`; `hf:owner/name`, `hf:owner/name:split`."""
    weight: float | None
    """None: in proportion to its tokens."""
    max_epochs: float | None = None
    """Most times it may be seen."""
    field: str = "text"
    """Which field of JSONL rows, Parquet columns and rows of data sets is the text; or a text with
    placeholders for several: "Question: {question}\\nAnswer: {answer}"."""
    min_characters: int = 0
    """Shorter documents are left out."""
    max_characters: int | None = None
    """Longer documents are left out."""
    contains: str | None = None
    """Only documents in which this regular expression is found."""
    lacks: str | None = None
    """Only documents in which this regular expression is not found."""
    rules: tuple[str, ...] | None = None
    """Quality rules of its own; None: those of the command."""


@dataclass(frozen=True)
class SourceFile:
    """A file of a source as it lies on the disk."""

    path: Path
    bytes: int
    modified_ns: int


def parse_source(text: str) -> Source:
    """Read `path`, `name=path`, `path:weight` or `name=path:weight`; a file of that whole name is a path.

    Raises UserError for a broken weight, a mixture file, and for what `check_source` finds.
    """
    name, path, weight = ("", text, None) if _is_path(text) else _split_source(text)
    if not path:
        raise UserError(f"--data {text}: no path; write name=path:weight, as in wiki=texts/wiki:0.5")
    if path != text and path.endswith(".toml") and not is_glob(path):
        raise UserError(f"--data {text}: a mixture file is given alone, without name and weight")
    source = Source(name or default_name(path), path, weight)
    try:
        check_source(source)
    except UserError as error:
        split = "" if path == text else " (read as NAME=PATH:WEIGHT)"
        raise UserError(f"--data {text}: {error}{split}") from None
    return source


def _is_path(text: str) -> bool:
    """Whether there is a file or folder of this whole name, whatever `=` and `:` in it could mean."""
    return bool(text) and source_kind(Source("", text, None)) == "files" and os.path.exists(text)


def _split_source(text: str) -> tuple[str, str, float | None]:
    """Name, path and weight; the name may be empty."""
    name, equals, rest = text.partition("=")
    if not equals:
        name, rest = "", text
    path, colon, last = rest.rpartition(":")
    weight = None
    if colon:
        try:
            weight = float(last)
        except ValueError:
            path = rest
        else:
            if not 0 < weight < float("inf"):
                raise UserError(f"--data {text}: the weight must be a positive number, got {last}")
    else:
        path = rest
    return name, path, weight


def parse_sources(texts: Sequence[str]) -> list[Source]:
    """All of `--data`; names must differ and either all sources have a weight or none has."""
    sources = [parse_source(text) for text in texts]
    if not sources:
        raise UserError("--data: name at least one file or folder")
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--data: two sources are called {name!r}; name them apart: NAME=PATH")
    missing = [source.name for source in sources if source.weight is None]
    if missing and len(missing) < len(sources):
        raise UserError(
            f"--data: source {missing[0]!r} has no weight while others do; give all a weight or none"
        )
    return sources


def check_source(source: Source) -> None:
    """Raise UserError for a source that cannot be read: nothing there, an unknown part of `python`, no match
    for a glob, or settings that are broken. No file is opened.
    """
    for key, pattern in (("contains", source.contains), ("lacks", source.lacks)):
        _compile(key, pattern)
    if not source.path:
        raise UserError("path is empty; name a file, a folder or a glob")
    if not source.field:
        raise UserError('field is empty; name the field that holds the text, as in field = "text"')
    if source.min_characters < 0:
        raise UserError(f"min_characters ({source.min_characters}) is below 0")
    if source.max_characters is not None and source.max_characters < source.min_characters:
        raise UserError(
            f"max_characters ({source.max_characters}) is below min_characters ({source.min_characters})"
        )
    kind = source_kind(source)
    if kind == "python":
        python_parts(source.path)
    elif kind == "hf":
        from fledge.data.hub import parse_path

        parse_path(source.path)
    elif is_glob(source.path):
        find_files(source.path)
    elif not exists(source.path):
        raise UserError(f"no such file or folder: {source.path}")


def source_kind(source: Source) -> Literal["python", "hf", "files"]:
    """Where its documents come from; a file called `python` is `./python`."""
    if re.match(r"python(:|$)", source.path):
        return "python"
    return "hf" if source.path.startswith("hf:") else "files"


# What files there are.


def list_files(source: Source) -> list[SourceFile]:
    """The files of a source, sorted; none for `python` and `hf:`.

    Hidden files in folders are left out. Raises UserError when there is no file, or a folder cannot be read.
    """
    if source_kind(source) != "files":
        return []
    files = []
    for path in find_files(source.path):
        try:
            status = path.stat()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        files.append(SourceFile(path, status.st_size, status.st_mtime_ns))
    return files


def source_version(source: Source) -> str:
    """What tells one state of a source without files from another, as far as that is known here."""
    kind = source_kind(source)
    if kind == "hf":
        from fledge.data.hub import local_version

        return local_version(source.path)
    return f"Python {platform.python_version()}" if kind == "python" else ""


# What is in them.


def read_documents(source: Source, bad: BadLines | None = None) -> Iterator[str]:
    """The documents of a source in the order of its files, those that its settings leave out apart.

    A text file is cut at lines `<|endoftext|>`, and what is longer than 16,384 characters at blank or other
    lines, so that one big file can also be held out in part. Line breaks at a document's borders and
    documents of white space only are left out. No file is in memory as a whole.
    Raises UserError with file and line for what cannot be read, or counts it in `bad` (see `BadLines`).
    """
    bad = BadLines(advice="") if bad is None else bad
    keeps = document_filter(source)
    return (text for text in _documents(source, bad) if keeps(text))


def _documents(source: Source, bad: BadLines) -> Iterator[str]:
    if source_kind(source) == "hf":
        from fledge.data.hub import hub_rows

        yield from row_texts(hub_rows(source.path, bad, fields_of(source.field)), source.field, bad)
        return
    if source_kind(source) == "python":
        source = replace(source, field="text")
    for path in _readable(source):
        yield from file_documents(path, source.field, bad)


def read_rows(source: Source, bad: BadLines | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a source with where each stands (`file:line`); of files, JSON Lines and Parquet have rows.

    No row is left out for its text. Raises UserError as `read_documents` does.
    """
    bad = BadLines(advice="") if bad is None else bad
    if source_kind(source) == "hf":
        from fledge.data.hub import hub_rows

        yield from hub_rows(source.path, bad)
        return
    for path in _readable(source):
        yield from file_rows(path, bad)


def read_records(source: Source, bad: BadLines | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a source (see `read_rows`)."""
    return (row for _, row in read_rows(source, bad))


def has_conversations(source: Source) -> bool:
    """Whether the first row that can be read has "messages" and not the field of the text."""
    skip = BadLines(skip=True)
    if source_kind(source) == "python":
        return source.path == f"python:{PYTHON_CHATS}"
    if source_kind(source) == "hf":
        row = next(read_records(source, skip), None)
    else:
        files = [path for path in find_files(source.path) if kind_of(path) in ("jsonl", "parquet")]
        row = next((row for path in files[:1] for _, row in file_rows(path, skip)), None)
    return row is not None and "messages" in row and not row.keys() >= set(fields_of(source.field))


def document_filter(source: Source) -> Callable[[str], bool]:
    """Which documents the settings of a source keep. Raises UserError for a broken regular expression."""
    least, most = source.min_characters, source.max_characters
    contains, lacks = _compile("contains", source.contains), _compile("lacks", source.lacks)

    def keeps(text: str) -> bool:
        return (
            len(text) >= least
            and (most is None or len(text) <= most)
            and (contains is None or contains.search(text) is not None)
            and (lacks is None or lacks.search(text) is None)
        )

    return keeps


def _compile(key: str, pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{key} = {pattern!r}: not a regular expression ({error})") from None


def _readable(source: Source) -> list[Path]:
    if source_kind(source) == "python":
        return [python_corpus() / f"{part}.jsonl" for part in python_parts(source.path)]
    return find_files(source.path)


# What is held out.


def document_hash(document: str) -> int:
    """The first 8 bytes of its text's hash, as a number (BLAKE2b, digest of 8 bytes, big endian)."""
    digest = hashlib.blake2b(document.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def held_out(document: str, share: float) -> bool:
    """Whether a document belongs to the validation part: decided by its text alone."""
    return document_hash(document) < share * 2**64


def held_out_hashes(hashes: npt.NDArray[np.uint64], share: float) -> npt.NDArray[np.bool_]:
    """Which documents with these hashes are held out; a source too small for the share gives up its
    document with the lowest hash, if it has two different ones.
    """
    limit = math.ceil(share * 2**64)
    held = np.full(len(hashes), True) if limit >= 2**64 else hashes < np.uint64(limit)
    if share > 0 and not held.any() and (hashes != hashes[:1]).any():
        held = hashes == hashes.min()
    return held


def split_documents(documents: Sequence[str], share: float) -> tuple[list[str], list[str]]:
    """Training and validation documents (see `held_out_hashes`)."""
    hashes = np.array([document_hash(document) for document in documents], dtype=np.uint64)
    held = held_out_hashes(hashes, share).tolist()
    return (
        [document for document, out in zip(documents, held, strict=True) if not out],
        [document for document, out in zip(documents, held, strict=True) if out],
    )
