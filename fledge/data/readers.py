"""Reading files of every kind as documents or rows, and saying clearly what cannot be read."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from fledge.data.plain_text import BOM, text_documents
from fledge.data.streams import DAMAGE, PACKED, BadLines, damage, open_stream
from fledge.errors import UserError
from fledge.files import parse_json_object

PARQUET_ROWS = 64
BUFFER_BYTES = 2**20
PLACEHOLDER = re.compile(r"\{(\w+)\}")

Kind = Literal["text", "jsonl", "parquet", "warc", "archive"]
Row = dict[str, Any]
_KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".warc": "warc",
    ".wet": "warc",
    **dict.fromkeys((".tar", ".tgz", ".zip", ".7z", ".rar", ".bz2", ".xz"), "archive"),
}


def need(module: str, extra: str) -> Any:
    """An optional package; UserError that says how to install it where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package, reason = module.partition(".")[0], " ".join(str(error).split())
        raise UserError(
            f"this needs the package {package} ({reason}): pip install 'fledge[{extra}]'"
        ) from None


def bare_name(path: Path) -> str:
    """A file's name in lower letters without `.gz` and `.zst`."""
    name = path.name.lower()
    for ending in PACKED:
        name = name.removesuffix(ending)
    return name


def kind_of(path: Path) -> Kind:
    """How a file is read, told by the end of its name; what is not known is text."""
    return _KINDS.get(Path(bare_name(path)).suffix, "text")


def file_documents(path: Path, field: str, bad: BadLines) -> Iterator[str]:
    """The documents of one file of any kind; `field` names the text in JSONL rows and Parquet columns.

    Documents of white space only are left out. Raises UserError (see `BadLines`) with file and line.
    """
    kind = kind_of(path)
    if kind == "text":
        yield from text_documents(path, bad)
    elif kind == "warc":
        from fledge.data.warc import warc_documents

        yield from warc_documents(path, bad)
    elif kind == "archive":
        bad.report(f"{path}: an archive; unpack it (or pack it as .gz or .zst) first")
    else:
        yield from row_texts(file_rows(path, bad, fields_of(field)), field, bad)


def fields_of(field: str) -> list[str]:
    """The fields that make a text: `question` and `answer` of "Q: {question}\\nA: {answer}", else the one."""
    return PLACEHOLDER.findall(field) or [field]


def file_rows(path: Path, bad: BadLines, only: Sequence[str] = ()) -> Iterator[tuple[str, Row]]:
    """The rows of a JSONL or Parquet file, each with where it stands (`file:line`).

    Of a Parquet file only the columns `only` are read if they are given.
    """
    kind = kind_of(path)
    if kind == "jsonl":
        yield from _jsonl_rows(path, bad)
    elif kind == "parquet":
        yield from _parquet_rows(path, bad, only)
    else:
        bad.report(f"{path}: has no rows; only JSON Lines (.jsonl) and Parquet files have")


def row_texts(rows: Iterable[tuple[str, Row]], field: str, bad: BadLines) -> Iterator[str]:
    """The strings in a field of rows, or what a field with placeholders makes of several; but for those of
    white space only. Placeholders are only replaced, by texts and numbers.
    """
    names = fields_of(field)
    kinds: tuple[type, ...] = (str, int, float) if PLACEHOLDER.search(field) else (str,)
    for where, row in rows:
        wrong = next((name for name in names if not isinstance(row.get(name), kinds)), None)
        if wrong is None:
            text = row[field] if kinds == (str,) else _fill(field, row)
            if text.strip():
                yield text
        elif wrong in row:
            found = "null" if row[wrong] is None else type(row[wrong]).__name__
            bad.report(f'{where}: the line holds no string in the field "{wrong}" but {found}')
        else:
            bad.report(f'{where}: the line has no field "{wrong}"; it has {name_some(row)}')


def _fill(field: str, row: Row) -> str:
    return PLACEHOLDER.sub(lambda match: str(row[match[1]]), field)


def name_some(names: Iterable[str]) -> str:
    """Names in quotes, at most ten."""
    quoted = [f'"{name}"' for name in names]
    return ", ".join(quoted[:10]) + (f" and {len(quoted) - 10} more" if len(quoted) > 10 else "") or "none"


# JSON Lines and Parquet.


def _jsonl_rows(path: Path, bad: BadLines) -> Iterator[tuple[str, Row]]:
    number = 0
    broken: BaseException | None = None
    with open_stream(path) as stream:
        try:
            for number, raw in enumerate(stream, start=1):
                if number == 1:
                    raw = raw.removeprefix(BOM)
                if not raw.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    row = parse_json_object(raw, where)
                except UserError as error:
                    bad.report(str(error))
                else:
                    yield where, row
        except DAMAGE as error:
            broken = error
        if broken is not None:
            bad.report(damage(path, broken, f"line {number}"))


def _parquet_rows(path: Path, bad: BadLines, only: Sequence[str]) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    if path.suffix.lower() in PACKED:
        bad.report(f"{path}: a Parquet file is read in parts, which packing prevents; unpack it first")
        return
    number = 0
    broken: BaseException | None = None
    with open_stream(path) as stream:
        try:
            # Without buffers of its own it reads a whole row group at once, often all there is.
            file = pyarrow.parquet.ParquetFile(stream, buffer_size=BUFFER_BYTES, pre_buffer=False)
            names = file.schema_arrow.names
            if missing := [name for name in only if name not in names]:
                bad.report(f'{path}: has no column "{missing[0]}"; it has {name_some(names)}')
                return
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=list(only) or None):
                for place in range(batch.num_rows):
                    number += 1
                    where = f"{path}: row {number}"
                    try:
                        row = {name: batch.column(name)[place].as_py() for name in batch.schema.names}
                    except UnicodeDecodeError:
                        bad.report(f"{where}: not valid UTF-8")
                    else:
                        yield where, row
        except (pyarrow.ArrowException, OSError) as error:
            broken = error
        if broken is not None:
            bad.report(damage(path, broken, f"row {number}"))
