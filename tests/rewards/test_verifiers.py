"""Rewards by name: specs, weights, settings, and what a reward function does with roll-outs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fledge.errors import UserError
from fledge.rewards.verifiers import read_reward, reward_function, verifier
from fledge.tasks.tictactoe import best_moves, moves, positions, show
from fledge.types import Rollout

BOARD = "XX./OO./..."


def rollout(completion: str, row: dict[str, Any] | None = None, ended: bool = True) -> Rollout:
    return Rollout([], [], [], row or {"answer": "42"}, [], completion, ended, "prompts.jsonl:3")


def test_one_reward_for_each_roll_out() -> None:
    rewards = reward_function("exact")
    assert rewards([rollout("42"), rollout("41"), rollout("42")]) == [1.0, 0.0, 1.0]
    assert rewards([]) == []


def test_a_text_that_was_cut_off_gets_nothing() -> None:
    """What was to follow is not known: 42 may be the beginning of 425."""
    assert reward_function("exact")([rollout("42", ended=False)]) == [0.0]


def test_weights_and_sums() -> None:
    rewards = reward_function(["0.9*exact", "0.1*regex:pattern=[0-9]+", "-0.5*regex:pattern=4.*"])
    assert rewards([rollout("42"), rollout("31"), rollout("x"), rollout("4x")]) == pytest.approx(
        [0.5, 0.1, 0.0, -0.5]
    )


def test_a_function_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "def length(rollouts):\n    return [len(r.completion) + r.row['bonus'] for r in rollouts]\n"
    )
    rewards = reward_function([f"0.5*{file}:length", "exact"])
    assert rewards([rollout("42", {"answer": "42", "bonus": 1})]) == [2.5]
    with pytest.raises(UserError, match="no function 'size'"):
        reward_function(f"{file}:size")
    with pytest.raises(UserError, match="KeyError: 'bonus'"):
        rewards([rollout("42")])


def test_names_are_kept_for_reports() -> None:
    reward = read_reward("0.25*number:tolerance=0.5,after=A:")
    assert (reward.name, reward.weight) == ("number:tolerance=0.5,after=A:", 0.25)
    assert reward.function([rollout("A: 42.5")]) == [1.0]


def test_commas_and_equals_signs_in_a_value() -> None:
    verify = verifier("regex:pattern=a{1,2},b=c,last_line=true")
    assert verify("x\naa,b=c", {}) == 1.0
    assert verify("aa,b=c\nx", {}) == 0.0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("exactt", "nearest is 'exact'"),
        ("", "unknown verifier ''"),
        ("2*", "unknown verifier"),
        ("x*exact", "unknown verifier 'x\\*exact'"),
        ("nan*exact", "unknown verifier"),
        ("exact:tolerance=1", "the settings are field, after, last_line"),
        ("exact:field", "not SETTING=VALUE"),
        ("exact:field=", "field must be a text"),
        ("exact:field=a,field=b", "twice"),
        ("exact:last_line=yes", "last_line must be true or false"),
        ("number:tolerance=-1", "tolerance must be a number of at least 0"),
        ("number:tolerance=nan", "tolerance must be a number of at least 0"),
        ("json_schema:schema=nowhere.json", "nowhere.json: no such file"),
        ("nowhere.py:f", "nowhere.py: no such file"),
        ("regex:pattern=(.py:", "unclosed group"),
    ],
)
def test_a_wrong_spec_is_an_error_before_any_text(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        reward_function(spec)


def test_no_spec_names_what_there_is() -> None:
    with pytest.raises(UserError, match="countdown"):
        reward_function([])


@pytest.mark.parametrize(
    "spec", ["exact", "normalised", "number", "regex", "json_schema", "arithmetic", "countdown", "tictactoe"]
)
def test_a_row_without_gold_is_named(spec: str) -> None:
    """Whatever the text is: an empty one for each prompt checks the data before any training."""
    for completion in ("1", ""):
        for settings in ("", ":after=A:"):
            with pytest.raises(UserError, match=r'prompts\.jsonl:3.*the row has no field "'):
                reward_function(spec + settings)([rollout(completion, {"prompt": "?"}, ended=False)])


@pytest.mark.parametrize("spec", ["exact", "number", "arithmetic", "countdown", "tictactoe", "normalised"])
@pytest.mark.parametrize(
    "text",
    ["", " ", "\n", "\u200b", "\u202e", "\x00", "\ud800", *(mark * 100_000 for mark in "(9-e.,/[")],
)
def test_no_text_breaks_a_verifier_or_pays(spec: str, text: str) -> None:
    row = {"answer": "42", "numbers": [6, 7], "target": 42, "board": BOARD}
    assert reward_function(spec)([rollout(text, row)]) == [0.0]


def test_tictactoe_moves() -> None:
    """X wins on 3; any other move lets O win on 6."""
    rewards = reward_function("tictactoe:legal=0.25")
    said = ["3", " 3\n", "6", "1", "0", "10", "3 6", "x", "", "\u0663", "-3", "3.0"]
    rollouts = [rollout(text, {"board": BOARD}) for text in said]
    assert rewards(rollouts) == [1.0, 1.0, 0.25, *[0.0] * 9]


def test_best_moves_pay_on_every_board() -> None:
    verify = verifier("tictactoe")
    for board in positions()[::50]:
        paid = {cell for cell in range(1, 10) if moves(board) and verify(str(cell), {"board": show(board)})}
        assert paid == set(best_moves(board))


@pytest.mark.parametrize("board", ["XXX/OO./...", "XXO/OOX/XXO", "X", "XX./.../...", "XX./OO./... O", 5, ""])
def test_a_board_without_a_move_to_make_is_an_error(board: Any) -> None:
    with pytest.raises(UserError, match=r"prompts\.jsonl:3"):
        reward_function("tictactoe")([rollout("1", {"board": board})])
