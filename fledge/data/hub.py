"""Rows of data sets from the Hugging Face Hub or a folder, one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fledge.data.readers import Row, name_some, need
from fledge.data.streams import BadLines
from fledge.errors import UserError


def parse_path(path: str) -> tuple[str, str | None, str | None]:
    """Name (or folder), configuration and split of `hf:owner/name`, `hf:owner/name/configuration:split`."""
    rest = path.removeprefix("hf:")
    name, colon, split = rest.rpartition(":")
    if not colon:
        name, split = rest, ""
    if not name or (colon and not split):
        raise UserError(f"{path}: write hf:owner/name, hf:owner/name:split or hf:path/to/folder")
    if Path(name).is_dir():
        return name, None, split or None
    parts = name.split("/")
    if not all(parts) or len(parts) > 3 or parts[0] in (".", ".."):
        raise UserError(f"{path}: no such folder, and no name of a data set on the Hub, as in hf:owner/name")
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split or None


def local_version(path: str) -> str:
    """Changes whenever a file in a local folder does; empty for the Hub, which is not asked."""
    folder = Path(parse_path(path)[0])
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")) if folder.is_dir() else []:
        if not file.is_file():  # a folder, or a link to nothing
            continue
        status = file.stat()
        digest.update(f"{file.relative_to(folder)}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest() if folder.is_dir() else ""


def hub_rows(path: str, bad: BadLines, only: Sequence[str] = ()) -> Iterator[tuple[str, Row]]:
    """The rows of a data set with where each stands; with `only`, just those columns.

    Raises UserError for a data set that is not there, needs code of its own, or lacks the split or column.
    A row after which the data set cannot be read on is counted in `bad`, and ends it.
    """
    rows = _open(path)
    names = rows.column_names
    if only and names is not None:
        if missing := [name for name in only if name not in names]:
            raise UserError(f'{path}: has no column "{missing[0]}"; it has {name_some(names)}')
        rows = rows.select_columns(list(only))
    number = 0
    broken: Exception | None = None
    try:
        for number, row in enumerate(rows, start=1):
            yield f"{path}: row {number}", row
    except Exception as error:  # network, files and formats of all kinds
        broken = error
    if broken is not None:
        bad.report(f"{path}: cannot be read on after row {number}: {_reason(broken)}")


def _open(path: str) -> Any:
    name, configuration, split = parse_path(path)
    datasets = need("datasets", "hub")
    if int(datasets.__version__.partition(".")[0]) < 4:
        # Older ones may run code that a data set brings along.
        raise UserError(f"{path}: needs datasets 4 or newer: pip install --upgrade 'fledge[hub]'")
    datasets.disable_progress_bars()
    saved = any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json"))
    try:
        if saved:
            splits = datasets.load_from_disk(name)
        else:
            splits = datasets.load_dataset(name, configuration, streaming=True)
    except Exception as error:  # one of a dozen kinds, by what is missing
        raise UserError(f"{path}: cannot be opened: {_reason(error)}") from None
    if not isinstance(splits, dict):  # a single one, saved without a name
        return splits
    chosen = split or ("train" if "train" in splits or len(splits) > 1 else next(iter(splits)))
    if chosen not in splits:
        known = name_some(splits)
        raise UserError(f'{path}: has no split "{chosen}" but {known}; name one: hf:{name}:SPLIT')
    return splits[chosen]


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."
