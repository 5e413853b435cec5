"""`fledge serve` as its own process, and clients in environments that `make test-all` makes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / ".venv-clients"
SCRIPTS = Path(__file__).parent / "scripts"


@dataclass(frozen=True)
class Server:
    """One that runs: its address, its process, and where it writes its log."""

    url: str
    process: subprocess.Popen[str]
    log: Path

    @property
    def v1(self) -> str:
        """What clients call the base URL."""
        return f"{self.url}/v1"

    def resident_bytes(self) -> int:
        """Memory that the process holds."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGESIZE")


@contextmanager
def served(*flags: object, **environment: str) -> Iterator[Server]:
    """Starts, and at the end stops with SIGTERM, which it must take in good order."""
    with tempfile.NamedTemporaryFile("w", suffix=".log") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "fledge", "serve", "--port", "0", *map(str, flags)],
            stdout=subprocess.PIPE, stderr=log, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        )  # fmt: skip
        with process:
            assert process.stdout is not None
            try:
                line = process.stdout.readline()
                assert "page http" in line, Path(log.name).read_text()
                yield Server(line.split()[1], process, Path(log.name))
            finally:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    raise
            assert process.returncode == 0, Path(log.name).read_text()
            assert "Traceback" not in Path(log.name).read_text()


def program(client: str, name: str = "python") -> Path:
    """A program of a client's environment; skips the test if that has not been made."""
    path = ENVIRONMENTS / client / "bin" / name
    if not (ENVIRONMENTS / client / "installed").exists():
        pytest.skip(f"needs the environment {path.parents[1].relative_to(ROOT)} (make test-all)")
    return path


def run(
    command: list[object], home: Path, environment: Mapping[str, str] | None = None, status: int = 0,
    seconds: float = 300,
) -> str:  # fmt: skip
    """What a client writes to stdout. It knows nothing of this machine's files, keys and proxies."""
    made = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=seconds, cwd=home,
        env={
            "PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": tempfile.gettempdir(),
            "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
            "PYTHONIOENCODING": "utf-8", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", **(environment or {}),
        },
    )  # fmt: skip
    assert made.returncode == status, f"{made.stdout[-4000:]}\n{made.stderr[-8000:]}"
    return made.stdout


def results(client: str, script: str, home: Path, *arguments: object) -> dict[str, Any]:
    """What a client's script found: the JSON of its last line."""
    out = run([program(client), SCRIPTS / script, *arguments], home)
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found
