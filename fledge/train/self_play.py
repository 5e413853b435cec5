"""Self-play: the boards of a game are the prompts, and a move is worth how the game then ends.

A group is several moves on one board, each played on to the end of the game by the policy as it is now, which
moves for both sides: the group's mean is then the value of the board under the policy, and what a move is
better than that its advantage (Sutton & Barto 2018, 5.3, Monte Carlo with exploring starts; Silver et al.
2017, learning from nothing but games against oneself). All boards are drawn alike often, also those that the
policy has learned to avoid: an opponent may play worse than itself.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict

from fledge.data.prompts import Prompt
from fledge.errors import UserError
from fledge.rewards.verifiers import Reward
from fledge.tasks.lines import policy_lines
from fledge.tasks.tictactoe import (
    PLAYERS,
    moves,
    play,
    positions,
    read_board,
    read_move,
    show,
    show_cells,
    winner,
)
from fledge.tokenizer.bpe import Tokenizer
from fledge.train.groups import World
from fledge.train.prompts import EncodedPrompt, Prompts, encode_prompts
from fledge.train.rollout import play as roll_out_of
from fledge.train.steps import Metrics
from fledge.types import Rollout, SamplingParams

# For each board the cells that were sampled on it, None where none is named; the number is that of the call.
Sample = Callable[[Sequence[str], int], Sequence[Sequence[int | None]]]
# How prompts write a board, by the name of the game.
GAMES = {"tictactoe": show, "tictactoe-cells": show_cells}
# Moves that are sampled on each board behind the moves of a group.
LINES = 3


def game_prompts(tokenizer: Tokenizer, plain: bool, most: int, game: str) -> Prompts:
    """Every board on which one of `GAMES` goes on, as a prompt of at most `most` tokens; none is held out:
    what is measured is play against others, who take no part in the training. Raises UserError if one is
    longer."""
    boards = [(GAMES[game](board), show(board)) for board in positions() if moves(board)]
    prompts = [
        Prompt([{"role": "user", "content": text}], None, {"board": board}, f"the board {board}")
        for text, board in boards
    ]
    kept, overlong = encode_prompts(prompts, tokenizer, plain, most)
    if overlong:
        raise UserError(f"{overlong[0]} leaves no room for a move: lower --max-tokens to about 4")
    return Prompts(kept, [], [])


def board_values(
    boards: Iterable[str], sample: Sample, known: Mapping[str, Sequence[int | None]] | None = None
) -> dict[str, float]:
    """How the game ends from each board for whoever is to move: 1 a win, 0 a draw, -1 a loss; and of all
    boards that it comes to.

    On each board that comes up several moves are sampled, once (those that are `known` have theirs), and all
    lines of play of these moves are followed: a board is worth the mean over its moves. No line meets a board
    twice, so the mean over all samples is what a single game would bring on average, with far less chance in
    it. Who makes a move that the rules do not allow, or none, loses.
    """
    moves_known, sampled = known or {}, dict[str, Sequence[int | None]]()
    new, number = sorted(set(boards)), 0
    while new:
        sampled |= {board: moves_known.get(board, ()) for board in new}
        asked = [board for board in new if moves(board) and not sampled[board]]
        sampled |= dict(zip(asked, sample(asked, number) if asked else (), strict=True))
        reached = {play(board, cell) for board in new for cell in sampled[board] if cell in moves(board)}
        new, number = sorted(reached - sampled.keys()), number + 1
    values: dict[str, float] = {}
    for board in sorted(sampled, key=lambda board: board.count(".")):  # the ends of games first
        ends = [move_value(board, cell, values) for cell in sampled[board]]
        values[board] = sum(ends) / len(ends) if ends else -float(winner(board) is not None)
    return values


def move_value(board: str, cell: int | None, values: Mapping[str, float]) -> float:
    """What a move brings who makes it: minus what the board behind it is worth to the other, or a loss."""
    return -values[play(board, cell)] if cell in moves(board) else -1.0


def move_rewards(rollouts: Sequence[Rollout], sample: Sample) -> list[float]:
    """The `move_value` of each move, once the games are played on: by the moves of these roll-outs wherever
    there are any, elsewhere with `sample`. A row has its `board`."""
    made = [(read_board(str(rollout.row["board"])), move_of(rollout)) for rollout in rollouts]
    known: dict[str, list[int | None]] = {}
    for board, cell in made:
        known.setdefault(board, []).append(cell)
    after = (play(board, cell) for board, cell in made if cell in moves(board))
    values = board_values(after, sample, known)
    return [move_value(board, cell, values) for board, cell in made]


def move_of(rollout: Rollout) -> int | None:
    """The cell that a completion names; none where it did not end."""
    return read_move(rollout.completion) if rollout.ended else None


def self_play_reward(world: World, prompts: Sequence[EncodedPrompt]) -> Reward:
    """The reward of moves on boards, both sides played by the world's policy as it is when it is asked. Its
    random numbers come from the moves: the same moves of the same policy are always worth the same."""
    by_board = {read_board(prompt.prompt.row["board"]): prompt for prompt in prompts}

    def rewards(rollouts: list[Rollout]) -> list[float]:
        moves_made = zlib.crc32(repr([rollout.input_ids for rollout in rollouts]).encode())

        def sample(boards: Sequence[str], number: int) -> list[list[int | None]]:
            asked = [by_board[board] for board in boards]
            cells = [move_of(rollout) for rollout in world.play(asked, LINES, 6, moves_made, number)]
            return [cells[i : i + LINES] for i in range(0, len(cells), LINES)]

        return move_rewards(rollouts, sample)

    return Reward("self-play", 1.0, rewards)


def play_figures(world: World, prompts: Sequence[EncodedPrompt]) -> Metrics:
    """How the policy's most probable moves fare against each fixed opponent, from both sides: lines of play
    that are lost (`lost:NAME`, of which `illegal:NAME` by a move that is not allowed), and the chances to win
    and to lose (`p_won:NAME`, `p_lost:NAME`, the mean of both sides). `validation` is the share of all lines
    that is lost."""
    greedy = SamplingParams(temperature=0.0, max_tokens=world.settings.max_tokens)
    how = (world.eos_ids, world.decode_rows, world.compute_dtype, world.tokenizer)
    made = roll_out_of(world.policy, *how, prompts, greedy)
    cells = {read_board(rollout.row["board"]): move_of(rollout) for rollout in made}
    figures: Metrics = {}
    lost = games = 0
    for name, opponent in PLAYERS.items():
        sides = [asdict(policy_lines(cells.get, opponent, side)) for side in "XO"]
        for key in ("lost", "illegal"):
            figures[f"validation_{key}:{name}"] = float(sum(ends[key] for ends in sides))
        for key in ("p_won", "p_lost"):
            figures[f"validation_{key}:{name}"] = sum(ends[key] for ends in sides) / 2
        lost += sum(ends["lost"] for ends in sides)
        games += sum(ends[key] for ends in sides for key in ("won", "drawn", "lost"))
    return {"validation": lost / games, **figures}
