"""Commands of the training stages: changed, run as processes, and what they leave on the disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fledge.run import LOCK


def changed(flags: list[str], *more: str) -> list[str]:
    """The same command with some flags added or given another value."""
    groups: dict[str, list[str]] = {}
    for word in (*flags[1:], *more):
        if word.startswith("--"):
            groups[word] = values = []
        else:
            values.append(word)
    return [flags[0], *(word for name, values in groups.items() for word in (name, *values))]


def without(flags: list[str], name: str) -> list[str]:
    """The same command without a flag and its one value."""
    at = flags.index(name)
    return [*flags[:at], *flags[at + 2 :]]


def start(flags: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fledge", *flags]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def wait_for_step(process: subprocess.Popen[str], directory: Path, step: int) -> None:
    """Until a step of that number is logged, or the process has ended."""
    path = directory / "metrics.jsonl"
    while process.poll() is None:
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.001)


def kill_and_interrupt(flags: list[str], directory: Path, *stops: tuple[int, int]) -> None:
    """Run the command once for each (signal, step), sent it at that step: it ends as it should."""
    for number, step in stops:
        process = start(flags)
        wait_for_step(process, directory, step)
        process.send_signal(number)
        error = process.communicate()[1]
        assert process.returncode == (-9 if number == signal.SIGKILL else 130), error
        assert "Traceback" not in error
    assert not (directory / "model").exists()


def metrics(directory: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what a clock says."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def summary(run: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return value


def weights(directory: Path) -> bytes:
    return (directory / "model" / "model.safetensors").read_bytes()


def snapshot(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its time and content; the lock says who looked last, so it may change."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes())
        for path in directory.rglob("*")
        if path.is_file() and path.name != LOCK
    }
