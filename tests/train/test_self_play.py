"""Self-play: with perfect moves it gives the values of minimax, with random ones the known chances."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from fledge.errors import UserError
from fledge.tasks.tictactoe import (
    EMPTY,
    best_moves,
    moves,
    play,
    positions,
    read_board,
    show,
    value,
)
from fledge.tokenizer.bpe import Tokenizer, train_bpe
from fledge.train.groups import Settings, World
from fledge.train.self_play import (
    board_values,
    game_prompts,
    move_rewards,
    play_figures,
    self_play_reward,
)
from fledge.types import Rollout
from tests.models import chain_model

from .test_grpo import SETTINGS

TOKENIZER = train_bpe(["aa"], 265)
GOING_ON = [board for board in positions() if moves(board)]


def perfect(boards: Sequence[str], _number: int) -> list[list[int | None]]:
    return [[*best_moves(board)] for board in boards]


def moved(board: str, text: str, ended: bool = True) -> Rollout:
    return Rollout([1, len(text)], [False, True], [], {"board": show(board)}, [], text, ended)


def test_perfect_play_from_every_board_ends_as_minimax_says() -> None:
    found = board_values(positions(), perfect)
    assert found == {board: value(board) for board in positions()}


def test_a_board_is_asked_about_once_and_only_if_it_comes_up() -> None:
    """With the first free cell as the only move, a game from the empty board is a line of seven moves."""
    asked: list[str] = []

    def first(boards: Sequence[str], number: int) -> list[list[int | None]]:
        assert {9 - board.count(".") for board in boards} == {number}
        asked.extend(boards)
        return [[moves(board)[0]] for board in boards]

    assert board_values([EMPTY, EMPTY], first)[EMPTY] == 1  # X has 1, 3, 5 and 7
    assert len(asked) == len(set(asked)) == 7


def test_random_games_have_the_known_value() -> None:
    """X wins 737 of 1,260 games, O 121 of 420: with all moves as the sample, that is what the board is worth;
    with three drawn ones, the mean of many trials is: within four standard errors."""
    every = board_values([EMPTY], lambda boards, _number: [moves(board) for board in boards])
    assert every[EMPTY] == pytest.approx(737 / 1260 - 121 / 420)
    rng = random.Random(0)

    def three(boards: Sequence[str], _number: int) -> list[list[int | None]]:
        return [[*rng.choices(moves(board), k=3)] for board in boards]

    trials = [board_values([EMPTY], three)[EMPTY] for _ in range(100)]
    spread = statistics.stdev(trials)
    assert abs(statistics.fmean(trials) - every[EMPTY]) < 4 * spread / 10
    assert spread < 0.5, "a single game ends in 1 or -1: its deviation is nearly 0.9"


def test_a_move_is_worth_what_the_game_brings_who_made_it() -> None:
    """With perfect play behind it: minus the value of the board that it leaves to the other."""
    for board in GOING_ON[:: len(GOING_ON) // 300]:
        cells = range(1, 10)
        found = move_rewards([moved(board, f" {cell}\n") for cell in cells], perfect)
        wanted = [-value(play(board, cell)) if cell in moves(board) else -1 for cell in cells]
        assert found == wanted


def test_games_go_on_by_the_moves_of_the_rollouts() -> None:
    """Where a roll-out has boards they come to: with every best move of every board nothing else is asked
    for, and each move is worth what minimax says. Of other boards moves are sampled."""

    def none(boards: Sequence[str], _number: int) -> list[list[int | None]]:
        raise AssertionError(f"asked for moves on {boards}")

    made = [(board, cell) for board in GOING_ON for cell in best_moves(board)]
    found = move_rewards([moved(board, str(cell)) for board, cell in made], none)
    assert found == [value(board) for board, _ in made]
    near_the_end = "XOXOXX..O"  # O takes 7, then X the last cell, 8: a draw
    asked: list[str] = []

    def sample(boards: Sequence[str], _number: int) -> list[list[int | None]]:
        asked.extend(boards)
        return [[moves(board)[0]] for board in boards]

    after = play(near_the_end, 7)
    assert move_rewards([moved(near_the_end, "7"), moved(after, "0")], sample) == [1.0, -1.0]
    assert move_rewards([moved(near_the_end, "7")], sample) == [0.0]
    assert asked == [after]


@pytest.mark.parametrize(
    ("text", "ended"), [("0", True), ("10", True), ("5 5", True), ("", True), ("5", False)]
)
def test_what_is_no_move_is_a_loss(text: str, ended: bool) -> None:
    assert move_rewards([moved(EMPTY, text, ended)], perfect) == [-1.0]


def test_who_makes_no_legal_move_later_loses() -> None:
    """X's first move is good; O then names a taken cell, or moves well and X names none, or each by half."""
    answers: dict[int, list[int | None]] = {1: [5], 2: [None]}

    def sample(boards: Sequence[str], _number: int) -> list[list[int | None]]:
        return [answers[9 - board.count(".")] for board in boards]

    assert move_rewards([moved(EMPTY, "5")], sample) == [1.0]
    answers[1] = [1]
    assert move_rewards([moved(EMPTY, "5")], sample) == [-1.0]
    answers[1] = [1, 5]
    assert move_rewards([moved(EMPTY, "5")], sample) == [0.0]


def test_every_board_is_a_prompt() -> None:
    found = game_prompts(TOKENIZER, plain=True, most=20, game="tictactoe")
    assert {read_board(prompt.prompt.row["board"]) for prompt in found.train} == set(GOING_ON)
    assert len(found.train) == 4520 and not found.held
    assert TOKENIZER.decode(found.train[0].ids[1:]) == ".../.../... X"
    cells = game_prompts(TOKENIZER, plain=True, most=20, game="tictactoe-cells")
    assert [read_board(TOKENIZER.decode(prompt.ids[1:])) for prompt in cells.train] == [
        read_board(prompt.prompt.row["board"]) for prompt in found.train
    ]
    with pytest.raises(UserError, match="leaves no room for a move"):
        game_prompts(TOKENIZER, plain=True, most=5, game="tictactoe")


def world_of(tokenizer: Tokenizer, cells: dict[str, float], settings: Settings = SETTINGS) -> World:
    """A policy that answers every board with one of these cells, with such probabilities."""
    line_break = tokenizer.encode("\n")[0]
    model = chain_model(tokenizer, {})
    assert tokenizer.end_of_turn_id is not None
    with torch.no_grad():
        for cell, share in cells.items():
            # The norm before the head makes the one of an id as large as the root of the width.
            logit = torch.tensor(share).log() / tokenizer.vocab_size**0.5
            model.lm_head.weight[tokenizer.encode(cell)[0], line_break] = 20.0 + logit
    return World(model, None, tokenizer, [tokenizer.end_of_turn_id], [], settings, torch.float32)


def test_both_sides_are_played_by_the_policy_as_it_is_now() -> None:
    """It only knows 5: who moves when that is taken loses. Later it only knows 9."""
    world = world_of(TOKENIZER, {"5": 1.0})
    prompts = game_prompts(TOKENIZER, plain=False, most=100, game="tictactoe").train
    reward = self_play_reward(world, prompts).function
    assert reward([moved(EMPTY, "1"), moved(EMPTY, "5")]) == [-1.0, 1.0]
    world.policy.load_state_dict(world_of(TOKENIZER, {"9": 1.0}).policy.state_dict())
    assert reward([moved(EMPTY, "1"), moved(EMPTY, "9")]) == [-1.0, 1.0]


def test_the_same_moves_are_always_worth_the_same() -> None:
    """Which is what a run that is resumed needs; other moves are played on with other random numbers."""
    world = world_of(TOKENIZER, {str(cell): 1 / 9 for cell in range(1, 10)})
    prompts = game_prompts(TOKENIZER, plain=False, most=100, game="tictactoe").train
    reward = self_play_reward(world, prompts).function
    some = [moved(EMPTY, str(1 + i % 9)) for i in range(60)]
    first = reward(some)
    assert reward(some) == first and len(set(first)) > 3
    other_seed = replace(world, settings=replace(SETTINGS, seed=1))
    assert self_play_reward(other_seed, prompts).function(some) != first


def test_figures_are_those_of_all_lines() -> None:
    """Who only knows 5 makes no second move: as X against 8 answers, as O 1 + 8 * 7 lines, all lost."""
    prompts = game_prompts(TOKENIZER, plain=False, most=100, game="tictactoe").train
    figures = play_figures(world_of(TOKENIZER, {"5": 1.0}), prompts)
    assert figures["validation_lost:random"] == figures["validation_illegal:random"] == 8 + 57
    assert figures["validation"] == pytest.approx(figures["validation_p_lost:minimax"]) == 1.0
    assert figures["validation_p_won:random"] == 0.0
    names = {name.partition(":")[2] for name in figures} - {""}
    assert names == {"random", "weak", "depth-2", "minimax"}
    assert all(name.startswith("validation") for name in figures)
