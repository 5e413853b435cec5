"""Files for tic-tac-toe: boards to move on, and the recorded games of a weak player."""

from __future__ import annotations

import random

from fledge.tasks.files import Task, conversation, is_test
from fledge.tasks.tictactoe import EMPTY, canonical, moves, play, positions, show, weak_player


def tictactoe_task(seed: int, train: int | None, test: int | None, games: int) -> Task:
    """Boards on which a game goes on: `train` prompts and `test` test questions (None: all, 4,520 together),
    split so that no test board is a training board turned or mirrored; `games` games in which a weak player
    plays both sides, as conversations (board, move) and as texts (a game each, a line for each move). Moves
    on test boards are left out of both."""
    boards = [board for board in positions() if moves(board)]
    parts: dict[bool, list[str]] = {False: [], True: []}
    for board in boards:
        parts[is_test_board(board)].append(board)
    for part, purpose in ((parts[False], "prompts"), (parts[True], "tests")):
        random.Random(f"{seed} {purpose}").shuffle(part)
    rng = random.Random(f"{seed} games")
    recorded = [
        [(show(board), str(cell)) for board, cell in weak_game(rng) if not is_test_board(board)]
        for _ in range(games)
    ]
    return Task(
        "tictactoe",
        "tictactoe",
        {"seed": seed, "games": games},
        sft=[conversation(*pair) for game in recorded for pair in game],
        text=[{"text": "\n".join(" ".join(pair) for pair in game)} for game in recorded if game],
        prompts=[_row(board) for board in parts[False][:train]],
        test=[_row(board) for board in parts[True][:test]],
    )


def is_test_board(board: str) -> bool:
    """Whether a board is for tests; the same for all that are equal but for turns and mirrors."""
    return is_test(canonical(board))


def weak_game(rng: random.Random) -> list[tuple[str, int]]:
    """A game of the weak player against itself: boards and moves."""
    board, game = EMPTY, []
    while moves(board):
        choices = weak_player(board)
        cell = rng.choices(list(choices), list(choices.values()))[0]
        game.append((board, cell))
        board = play(board, cell)
    return game


def _row(board: str) -> dict[str, str]:
    return {"prompt": show(board), "board": show(board)}
