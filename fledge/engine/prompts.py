"""Prompts from a command line, stdin and a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from fledge.errors import UserError


def read_prompts(prompts: Sequence[str], file: Path | None) -> Iterator[str]:
    """The prompts in order, `-` being stdin, then the file. Raises UserError if there is none, or one is not
    UTF-8."""
    if not prompts and file is None:
        raise UserError("nothing to continue: give --prompt TEXT, --prompt - (stdin) or --prompt-file FILE")
    if prompts.count("-") > 1:
        raise UserError("--prompt - is given twice; stdin can be read once")
    for prompt in prompts:
        yield _text(sys.stdin.buffer.read(), "stdin") if prompt == "-" else prompt
    if file is not None:
        try:
            raw = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: cannot read the prompt: {error.strerror}") from None
        yield _text(raw, str(file))


def _text(raw: bytes, where: str) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where}:{line}: not valid UTF-8 (byte {error.start}); save it as UTF-8") from None
    return text.replace("\r\n", "\n").removesuffix("\n")
