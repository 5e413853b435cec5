"""Files for tic-tac-toe: boards to move on, and the recorded games of a player against itself."""

from __future__ import annotations

import random

from fledge.tasks.files import Task, conversation, is_test
from fledge.tasks.tictactoe import (
    EMPTY,
    NOTATIONS,
    PLAYERS,
    Player,
    canonical,
    moves,
    play,
    positions,
    show,
)


def tictactoe_task(
    seed: int,
    train: int | None,
    test: int | None,
    games: int,
    player: str = "weak",
    notation: str = "rows",
) -> Task:
    """Boards on which a game goes on: `train` prompts and `test` test questions (None: all, 4,520 together),
    split so that no test board is a training board turned or mirrored; `games` games in which one of
    `PLAYERS` plays both sides, as conversations (board, move) and as texts (a game each, a line for each
    move). Moves on test boards are left out of both. Prompts are boards in one of `NOTATIONS`."""
    write = NOTATIONS[notation]
    boards = [board for board in positions() if moves(board)]
    parts: dict[bool, list[str]] = {False: [], True: []}
    for board in boards:
        parts[is_test_board(board)].append(board)
    for part, purpose in ((parts[False], "prompts"), (parts[True], "tests")):
        random.Random(f"{seed} {purpose}").shuffle(part)
    rng = random.Random(f"{seed} games")
    recorded = [
        [
            (write(board), str(cell))
            for board, cell in recorded_game(PLAYERS[player], rng)
            if not is_test_board(board)
        ]
        for _ in range(games)
    ]
    return Task(
        "tictactoe",
        "tictactoe",
        {"seed": seed, "games": games, "player": player, "notation": notation},
        sft=[conversation(*pair) for game in recorded for pair in game],
        text=[{"text": "\n".join(" ".join(pair) for pair in game)} for game in recorded if game],
        prompts=[{"prompt": write(board), "board": show(board)} for board in parts[False][:train]],
        test=[{"prompt": write(board), "board": show(board)} for board in parts[True][:test]],
    )


def is_test_board(board: str) -> bool:
    """Whether a board is for tests; the same for all that are equal but for turns and mirrors."""
    return is_test(canonical(board))


def recorded_game(player: Player, rng: random.Random) -> list[tuple[str, int]]:
    """A game of a player against itself: boards and moves."""
    board, game = EMPTY, []
    while moves(board):
        choices = player(board)
        cell = rng.choices(list(choices), list(choices.values()))[0]
        game.append((board, cell))
        board = play(board, cell)
    return game
