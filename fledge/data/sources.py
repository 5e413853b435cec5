"""Documents from files: what `--data name=path:weight` names."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fledge.errors import UserError
from fledge.files import read_jsonl, read_text

SEPARATOR_LINE = re.compile(r"^<\|endoftext\|>[ \t\r]*$", re.MULTILINE)
PIECE_CHARACTERS = 16_384


@dataclass(frozen=True)
class Source:
    """A named source of documents; `weight` None means in proportion to its tokens."""

    name: str
    path: Path
    weight: float | None


def parse_source(text: str) -> Source:
    """Read `path`, `name=path`, `path:weight` or `name=path:weight`."""
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
    if not path:
        raise UserError(f"--data {text}: no path; write name=path:weight, as in wiki=texts/wiki:0.5")
    if not Path(path).exists():
        raise UserError(f"--data {text}: no such file or folder: {path}")
    return Source(name or Path(path).resolve().stem, Path(path), weight)


def parse_sources(texts: tuple[str, ...]) -> list[Source]:
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


def read_documents(path: Path) -> Iterator[str]:
    """The documents of a text file, a `.jsonl` file with a "text" field, or a folder of such files (sorted).

    A text file is cut at lines `<|endoftext|>`, and what is longer than 16,384 characters at blank or other
    lines, so that one big file can also be held out in part. Line breaks at a document's borders and
    documents of white space only are left out. Raises UserError with file and line for bad content.
    """
    if path.is_dir():
        files = [f for f in sorted(path.rglob("*")) if f.is_file() and not _is_hidden(f.relative_to(path))]
        if not files:
            raise UserError(f"{path}: the folder has no files")
        for file in files:
            yield from read_documents(file)
    elif path.suffix == ".jsonl":
        for number, row in read_jsonl(path):
            text = row.get("text")
            if not isinstance(text, str):
                problem = "has no field" if text is None else "holds no string in the field"
                raise UserError(f'{path}:{number}: the line {problem} "text"')
            if text.strip():
                yield text
    else:
        yield from _cut(read_text(path))


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _cut(text: str) -> Iterator[str]:
    for document in SEPARATOR_LINE.split(text):
        document = document.strip("\r\n")
        start = 0
        while len(document) - start > PIECE_CHARACTERS:
            half, limit = start + PIECE_CHARACTERS // 2, start + PIECE_CHARACTERS
            blank, line = document.rfind("\n\n", half, limit), document.rfind("\n", half, limit)
            end = blank + 2 if blank >= 0 else line + 1 if line >= 0 else limit
            yield document[start:end]
            start = end
        if document[start:].strip():
            yield document[start:]


def held_out(document: str, share: float) -> bool:
    """Whether a document belongs to the validation part: decided by its text alone."""
    digest = hashlib.blake2b(document.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def split_documents(documents: list[str], share: float) -> tuple[list[str], list[str]]:
    """Training and validation documents; a source too small for the share gives up one, if it has two."""
    validation = [document for document in documents if held_out(document, share)]
    if not validation and share > 0 and len(set(documents)) > 1:
        chosen = min(
            set(documents), key=lambda d: hashlib.blake2b(d.encode("utf-8", "surrogatepass")).digest()
        )
        validation = [document for document in documents if document == chosen]
    held = set(validation)
    return [document for document in documents if document not in held], validation
