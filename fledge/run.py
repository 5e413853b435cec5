"""The run directory: what a stage writes while it works, and where it goes on after an interruption."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import sys
import tomllib
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fledge import __version__
from fledge.config import Dataclass, to_toml
from fledge.errors import UserError
from fledge.files import (
    is_leftover,
    new_directory,
    read_json,
    read_jsonl,
    remove,
    remove_leftovers,
    write_json,
    write_text,
)

LOCK = ".lock"


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
    """`config.toml`, `environment.json`, `metrics.jsonl`, `samples.jsonl`, `checkpoints/`, `model/`,
    `summary.json`."""

    def __init__(
        self, directory: Path, config_toml: str = "", overwrite: bool = False, writes: bool = True
    ) -> None:
        self.directory, self.config_toml, self.overwrite = directory, config_toml, overwrite
        self.writes = writes

    @classmethod
    def open(cls, directory: Path, config_toml: str, overwrite: bool = False, writes: bool = True) -> Run:
        """A new run, or the one that the same configuration began; nothing is written before `begin`, and
        without `writes` nothing ever: another process of this training does.

        Raises UserError if the directory holds something else; with `overwrite` that may be another run.
        """
        if writes:
            _check(directory, config_toml, overwrite)
        return cls(directory, config_toml, overwrite and (directory / "config.toml").exists(), writes)

    def begin(self, inputs: dict[str, str]) -> None:
        """Make the directory, once all that the user gave is known to be good; `overwrite` empties it.

        `inputs` are fingerprints of what is learned from. Raises UserError if a run that is to go on began
        with others: the paths of a configuration do not tell; and if another process writes the run: it is
        this one's until it ends, or forgets the run.
        """
        if not self.writes:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        handle = _lock(self.directory)
        if handle is not None:
            weakref.finalize(self, os.close, handle)
        _check(self.directory, self.config_toml, self.overwrite)  # who held the lock may have written since
        began = self.directory / "environment.json"
        if began.exists() and not self.overwrite:
            old = read_json(began).get("inputs", inputs)
            changed = [name for name in {**old, **inputs} if old.get(name) != inputs.get(name)]
            if changed:
                raise UserError(
                    f"{self.directory}: {changed[0]} has changed since this run began; choose another --out, "
                    "or pass --overwrite to delete the run"
                )
        remove_leftovers(self.directory)
        remove_leftovers(self.directory / "checkpoints")
        saved = self.directory / "config.toml"
        if self.overwrite:  # config.toml goes last: until then it is a run that can be resumed or overwritten
            for path in sorted(self.directory.iterdir(), key=lambda path: (path == saved, path == began)):
                if path.name != LOCK:
                    remove(path)
            self.overwrite = False
        if not saved.exists():
            write_text(saved, self.config_toml)
        if not began.exists():
            write_json(began, {**environment(), "inputs": inputs})

    @property
    def model(self) -> Path:
        """Where the final model directory goes; it exists only when the stage has finished."""
        return self.directory / "model"

    @property
    def finished(self) -> bool:
        """Whether the stage wrote all it promised, and is not to start anew."""
        return not self.overwrite and self.model.is_dir() and (self.directory / "summary.json").exists()

    def checkpoints(self) -> list[Checkpoint]:
        """Complete checkpoints, oldest first."""
        folder = self.directory / "checkpoints"
        found = [
            Checkpoint(int(path.name[5:]), path) for path in folder.glob("step_*") if path.name[5:].isdigit()
        ]
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
        if not self.writes:
            return
        for checkpoint in self.checkpoints()[:-keep_last]:
            if checkpoint.step != best_step:
                remove(checkpoint.path)

    def log(self, name: str, row: dict[str, Any]) -> None:
        """Append a row to `<name>.jsonl`."""
        if not self.writes:
            return
        with (self.directory / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def rewind(self, step: int, samples_step: int) -> None:
        """Drop metrics later than `step`, samples later than `samples_step`: they will be written again."""
        if not self.writes:
            return
        for name, last in (("metrics", step), ("samples", samples_step)):
            path = self.directory / f"{name}.jsonl"
            if path.exists():
                rows = [line for line in path.read_bytes().split(b"\n") if _step_of(line) <= last]
                write_text(path, "".join(line.decode() + "\n" for line in rows))

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of `<name>.jsonl`; none if there is no such file."""
        path = self.directory / f"{name}.jsonl"
        return [row for _, row in read_jsonl(path)] if path.exists() else []


def _lock(directory: Path) -> int | None:
    """Take the lock of a run; the kernel gives it back when the descriptor is closed or the process dies.

    None where files cannot be locked, or not be written at all. Raises UserError if another has it.
    """
    path = directory / LOCK
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):  # what has to be written will say so
            return None
        raise
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = path.read_text(encoding="utf-8", errors="replace").strip()
        os.close(handle)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(
                f"{directory}: {holder or 'another process'} is writing this run; wait until it is done, "
                "stop it, or choose another --out"
            ) from None
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            return None
        raise
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {platform.node()}\n".encode())
    return handle


def _check(directory: Path, config_toml: str, overwrite: bool) -> None:
    """Raise UserError if a directory holds something else than this run; see `Run.open`."""
    saved = directory / "config.toml"
    if directory.exists() and (not directory.is_dir() or not all(map(_is_ours, directory.iterdir()))):
        if not saved.exists() or _is_anothers(directory):
            raise UserError(f"{directory}: exists and is not a run directory; choose another --out")
        if not overwrite and (differing := _differing_keys(saved, config_toml)):
            raise UserError(
                f"{directory}: holds a run with another configuration ({differing}); run the same "
                "command to resume it, choose another --out, or pass --overwrite to delete it"
            )


def _is_ours(path: Path) -> bool:
    """Whether a path may lie in a directory without making it something: the lock, what a crash left."""
    return path.name == LOCK or is_leftover(path)


def _is_anothers(directory: Path) -> bool:
    """Whether a directory with a config.toml is no run: `begin` writes that first and environment.json
    second, and deletes them in the other order, so that a crash may leave the one alone but nothing else."""
    others = [path for path in directory.iterdir() if path.name != "config.toml" and not _is_ours(path)]
    return bool(others) and not (directory / "environment.json").exists()


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line cut short by a crash
        return float("inf")


def _differing_keys(saved: Path, config_toml: str) -> str:
    """What differs between the saved configuration and another, in words; "" if nothing does."""
    try:
        old = tomllib.loads(saved.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{saved}: not valid TOML ({error}); choose another --out") from None
    new = tomllib.loads(config_toml)
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    words = [f"{key} is {_shown(key, old)} there, {_shown(key, new)} here" for key in keys[:3]]
    return "; ".join(words) + ("; ..." if len(keys) > 3 else "")


def _shown(key: str, config: dict[str, Any]) -> str:
    return repr(config[key]) if key in config else "not set"


def lineage(
    stage: str, config: Dataclass, parent: Path | None, data: dict[str, str], tokenizer: str, tokens: int
) -> dict[str, Any]:
    """Where a model comes from, for `lineage.json`: `data` and `tokenizer` are fingerprints."""
    return {
        "stage": stage,
        "parent": None if parent is None else str(parent),
        "fledge_version": __version__,
        "config": tomllib.loads(to_toml(config)),
        "data": data,
        "tokenizer": tokenizer,
        "tokens": tokens,
    }


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
