"""The run directory: refused, begun, resumed or overwritten, and never left as something it is not."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import fledge.run
from fledge.errors import UserError
from fledge.run import LOCK, Run

INPUTS = {"the data": "1f", "the model": "2e"}
CONFIG = 'out = "x"\nseed = 0\ndata = [\n    "a",\n    "b",\n]\n'


def begun(directory: Path, config: str = CONFIG) -> Run:
    run = Run.open(directory, config)
    run.begin(INPUTS)
    return run


def listing(directory: Path) -> dict[str, bytes | None]:
    """Everything below a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


def test_nothing_is_written_before_begin(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "runs" / "x", CONFIG)
    assert not run.finished
    assert list(tmp_path.iterdir()) == []
    run.begin(INPUTS)
    assert (tmp_path / "runs/x/config.toml").read_text() == CONFIG
    assert {"fledge", "torch", "python", "threads"} <= json.loads(
        (run.directory / "environment.json").read_text()
    ).keys()


def test_an_empty_directory_will_do(tmp_path: Path) -> None:
    begun(tmp_path)
    assert (tmp_path / "config.toml").exists()


def test_the_same_configuration_goes_on(tmp_path: Path) -> None:
    run = begun(tmp_path / "x")
    run.log("metrics", {"step": 1})
    before = listing(tmp_path)
    assert begun(tmp_path / "x").rows("metrics") == [{"step": 1}]
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("config", "difference"),
    [
        (CONFIG.replace("seed = 0", "seed = 1"), "seed is 0 there, 1 here"),
        (CONFIG.replace("seed = 0\n", ""), "seed is 0 there, not set here"),
        (CONFIG + "minutes = 1.5\n", "minutes is not set there, 1.5 here"),
        (
            'out = "x"\nseed = 0\ndata = [\n    "b",\n    "a",\n]\n',
            r"data is \['a', 'b'\] there, \['b', 'a'\] here",
        ),
    ],
)
@pytest.mark.parametrize("suffix", ["", "/checkpoints/step_000001"])
def test_another_configuration_is_refused_and_nothing_touched(
    config: str, difference: str, suffix: str, tmp_path: Path
) -> None:
    directory = tmp_path / "x"
    run = begun(directory)
    run.log("metrics", {"step": 1})
    (directory / f".config.toml.tmp-1{suffix}").mkdir(parents=True)
    before = listing(tmp_path)
    with pytest.raises(UserError, match=difference) as error:
        Run.open(directory, config)
    assert "--overwrite" in str(error.value)
    assert "\n" not in str(error.value)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("inputs", "name"),
    [
        ({"the data": "1f", "the model": "0"}, "the model"),
        ({"the data": "1f"}, "the model"),
        ({**INPUTS, "more": ""}, "more"),
    ],
)
def test_other_inputs_are_refused_and_nothing_touched(
    inputs: dict[str, str], name: str, tmp_path: Path
) -> None:
    """The same paths may hold something else than they did."""
    begun(tmp_path)
    (tmp_path / ".model.tmp-1").mkdir()
    before = listing(tmp_path)
    with pytest.raises(UserError, match=f"{name} has changed since this run began; .* --overwrite"):
        Run.open(tmp_path, CONFIG).begin(inputs)
    assert listing(tmp_path) == before
    Run.open(tmp_path, CONFIG, overwrite=True).begin(inputs)
    assert json.loads((tmp_path / "environment.json").read_text())["inputs"] == inputs
    Run.open(tmp_path, CONFIG).begin(inputs)


def test_what_is_no_run_is_refused_even_with_overwrite(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for path in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(UserError, match="exists and is not a run directory"):
            Run.open(path, CONFIG, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("seed =")
    with pytest.raises(UserError, match=r"config\.toml: not valid TOML"):
        Run.open(tmp_path, CONFIG)


def finish(run: Run) -> None:
    run.model.mkdir()
    (run.directory / "summary.json").write_text("{}")
    run.save_checkpoint(5, lambda directory: None, {})
    run.log("metrics", {"step": 5})


def test_overwrite_starts_anew(tmp_path: Path) -> None:
    finish(begun(tmp_path / "x"))
    other = CONFIG.replace("seed = 0", "seed = 1")
    run = Run.open(tmp_path / "x", other, overwrite=True)
    assert not run.finished
    assert run.checkpoints(), "deleted before all was checked"
    run.begin(INPUTS)
    assert sorted(listing(tmp_path / "x")) == [LOCK, "config.toml", "environment.json"]
    assert (tmp_path / "x/config.toml").read_text() == other
    finish(run)
    assert run.finished
    assert Run.open(tmp_path / "x", other).finished


def test_overwriting_may_be_killed_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left is a run that can be overwritten again, and none of its parts is a half."""
    real = fledge.run.remove

    class Killed(BaseException):
        pass

    for survivors in range(20):
        directory = tmp_path / str(survivors)
        finish(begun(directory))
        whole = listing(directory)
        calls = 0

        def remove(path: Path, survivors: int = survivors) -> None:
            nonlocal calls
            calls += 1
            if calls > survivors:
                raise Killed
            real(path)

        with monkeypatch.context() as patched:
            patched.setattr(fledge.run, "remove", remove)
            try:
                Run.open(directory, CONFIG, overwrite=True).begin(INPUTS)
            except Killed:
                left = listing(directory)
                assert left["config.toml"] == CONFIG.encode()
                assert left.items() <= whole.items()
            else:
                return
        Run.open(directory, "seed = 3", overwrite=True).begin(INPUTS)
        assert sorted(listing(directory)) == [LOCK, "config.toml", "environment.json"]
    raise AssertionError("never came to its end")


def test_leftovers_of_a_crash_go(tmp_path: Path) -> None:
    run = begun(tmp_path)
    (tmp_path / ".metrics.jsonl.tmp-1").touch()
    (tmp_path / ".model.tmp-1" / "sub").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step_000002.tmp-1").mkdir(parents=True)
    run.save_checkpoint(1, lambda directory: None, {})
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [1]
    begun(tmp_path)
    assert not list(tmp_path.rglob(".*.tmp-*"))
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [1]


# One process at a time.


HOLDER = """
import fcntl, sys, time
with open(sys.argv[1], "w") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("process 4242 on elsewhere", file=file, flush=True)
    print("locked", flush=True)
    time.sleep(60)
"""


@contextmanager
def held(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process writes the run; it is killed at the end, at the latest."""
    command = [sys.executable, "-c", HOLDER, str(directory / LOCK)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("overwrite", [False, True])
def test_another_process_is_kept_out_until_the_first_has_died(overwrite: bool, tmp_path: Path) -> None:
    begun(tmp_path).log("metrics", {"step": 1})
    (tmp_path / ".model.tmp-4242").mkdir()  # what the other one is about to write
    with held(tmp_path) as process:
        before = listing(tmp_path)
        run = Run.open(tmp_path, CONFIG, overwrite)
        with pytest.raises(UserError) as error:
            run.begin(INPUTS)
        message = str(error.value)
        assert message.startswith(f"{tmp_path}: process 4242 on elsewhere is writing this run; ")
        assert "--out" in message and "\n" not in message
        assert listing(tmp_path) == before
        process.kill()
        process.wait()
        run.begin(INPUTS)
    assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert run.rows("metrics") == ([] if overwrite else [{"step": 1}])


def test_a_run_inside_of_a_run_has_its_own_lock(tmp_path: Path) -> None:
    with held(tmp_path):
        begun(tmp_path / "base")


def test_what_another_process_began_meanwhile_is_checked_again(tmp_path: Path) -> None:
    late = Run.open(tmp_path / "x", CONFIG)
    begun(tmp_path / "x", CONFIG.replace("seed = 0", "seed = 1"))
    with pytest.raises(UserError, match="seed is 1 there, 0 here"):
        late.begin(INPUTS)


def test_a_process_killed_right_behind_its_lock_leaves_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    begun(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_will_do(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lockf(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    begun(tmp_path)
    assert (tmp_path / "config.toml").exists()


def test_a_run_that_may_only_be_read_can_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(tmp_path)

    def refused(*_: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path / LOCK))

    monkeypatch.setattr(os, "open", refused)
    begun(tmp_path)


def test_checkpoints_hold_tensors_and_state(tmp_path: Path) -> None:
    run = begun(tmp_path)
    for step in (10, 1_000_000, 9):
        run.save_checkpoint(
            step, lambda directory: (directory / "w").write_text("weights"), {"best": step / 3}
        )
    found = run.checkpoints()
    assert [checkpoint.step for checkpoint in found] == [9, 10, 1_000_000]
    assert found[1].path == tmp_path / "checkpoints" / "step_000010"
    assert found[1].state == {"best": 10 / 3}
    assert (found[1].path / "w").read_text() == "weights"


def test_a_failed_checkpoint_leaves_the_last_one(tmp_path: Path) -> None:
    run = begun(tmp_path)
    run.save_checkpoint(1, lambda directory: None, {})

    def write(directory: Path) -> None:
        (directory / "w").write_text("half")
        raise OSError(28, "No space left on device")

    before = listing(tmp_path)
    with pytest.raises(OSError, match="No space"):
        run.save_checkpoint(2, write, {})
    assert listing(tmp_path) == before


def test_a_site_with_a_config_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("title = 'my site'")
    (tmp_path / "pages.md").write_text("years of work")
    with pytest.raises(UserError, match="exists and is not a run directory"):
        Run.open(tmp_path, CONFIG, overwrite=True)


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(2, None, [4, 5]), (1, 2, [2, 5]), (3, 4, [3, 4, 5]), (9, None, [1, 2, 3, 4, 5])],
)
def test_prune(keep: int, best: int | None, left: list[int], tmp_path: Path) -> None:
    run = begun(tmp_path)
    for step in range(1, 6):
        run.save_checkpoint(step, lambda directory: None, {})
    run.prune(keep, best)
    assert [checkpoint.step for checkpoint in run.checkpoints()] == left


# Characters at which str.splitlines cuts, though they are no line breaks of JSON Lines.
STRANGE = "a\u2028b\u2029c\x85d\x1ee\x0bf\n"


def test_rows_come_back(tmp_path: Path) -> None:
    run = begun(tmp_path)
    assert run.rows("samples") == []
    rows = [{"step": 1, "text": STRANGE}, {"step": 2, "loss": 0.1 + 0.2}]
    for row in rows:
        run.log("samples", row)
    assert run.rows("samples") == rows


@pytest.mark.parametrize("cut", [b'{"step": 3, "te', '{"step": 3, "text": "é'.encode()[:-1], b'{"step": 1}'])
def test_rewind_drops_later_rows_and_a_line_cut_short(cut: bytes, tmp_path: Path) -> None:
    run = begun(tmp_path)
    for step in (1, 2, 3):
        run.log("metrics", {"step": step, "loss": 1 / 3})
        run.log("samples", {"step": step, "text": STRANGE})
    for name in ("metrics", "samples"):
        with (tmp_path / f"{name}.jsonl").open("ab") as file:
            file.write(cut)
    run.rewind(2, samples_step=1)
    whole = [{"step": 1}] if cut.endswith(b"}") else []
    assert run.rows("metrics") == [{"step": step, "loss": 1 / 3} for step in (1, 2)] + whole
    assert run.rows("samples") == [{"step": 1, "text": STRANGE}, *whole]
    run.rewind(-1, -1)
    assert run.rows("metrics") == []
