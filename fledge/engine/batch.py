"""A JSONL file of prompts in, one of completions out. Killed at any moment, the same call goes on.

Rows are written to a journal as they end (`OUT.partial`: a line that says which job it is, then a line for
each row); when all are there, the file itself appears, in the input's order. What makes the completions is a
function: `local_texts.py` has the one for a model at hand, `remote_texts.py` the one for an endpoint.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

from fledge.errors import UserError
from fledge.files import open_binary, parse_json_object, sha256
from fledge.tokenizer.bpe import check_text
from fledge.types import Message

T = TypeVar("T")
# (rows done, rows in all, tokens made by this call)
Progress = Callable[[int, int, int], None]
# (row, what it gets besides what it has: "completions", or an "error"), as they end.
Results = Generator[tuple[int, dict[str, Any]], None, None]
# The results of (row, what it asks for).
Make = Callable[[Sequence[tuple[int, T]]], Results]


@dataclass(frozen=True)
class Job(Generic[T]):
    """A row: what it asks for, or what is wrong with it."""

    where: str
    row: dict[str, Any]
    asked: T | None
    error: str | None = None


def read_jobs(path: Path, read: Callable[[Mapping[str, Any], int], T], strict: bool) -> list[Job[T]]:
    """A job for every line that is not blank; `read` gets its row and number and says what it asks for, or
    raises UserError. Raises UserError, with `strict` also for the first bad row."""
    jobs: list[Job[T]] = []
    with open_binary(path) as file:
        for line_number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where, row = f"{path}:{line_number}", dict[str, Any]()
            try:
                row = parse_json_object(line, where)
                jobs.append(Job(where, row, read(row, len(jobs))))
            except UserError as error:
                message = str(error).removeprefix(f"{where}: ")
                if strict:
                    raise UserError(f"{where}: {message}") from None
                jobs.append(Job(where, row, None, message))
    if not jobs:
        raise UserError(f"{path}: no rows in it")
    return jobs


def asked_in(row: Mapping[str, Any], as_chat: bool) -> str | list[Message]:
    """The text that a row wants continued, or the conversation that it wants answered; with `as_chat` its
    text is a user's turn. Raises UserError."""
    messages, text = row.get("messages"), row.get("prompt")
    if (messages is None) == (text is None):
        raise UserError('a row has either "prompt" or "messages"')
    if text is not None:
        if not isinstance(text, str):
            raise UserError(f'"prompt" must be a text, not {text!r}')
        check_text(text, "prompt")
        return [Message(role="user", content=text)] if as_chat else text
    if not isinstance(messages, list) or not messages:
        raise UserError('"messages" must be a list with at least one message')
    return messages


def job_id(settings: str, source: Path, model: Path | None) -> str:
    """What decides the rows of a job: its settings, the input's content, and the files of a model at hand."""
    files = [] if model is None else sorted(path for path in model.iterdir() if path.is_file())
    stamps = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return hashlib.sha256("\n".join([settings, *stamps, sha256([source])]).encode()).hexdigest()


def run_batch(
    jobs: Sequence[Job[T]],
    make: Make[T],
    out: Path,
    job_id: str,
    strict: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda done, total, tokens: None,
) -> dict[str, int]:
    """Write `out`: each row as it was, with what `make` adds ("completions" or "error", in place of such
    that the row has from an earlier job). Rows that an earlier, killed call with the same `job_id` has
    finished are kept. Returns counts: rows, kept, errors, tokens.

    Raises UserError if `out` exists (without `overwrite`), if its journal is of another job or in use, with
    `strict` for the first row that fails, and as `make` does.
    """
    partial = out.with_name(out.name + ".partial")
    if out.exists() and not overwrite and not partial.exists():
        raise UserError(f"{out}: exists already; choose another --out or pass --overwrite")
    counts = {"rows": len(jobs), "kept": 0, "errors": 0, "tokens": 0}
    with journal(partial, job_id, overwrite) as (file, finished):
        for index in [i for i, row in finished.items() if strict and "error" in row]:
            del finished[index]
        counts["kept"] = len(finished)
        with closing(_results(jobs, make, finished)) as results:
            for index, added in results:
                if strict and "error" in added:
                    raise UserError(f"{jobs[index].where}: {added['error']}")
                given = {k: v for k, v in jobs[index].row.items() if k not in ("completions", "error")}
                finished[index] = {**given, **added}
                file.write(_line({"row": index, "result": finished[index]}))
                file.flush()
                counts["tokens"] += sum(made.get("tokens", 0) for made in added.get("completions", []))
                progress(len(finished), len(jobs), counts["tokens"])
        counts["errors"] = sum("error" in result for result in finished.values())
        temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
        with temporary.open("wb") as whole:
            whole.writelines(_line(finished[index]) for index in range(len(jobs)))
            whole.flush()
            os.fsync(whole.fileno())
        temporary.replace(out)
        partial.unlink()
    return counts


@contextmanager
def journal(path: Path, job_id: str, overwrite: bool) -> Iterator[tuple[BinaryIO, dict[int, Any]]]:
    """The journal, open for more rows, and the rows that it has; a half line at its end is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{path}: another command is writing it; wait for its end") from None
        file.seek(0)
        finished, whole = dict[int, Any](), 0
        header = file.readline()
        if header.endswith(b"\n"):
            if header == _line({"job": job_id}):
                whole = len(header)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    entry = parse_json_object(line, str(path))
                    finished[entry["row"]] = entry["result"]
                    whole += len(line)
            elif not overwrite:
                raise UserError(
                    f"{path}: is of a job with another input, model or settings; "
                    "delete it, choose another --out or pass --overwrite"
                )
        file.truncate(whole)
        if not whole:
            file.write(_line({"job": job_id}))
            file.flush()
        yield file, finished


def _results(jobs: Sequence[Job[T]], make: Make[T], finished: Mapping[int, Any]) -> Results:
    """What is wrong with the rows that are left, then the results of the others."""
    left: list[tuple[int, T]] = []
    for index, job in enumerate(jobs):
        if index in finished:
            continue
        if job.asked is None:
            yield index, {"error": job.error}
        else:
            left.append((index, job.asked))
    with closing(make(left)) as results:
        yield from results


def summary(counts: Mapping[str, int], seconds: float, out: Path, cost: str = "") -> str:
    """A line about what `run_batch` did; no speed where an endpoint does not count tokens."""
    parts = [f"{counts['rows']:,} rows"]
    if counts["kept"]:
        parts.append(f"{counts['kept']:,} of them from before")
    if counts["errors"]:
        parts.append(f"{counts['errors']:,} with an error")
    speed = f"{counts['tokens'] / max(seconds, 1e-9):,.0f} tokens/s{cost}; " if counts["tokens"] else ""
    return f"{', '.join(parts)}; {speed}{out}"


def _line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"
