"""Programs that are called as vLLM is."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
_START = """#!{python}
import sys
sys.path[:0] = {paths}
{code}
"""


def program(directory: Path, code: str, name: str = "vllm") -> Path:
    """A program of some lines of Python."""
    path = directory / name
    path.write_text(
        _START.format(python=sys.executable, paths=[str(ROOT), *filter(None, sys.path)], code=code)
    )
    path.chmod(0o755)
    return path


def stand_in(directory: Path) -> Path:
    """The one that serves."""
    return program(directory, "from tests.serve.stand_in_vllm import main\nmain(sys.argv[1:])")


def is_there(number: int) -> bool:
    """Whether a process is there, and not only its place in the list until its parent looks."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{number}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")
