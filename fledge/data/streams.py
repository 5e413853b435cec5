"""Files as streams of bytes, unpacked on the way, and clear words for what is wrong with them."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fledge.errors import UserError
from fledge.files import open_binary

PACKED = (".gz", ".zst")
# How much of what is packed is read at a time, and about how much may come of it: four bytes can hold 128 kB.
PACKED_BYTES = (2**8, 2**13)
UNPACKED_BYTES = 2**20
# What a stream raises that is cut off; that is damaged, or cannot be read.
DAMAGE = (EOFError, OSError)
EXAMPLES = 5


@dataclass
class BadLines:
    """What could not be read: an error at once, or, with `skip`, counted."""

    skip: bool = False
    count: int = 0
    examples: list[str] = field(default_factory=list)
    """The first 5 messages."""
    advice: str = "; --skip-bad-lines goes on without it"
    """Ends an error; empty where there is no such flag."""

    def report(self, message: str) -> None:
        """Count what was left out. Raises UserError with `message` and the advice unless `skip` is set."""
        if not self.skip:
            raise UserError(message + self.advice)
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(message)


@contextmanager
def open_stream(path: Path) -> Iterator[io.BufferedIOBase]:
    """A file's bytes, unpacked on the way. Raises UserError if it cannot be opened, or became shorter.

    Reading raises one of DAMAGE where the file, or the packed data in it, breaks off or is broken.
    """
    with open_binary(path) as file:
        size = os.fstat(file.fileno()).st_size
        ending = path.suffix.lower()
        yield io.BufferedReader(_Unpacked(file, ending), 2**16) if ending in PACKED else file
        if os.fstat(file.fileno()).st_size < size:
            raise UserError(f"{path}: became shorter while it was read; try again when nothing writes to it")


class _Unpacked(io.RawIOBase):
    """Gzip members or Zstandard frames, one behind the other.

    What stands before a fault is delivered before the fault is raised, and a missing end is one, which
    zstandard's own reader takes for the end of the file.
    """

    def __init__(self, file: io.BufferedIOBase, ending: str) -> None:
        self._new_frame, self._error, self._name = _gzip() if ending == ".gz" else _zstandard()
        self._file = file
        self._frame: Any = None
        self._packed = b""
        self._step = PACKED_BYTES[0]
        self._ready = memoryview(b"")
        self._complete = False  # a whole frame was read, so that no more may follow

    def readable(self) -> bool:
        """Yes: io asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as one step of unpacking goes; 0 at the end."""
        while not self._ready:
            packed, self._packed = self._packed or self._file.read(self._step), b""
            between = self._frame is None and self._complete
            if not packed and between:
                return 0
            if not packed:
                raise EOFError
            if between:
                packed = packed.lstrip(b"\0")  # padding of tapes, which gzip allows
            if packed:
                self._unpack(packed)
        target = memoryview(buffer).cast("B")
        count = min(len(target), len(self._ready))
        target[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _unpack(self, packed: bytes) -> None:
        if self._frame is None:
            self._frame = self._new_frame()
        try:
            self._ready = memoryview(self._frame.decompress(packed))
        except self._error as error:
            raise OSError(f"broken {self._name} data: {error}") from None
        fitting = len(packed) * UNPACKED_BYTES // max(1, len(self._ready))
        self._step = min(max(fitting, PACKED_BYTES[0]), PACKED_BYTES[1])
        if self._frame.eof:
            self._packed, self._frame, self._complete = self._frame.unused_data, None, True


def _gzip() -> tuple[Callable[[], Any], type[Exception], str]:
    return lambda: zlib.decompressobj(wbits=31), zlib.error, "gzip"


def _zstandard() -> tuple[Callable[[], Any], type[Exception], str]:
    import zstandard

    # Files made with `zstd --long` need more memory than the default allows.
    decoder = zstandard.ZstdDecompressor(max_window_size=2**31)
    return decoder.decompressobj, zstandard.ZstdError, "zstandard"


def damage(path: Path, error: BaseException, after: str) -> str:
    """Say in one line what is wrong with a file that broke off `after` so many lines or records."""
    if isinstance(error, EOFError):
        return f"{path}: ends too soon, after {after}; was it copied or downloaded in part? get it again"
    reason = " ".join(str(error).split())
    return f"{path}: cannot be read on after {after} ({reason}); get it again"
