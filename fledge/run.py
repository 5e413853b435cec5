"""The run directory: what a stage writes while it works, and where it goes on after an interruption."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fledge import __version__
from fledge.errors import UserError
from fledge.files import new_directory, read_json, write_json, write_text


@dataclass(frozen=True)
class Checkpoint:
    """A finished `checkpoints/step_000500/` directory."""

    step: int
    path: Path

    @property
    def state(self) -> dict[str, Any]:
        """The JSON state that was saved with the tensors."""
        value: dict[str, Any] = read_json(self.path / "trainer.json")
        return value


class Run:
    """`config.toml`, `environment.json`, `metrics.jsonl`, `samples.jsonl`, `checkpoints/`, `model/`, `summary.json`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @classmethod
    def open(cls, directory: Path, config_toml: str, overwrite: bool = False) -> Run:
        """Create a run, or go on with the one that the same configuration began.

        Raises UserError if the directory holds something else; `overwrite` deletes an earlier run first.
        """
        saved = directory / "config.toml"
        if directory.exists() and any(directory.iterdir()):
            if not saved.exists():
                raise UserError(f"{directory}: exists and is not a run directory; choose another --out")
            if overwrite:
                shutil.rmtree(directory)
            elif (differing := _differing_keys(saved.read_text(encoding="utf-8"), config_toml)) is not None:
                raise UserError(
                    f"{directory}: holds a run with another configuration ({differing}); run the same command to "
                    "resume it, choose another --out, or pass --overwrite to delete it"
                )
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in [*directory.glob(".*.tmp-*"), *(directory / "checkpoints").glob(".*.tmp-*")]:
            shutil.rmtree(leftover, ignore_errors=True)
        run = cls(directory)
        if not saved.exists():
            write_json(directory / "environment.json", environment())
            write_text(saved, config_toml)
        return run

    @property
    def model(self) -> Path:
        """Where the final model directory goes; it exists only when the stage has finished."""
        return self.directory / "model"

    @property
    def finished(self) -> bool:
        """Whether the stage wrote all it promised."""
        return self.model.is_dir() and (self.directory / "summary.json").exists()

    def checkpoints(self) -> list[Checkpoint]:
        """Complete checkpoints, oldest first."""
        folder = self.directory / "checkpoints"
        found = [Checkpoint(int(path.name[5:]), path) for path in folder.glob("step_*") if path.name[5:].isdigit()]
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def save_checkpoint(self, step: int, write: Callable[[Path], None], state: dict[str, Any]) -> Checkpoint:
        """Write `checkpoints/step_N` whole or not at all."""
        path = self.directory / "checkpoints" / f"step_{step:06d}"
        with new_directory(path, overwrite=True) as temporary:
            write(temporary)
            write_json(temporary / "trainer.json", state)
        return Checkpoint(step, path)

    def prune(self, keep_last: int, best_step: int | None) -> None:
        """Delete all checkpoints but the last few and the best."""
        for checkpoint in self.checkpoints()[:-keep_last]:
            if checkpoint.step != best_step:
                shutil.rmtree(checkpoint.path)

    def log(self, name: str, row: dict[str, Any]) -> None:
        """Append a row to `<name>.jsonl`."""
        with (self.directory / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def rewind(self, step: int) -> None:
        """Drop logged rows later than `step`: the resumed run will write them again."""
        for name in ("metrics", "samples"):
            path = self.directory / f"{name}.jsonl"
            if path.exists():
                rows = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
                write_text(path, "".join(line + "\n" for line in rows))

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of `<name>.jsonl`; none if there is no such file."""
        path = self.directory / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line cut short by a crash
        return float("inf")


def _differing_keys(saved: str, new: str) -> str | None:
    """What differs between two configurations, in words; None if nothing does."""
    old_lines, new_lines = set(saved.splitlines()), set(new.splitlines())
    if old_lines == new_lines:
        return None
    return "; ".join([f"it has {line}" for line in sorted(old_lines - new_lines)][:3]) or "it lacks " + "; ".join(
        sorted(new_lines - old_lines)[:3]
    )


def environment() -> dict[str, Any]:
    """What ran where: enough to understand a difference later."""
    return {
        "fledge": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "command": sys.argv,
    }
