"""`fledge task`: the files of each task, and what is right of what a model made of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fledge.cli import main
from fledge.files import read_jsonl
from fledge.stages.task import moves_of
from fledge.tasks.tictactoe import best_moves, moves, positions, read_board, show
from fledge.tokenizer.bpe import train_bpe

from ..models import save_chain_model

Capture = pytest.CaptureFixture[str]
ADDITION = ["addition", "--train", "30", "--test", "10", "--starter", "5", "--text", "7"]
COUNTDOWN = ["countdown", "--train", "30", "--test", "10", "--starter", "5", "--text", "7", "--numbers", "3"]
TICTACTOE = ["tictactoe", "--games", "5"]
FILES = ("sft.jsonl", "text.jsonl", "prompts.jsonl", "test.jsonl")


@pytest.fixture(scope="module")
def fives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers 5 to everything."""
    directory = tmp_path_factory.mktemp("task") / "model"
    save_chain_model(directory, train_bpe(["aa"], 265), "5")
    return directory


@pytest.mark.parametrize(
    ("flags", "rows"),
    [(ADDITION, (5, 7, 30, 10)), (COUNTDOWN, (5, 7, 30, 10)), (TICTACTOE, (None, 5, 3959, 561))],
    ids=["addition", "countdown", "tictactoe"],
)
def test_the_files(flags: list[str], rows: tuple[int | None, ...], tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "task"
    assert main(["task", *flags, "--out", str(out)]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert {path.name for path in out.iterdir()} == {*FILES, "manifest.json"}
    for file, wanted in zip(FILES, rows, strict=True):
        lines = [row for _, row in read_jsonl(out / file)]
        assert len(lines) == manifest["rows"][file] == (wanted or len(lines)) > 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert manifest["reward"] in printed.err


def test_who_plays_the_recorded_games(tmp_path: Path) -> None:
    """A perfect player makes best moves alone."""
    flags = ["task", "tictactoe", "--games", "20", "--player", "minimax", "--out", str(tmp_path / "task")]
    assert main(flags) == 0
    rows = [row["messages"] for _, row in read_jsonl(tmp_path / "task" / "sft.jsonl")]
    assert all(int(reply["content"]) in best_moves(read_board(ask["content"])) for ask, reply in rows)
    assert json.loads((tmp_path / "task" / "manifest.json").read_text())["settings"]["player"] == "minimax"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["addition", "--digits", "0"], "--digits 0: must be at least 1"),
        (["addition", "--digits", "19"], "--digits 19: must be at most 18"),
        (["addition", "--digits", "1", "--train", "500"], "different problems for worked examples"),
        (["countdown", "--numbers", "1"], "--numbers 1: each must be from 2 to 6"),
        (["countdown", "--numbers", "4", "--trace-lines", "3"], "--trace-lines 3: must be at least 4"),
        (["countdown", "--max-target", "9"], "--max-target 9: must be at least 10"),
        (["tictactoe", "--games", "-1"], "--games -1: must be at least 0"),
        (["tictactoe", "--player", "master"], "master"),
        (["chess"], "fledge task"),
    ],
)
def test_a_mistake_writes_nothing(flags: list[str], message: str, tmp_path: Path, capsys: Capture) -> None:
    assert main(["task", *flags, "--out", str(tmp_path / "task")]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def write_answers(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def completion(text: str, finish_reason: str = "stop") -> dict[str, str]:
    return {"text": text, "finish_reason": finish_reason}


def test_check_counts_what_is_right(tmp_path: Path, capsys: Capture) -> None:
    """Of five completions two are right and one was cut off; of three prompts two have a right one."""
    rows = [
        {"answer": "975", "completions": [completion("3+6=9\n975"), completion("579")]},
        {"answer": "12", "completions": [completion("12", "length"), completion("x\n12")]},
        {"answer": "7", "completions": [completion("8")]},
    ]
    data, out = write_answers(tmp_path / "answers.jsonl", rows), tmp_path / "figures.json"
    flags = ["--reward", "0.5*exact:last_line=true", "0.5*regex:pattern=[0-9]+,last_line=true"]
    assert main(["task", "check", str(data), *flags, "--out", str(out), "--examples", "1"]) == 0
    figures = json.loads(out.read_text())
    assert figures["mean_reward"] == pytest.approx((1 + 0.5 + 0 + 1 + 0.5) / 5)
    assert (figures["right"]["successes"], figures["right"]["n"]) == (2, 5)
    assert figures["prompts_with_a_right_one"]["rate"] == pytest.approx(2 / 3)
    assert figures["cut_off"] == 1
    printed = capsys.readouterr().out
    assert f"{data}:1, reward 0.5\n579" in printed
    assert "0.6000" in printed


@pytest.mark.parametrize(("flags", "right"), [([], None), (["--right-from", "3"], 2)])
def test_what_is_right_by_a_function_has_to_be_said(
    flags: list[str], right: int | None, tmp_path: Path, capsys: Capture
) -> None:
    """Nobody knows how much a function may give: a reward of 1 is not right because a verifier's is."""
    rules = tmp_path / "rules.py"
    rules.write_text("def length(rollouts):\n    return [len(one.completion) for one in rollouts]")
    texts = ("a", "bbb", "cccc", "dd")
    data = write_answers(tmp_path / "answers.jsonl", [{"completions": [*map(completion, texts)]}])
    out = tmp_path / "figures.json"
    asked = ["--reward", f"{rules}:length", "--out", str(out), "--examples", "9", *flags]
    assert main(["task", "check", str(data), *asked]) == 0
    figures, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert figures["mean_reward"] == 2.5 and figures["highest_reward"] == 4
    assert figures.get("right", {}).get("successes") == right
    assert ("prompts_with_a_right_one" in figures) == ("right: " in printed) == (right is not None)
    assert ("--right-from" in printed) == (right is None)
    assert printed.count("--- ") == (3 if right is None else 2)


@pytest.mark.parametrize(
    ("row", "reward", "message"),
    [
        ({"answer": "1"}, "exact", 'answers.jsonl:1: no list "completions"'),
        ({"answer": "1", "completions": ["1"]}, "exact", 'answers.jsonl:1: no list "completions"'),
        ({"completions": [{"text": "1"}]}, "exact", 'the row has no field "answer"'),
        ({"answer": "1", "error": "too long"}, "exact", "holds no completions"),
        ({"answer": "1", "completions": [{"text": "1"}]}, "exat", "nearest is 'exact'"),
    ],
)
def test_check_says_what_is_missing(
    row: dict[str, Any], reward: str, message: str, tmp_path: Path, capsys: Capture
) -> None:
    data = write_answers(tmp_path / "answers.jsonl", [row])
    assert main(["task", "check", str(data), "--reward", reward]) == 2
    assert message in capsys.readouterr().err


def test_completions_of_generate_are_checked(fives: Path, tmp_path: Path, capsys: Capture) -> None:
    """5 is the answer to one of two prompts."""
    rows = [{"prompt": "2+3=", "answer": "5"}, {"prompt": "2+4=", "answer": "6"}]
    data, made = write_answers(tmp_path / "test.jsonl", rows), tmp_path / "made.jsonl"
    asked = ["--batch", str(data), "--out", str(made), "--chat", "--temperature", "0"]
    assert main(["generate", "--model", str(fives), *asked]) == 0
    assert main(["task", "check", str(made), "--reward", "exact"]) == 0
    assert "50.0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "reason", "cell"),
    [(" 5\n", "stop", 5), ("take\n5", "stop", None), ("5 5", "stop", None), ("5", "length", None)],
)
def test_play_reads_a_move_by_the_rule_of_games(text: str, reason: str, cell: int | None) -> None:
    """A cell and nothing else, in an answer that ends: what else is written could name any cell."""

    class Says:
        def replies(self, asked: list[Any], _params: Any) -> list[SimpleNamespace]:
            return [SimpleNamespace(text=text, finish_reason=reason) for _ in asked]

    found = moves_of(Says(), 8, show)  # type: ignore[arg-type]
    assert set(found.values()) == ({cell} if cell else set())
    assert len(found) == (4520 if cell else 0)


@pytest.mark.slow
def test_play_follows_all_lines(fives: Path, tmp_path: Path, capsys: Capture) -> None:
    """As X it takes the centre and has no second move, after each of 8 answers. As O it has none if X took
    the centre, else none after each of 7 answers: 1 + 8 * 7 lines."""
    out = tmp_path / "lines.json"
    assert main(["task", "play", "--model", str(fives), "--out", str(out), "--device", "cpu"]) == 0
    figures = json.loads(out.read_text())
    sides = figures["lines"]["random"]
    assert (sides["X"]["lost"], sides["X"]["illegal"], sides["X"]["won"], sides["X"]["drawn"]) == (8, 8, 0, 0)
    assert (sides["O"]["lost"], sides["O"]["illegal"]) == (57, 57)
    assert sides["O"]["p_lost"] == pytest.approx(1.0)
    assert set(figures["lines"]) == {"random", "weak", "depth-2", "minimax"}
    going_on = [board for board in positions() if moves(board)]
    free = sum(board[4] == "." for board in going_on)
    assert (figures["legal_moves"]["successes"], figures["legal_moves"]["n"]) == (free, 4520)
    assert figures["best_moves_on_test_boards"]["n"] == 561
    assert "minimax" in capsys.readouterr().out
    assert main(["task", "play", "--model", str(fives), "--out", str(out)]) == 2
