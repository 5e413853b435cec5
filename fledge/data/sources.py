"""Documents from files: what `--data name=path:weight` names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fledge.errors import UserError
from fledge.files import read_jsonl

SEPARATOR = "<|endoftext|>"
PIECE_BYTES = 16_384


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
    return Source(name or Path(path).stem, Path(path), weight)


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
        raise UserError(f"--data: source {missing[0]!r} has no weight while others do; give all a weight or none")
    return sources


def read_documents(path: Path) -> Iterator[str]:
    """The documents of a text file, a `.jsonl` file with a "text" field, or a folder of such files (sorted).

    A text file is cut at lines `<|endoftext|>`, and what is longer than 16 KiB at blank or other lines, so
    that one big file can also be held out in part. Raises UserError with file and line for bad content.
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
            if text:
                yield text
    else:
        yield from _cut(_read_text(path))


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: not valid UTF-8 (byte {error.start} of the file); convert it, or leave it out"
        ) from None


def _cut(text: str) -> Iterator[str]:
    for document in text.split(SEPARATOR):
        document = document.strip("\n")
        while len(document) > PIECE_BYTES:
            end = document.rfind("\n\n", PIECE_BYTES // 2, PIECE_BYTES) + 2
            end = end if end > 1 else document.rfind("\n", PIECE_BYTES // 2, PIECE_BYTES) + 1 or PIECE_BYTES
            yield document[:end]
            document = document[end:]
        if document.strip():
            yield document


def held_out(document: str, share: float) -> bool:
    """Whether a document belongs to the validation part: decided by its text alone."""
    digest = hashlib.blake2b(document.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def split_documents(documents: list[str], share: float) -> tuple[list[str], list[str]]:
    """Training and validation documents. A source too small for the share gives up one document if it has two."""
    validation = [document for document in documents if held_out(document, share)]
    if not validation and share > 0 and len(set(documents)) > 1:
        chosen = min(set(documents), key=lambda d: hashlib.blake2b(d.encode("utf-8", "surrogatepass")).digest())
        validation = [document for document in documents if document == chosen]
    held = set(validation)
    return [document for document in documents if document not in held], validation
