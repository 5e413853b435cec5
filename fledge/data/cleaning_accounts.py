"""The accounts of a cleaning: what came in, what went out, and what each step took."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

EXCERPT_CHARACTERS = 600
KEPT_CHARACTERS = 50_000
"""Of a text that may be shown: enough to find where it differs from its original."""


@dataclass
class Removed:
    """What a step took out of a source."""

    documents: int = 0
    bytes: int = 0
    lines: int = 0
    seen: int = 0
    """How often something could have become an example."""
    originals: dict[str, int] = field(default_factory=dict)
    """Of duplicates: in which source the original is, how often."""
    examples: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Account:
    """The account of a source: what came in is what went out, was removed, or gave way to placeholders."""

    name: str
    documents_in: int = 0
    bytes_in: int = 0
    documents_out: int = 0
    bytes_out: int = 0
    skipped_lines: int = 0
    masked: dict[str, int] = field(default_factory=dict)
    masked_documents: int = 0
    masked_bytes: int = 0
    removed: dict[str, Removed] = field(default_factory=dict)


def source_of(first_kept: Mapping[str, int], number: int) -> str:
    """The source of a kept document, from the numbers of the first of each source."""
    return [name for name, first in first_kept.items() if first <= number][-1]


def summarise(
    settings: dict[str, Any], accounts: Mapping[str, Account], first_kept: Mapping[str, int], directory: Path
) -> dict[str, Any]:
    """The summary of all sources, with excerpts of the examples beside those of their originals."""
    examples = [e for a in accounts.values() for r in a.removed.values() for e in r.examples]
    originals = _originals(first_kept, {e["of"] for e in examples if e["of"] is not None}, directory)
    for example in examples:
        number = example.pop("of")
        original = originals.get(number, "")
        start = _first_difference(example["text"], original) if original else 0
        example["text"] = _excerpt(example["text"], start)
        if original:
            example["original"] = _excerpt(original, start)
            example["original_source"] = source_of(first_kept, number)
    totals = ("documents_in", "bytes_in", "documents_out", "bytes_out")
    return {
        "settings": settings,
        **{total: sum(getattr(account, total) for account in accounts.values()) for total in totals},
        "emptied": [name for name, account in accounts.items() if not account.documents_out],
        "sources": {
            name: {**vars(account), "removed": {step: _shown(r) for step, r in account.removed.items()}}
            for name, account in accounts.items()
        },
    }


def _shown(removed: Removed) -> dict[str, Any]:
    return {key: value for key, value in vars(removed).items() if key != "seen"}


def _originals(first_kept: Mapping[str, int], numbers: set[int], directory: Path) -> dict[int, str]:
    """The texts of some of the kept documents, read again from what was written."""
    found: dict[int, str] = {}
    for name, first in first_kept.items():
        wanted = {number for number in numbers if source_of(first_kept, number) == name}
        if not wanted:
            continue
        for number, text in enumerate(_read(directory / file_name(name)), start=first):
            if number in wanted:
                found[number] = text
            if number == max(wanted):
                break
    return found


def _first_difference(text: str, other: str) -> int:
    """Where to begin, so that what differs between two texts is among what is shown."""
    pairs = enumerate(zip(text, other, strict=False))
    same = next((place for place, (ours, theirs) in pairs if ours != theirs), min(len(text), len(other)))
    return max(0, same - EXCERPT_CHARACTERS // 3) if EXCERPT_CHARACTERS // 2 < same < len(text) else 0


def _excerpt(text: str, start: int) -> str:
    end = start + EXCERPT_CHARACTERS
    return "…" * (start > 0) + text[start:end] + "…" * (len(text) > end)


def file_name(source: str) -> str:
    """The file of a cleaned source."""
    return f"{source}.jsonl.zst"


def byte_size(text: str) -> int:
    """Bytes of UTF-8."""
    return len(text.encode())


@contextmanager
def text_writer(path: Path) -> Iterator[Callable[[str], None]]:
    """Writes documents into a compressed JSONL file."""
    import zstandard

    with path.open("wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as file:
        yield lambda text: _write_row(file, text)


def _write_row(file: IO[bytes], text: str) -> None:
    file.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")


def _read(path: Path) -> Iterator[str]:
    import zstandard

    with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
        for line in io.TextIOWrapper(stream, encoding="utf-8", newline="\n"):
            yield json.loads(line)["text"]
