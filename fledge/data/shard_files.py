"""The files of a tokenised source: pairs of tokens and document rows, written whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from fledge.errors import UserError

# A row for each document. Little-endian whatever the machine, so that directories can be moved.
DOCUMENT = np.dtype([("tokens", "<i8"), ("text_bytes", "<i8"), ("hash", "<u8")])

TOKEN_TYPES = ("<u2", "<u4")

Rows = npt.NDArray[np.void]
Tokens = npt.NDArray[np.unsignedinteger[Any]]


def token_type(vocab_size: int) -> str:
    """The smallest type that holds every id."""
    return TOKEN_TYPES[vocab_size > 2**16]


def file_names(directory: Path, shard: int) -> tuple[Path, Path]:
    """The files of a shard: its tokens, and its documents, written second."""
    return directory / f"shard_{shard:05d}.tokens", directory / f"shard_{shard:05d}.npy"


def read_rows(directory: Path, shard: int, dtype: str) -> Rows | None:
    """The documents of a shard, or None if it is not complete."""
    tokens, documents = file_names(directory, shard)
    try:
        rows: Rows = np.load(documents, allow_pickle=False)
        size = tokens.stat().st_size
    except (OSError, ValueError, EOFError):
        return None
    if rows.dtype != DOCUMENT or rows.ndim != 1 or not len(rows) or rows["tokens"].min() < 1:
        return None
    return rows if size == int(rows["tokens"].sum()) * np.dtype(dtype).itemsize else None


def map_tokens(directory: Path, shard: int, dtype: str) -> Tokens:
    """The tokens of a shard, memory-mapped and read-only."""
    return np.memmap(file_names(directory, shard)[0], dtype=dtype, mode="r")


class Fingerprint:
    """SHA-256 over documents and tokens, however they are cut into pieces."""

    def __init__(self) -> None:
        self._rows, self._tokens = hashlib.sha256(), hashlib.sha256()

    def add(self, rows: Rows, tokens: Tokens) -> None:
        """Go on with these documents, all their tokens included."""
        self._rows.update(rows.tobytes())
        self._tokens.update(np.ascontiguousarray(tokens).data)

    def hexdigest(self) -> str:
        """The fingerprint of all that was added."""
        return hashlib.sha256(self._rows.digest() + self._tokens.digest()).hexdigest()


class ShardWriter:
    """Appends documents to the complete shards of a directory, and closes a shard once it is full.

    What follows the last complete shard is deleted at the start. Leaving the block with an error loses the
    open shard alone. Raises UserError when the disk is full or the directory cannot be written.
    """

    def __init__(self, directory: Path, dtype: str, shard_tokens: int) -> None:
        self.directory, self.dtype, self._shard_tokens = directory, dtype, shard_tokens
        self.shards: list[tuple[int, int]] = []
        """Documents and tokens of the complete shards."""
        self.fingerprint = Fingerprint()
        self.documents = self.tokens = self.text_bytes = 0
        self._file: IO[bytes] | None = None
        self._rows: list[Rows] = []
        self._held = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            with suppress(OSError):  # what the full disk did not take is thrown away
                self._file.close()
            Path(self._file.name).unlink(missing_ok=True)
            self._file = None

    def resume(self) -> npt.NDArray[np.uint64]:
        """Count the complete shards in; gives the hashes of their documents."""
        hashes = [np.empty(0, dtype=np.uint64)]
        while (rows := read_rows(self.directory, len(self.shards), self.dtype)) is not None:
            self._count(rows, map_tokens(self.directory, len(self.shards), self.dtype))
            self.shards.append((len(rows), int(rows["tokens"].sum())))
            hashes.append(rows["hash"])
        self._delete_from(len(self.shards))
        return np.concatenate(hashes)

    def clear(self) -> None:
        """Delete all shards and begin anew."""
        self._delete_from(0)
        self.shards, self.fingerprint = [], Fingerprint()
        self.documents = self.tokens = self.text_bytes = 0

    def add(self, rows: Rows, tokens: Tokens) -> None:
        """Append documents; a shard is closed after the document that fills it."""
        self._count(rows, tokens)
        while len(rows):
            ends = np.cumsum(rows["tokens"])
            room = self._shard_tokens - self._held
            count = min(len(rows), int(np.searchsorted(ends, room)) + 1)
            end = int(ends[count - 1])
            with self._writing():
                if self._file is None:
                    self._file = _temporary(file_names(self.directory, len(self.shards))[0]).open("wb")
                self._file.write(np.ascontiguousarray(tokens[:end]).data)
            self._rows.append(rows[:count])
            self._held += end
            rows, tokens = rows[count:], tokens[end:]
            if self._held >= self._shard_tokens:
                self.close_shard()

    def close_shard(self) -> None:
        """Complete the shard that is open, if one is."""
        if self._file is None:
            return
        tokens, documents = file_names(self.directory, len(self.shards))
        rows = np.concatenate(self._rows)
        with self._writing():
            _finish(self._file, tokens)
            self._file = _temporary(documents).open("wb")
            np.save(self._file, rows, allow_pickle=False)
            _finish(self._file, documents)
        self._file = None
        self.shards.append((len(rows), self._held))
        self._rows, self._held = [], 0

    def _count(self, rows: Rows, tokens: Tokens) -> None:
        self.fingerprint.add(rows, tokens)
        self.documents += len(rows)
        self.tokens += len(tokens)
        self.text_bytes += int(rows["text_bytes"].sum())

    def _delete_from(self, shard: int) -> None:
        with self._writing():
            for path in self.directory.glob("shard_*"):
                number = path.stem.removeprefix("shard_")
                if number.isdigit() and int(number) >= shard:
                    path.unlink()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.directory}: cannot be written: {error.strerror}; mend that and run the same command "
                "again: it goes on after the last complete shard"
            ) from None


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def _finish(file: IO[Any], path: Path) -> None:
    """Close a temporary file under its final name, once its contents are on disk."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    _temporary(path).replace(path)


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the directory, which is made if need be; wait while another process does."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        handle = (target / "lock").open("a+")
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror}; choose another place") from None
    with handle:
        try:
            _wait_for(handle, target)
        except OSError as error:
            raise UserError(f"{target}: cannot be locked: {error.strerror}; choose another place") from None
        yield


def _wait_for(handle: IO[str], target: Path) -> None:
    """Take a lock, and leave in it who has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        print(f"{target}: {handle.read() or 'another process'} is at it; waiting", file=sys.stderr)
        fcntl.flock(handle, fcntl.LOCK_EX)
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {socket.gethostname()}")
    handle.flush()
