"""The command line: what it prints, its exit codes, and that a user's mistake is one line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from safetensors import SafetensorError

import fledge
from fledge import cli
from fledge.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fly away."""

    out: Path = Path("runs/fly")
    """Where to."""
    steps: int = 1
    """How long."""


Stage = Callable[[Callable[[Config], None]], None]


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Installs a `main` as the stage of a verb `fly`."""

    def install(main: Callable[[Config], None]) -> None:
        module = ModuleType("fledge.stages.fly")
        module.__dict__.update(Config=Config, main=main)
        monkeypatch.setitem(sys.modules, "fledge.stages.fly", module)
        monkeypatch.setitem(cli.VERBS, "fly", "fly away")

    return install


def failing(error: BaseException) -> Callable[[Config], None]:
    def main(config: Config) -> None:
        raise error

    return main


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed on stderr, which must be a single line, with nothing on stdout."""
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.endswith("\n")
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["--version"]])
def test_the_overview_imports_nothing_slow(argv: list[str]) -> None:
    program = (
        f"import sys, fledge.cli; code = fledge.cli.main({argv!r})\n"
        "slow = {'torch', 'numpy', 'cyclopts', 'rich', 'tokenizers', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {slow}' if slow else code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    if argv == ["--version"]:
        assert done.stdout == f"fledge {fledge.__version__}\n"
    else:
        assert all(f"  {verb} " in done.stdout for verb in cli.VERBS)


def test_a_verb_gets_its_settings(stage: Stage) -> None:
    seen: list[Config] = []
    stage(seen.append)
    assert cli.main(["fly", "--steps", "3", "--out=x"]) == 0
    assert seen == [Config(steps=3, out=Path("x"))]


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*verb.split(), "--help"]) == 0
    printed = capsys.readouterr()
    assert f"Usage: fledge {verb}" in printed.out
    assert printed.err == ""


def test_unknown_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrian", "--data", "x"]) == 2
    error = error_of(capsys)
    assert error.startswith("fledge: error: unknown verb 'pretrian'")
    assert "'pretrain'" in error


def test_unknown_flag_names_the_nearest(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    stage(failing(AssertionError("must not run")))
    assert cli.main(["fly", "--step", "1"]) == 2
    error = error_of(capsys)
    assert error.startswith("fledge fly: error: ")
    assert "--steps" in error


def test_unknown_key_names_file_line_and_the_nearest(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage(failing(AssertionError("must not run")))
    path = tmp_path / "fly.toml"
    path.write_text("\nstep = 1\n")
    assert cli.main(["fly", "--config", str(path)]) == 2
    assert f"{path}:2: unknown setting 'step'; the nearest is 'steps'" in error_of(capsys)


def test_a_users_mistake_is_one_line(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    stage(failing(UserError("data.txt:3: no text; remove the line")))
    assert cli.main(["fly"]) == 2
    assert error_of(capsys) == "fledge fly: error: data.txt:3: no text; remove the line\n"


@pytest.mark.parametrize("argv", [["--debug", "fly"], ["fly", "--debug"], ["fly", "--steps", "2", "--debug"]])
def test_debug_shows_where(argv: list[str], stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    stage(failing(UserError("no text")))
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert error.endswith("fledge fly: error: no text\n")


def test_interrupt(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    stage(failing(KeyboardInterrupt()))
    assert cli.main(["fly"]) == 130
    assert error_of(capsys) == "fledge fly: interrupted\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_full_disk_names_the_place_and_what_to_do(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    def main(config: Config) -> None:
        with open("/dev/full", "w") as file:
            file.write("text")

    stage(main)
    assert cli.main(["fly", "--out", "runs/x"]) == 2
    assert error_of(capsys) == (
        "fledge fly: error: disk full: runs/x; free room and run the same command again\n"
    )


def test_full_disk_in_safetensors(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    """It raises an error of its own, which holds the system's only as text."""
    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    stage(failing(SafetensorError(text)))
    assert cli.main(["fly"]) == 2
    assert "disk full: runs/fly" in error_of(capsys)


def test_a_fault_of_ours_is_not_hidden(stage: Stage) -> None:
    stage(failing(ZeroDivisionError("x")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["fly"])


def test_a_path_without_permission_is_one_line(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    stage(failing(PermissionError(13, "Permission denied", "x/y")))
    assert cli.main(["fly"]) == 2
    assert "x/y: Permission denied" in error_of(capsys)


def test_the_process_exits_with_the_code() -> None:
    command = [sys.executable, "-m", "fledge", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("fledge: error: ")


def test_a_reader_that_has_gone_is_no_error() -> None:
    command = [sys.executable, "-m", "fledge", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141
