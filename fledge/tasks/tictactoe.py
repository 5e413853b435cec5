"""Tic-tac-toe: rules, the value of every position, and opponents.

A board is 9 characters, row by row: `X`, `O` and `.` for an empty cell; X begins. Cells are numbered 1 to 9.
As text it is written in rows (`show`), parted by slashes, and whose move it is follows: `X.O/.X./..O X`; or
as cells (`show_cells`), first the mover's, then the other's: `+15-39`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, lru_cache

from fledge.errors import UserError

EMPTY = "........."
LINES = ((1, 2, 3), (4, 5, 6), (7, 8, 9), (1, 4, 7), (2, 5, 8), (3, 6, 9), (1, 5, 9), (3, 5, 7))
# Where each cell of a turned or mirrored board comes from: the eight symmetries of a square.
_TURNED, _MIRRORED = (6, 3, 0, 7, 4, 1, 8, 5, 2), (2, 1, 0, 5, 4, 3, 8, 7, 6)


def show(board: str) -> str:
    """A board as a model reads it: `X.O/.X./..O X`."""
    return f"{board[:3]}/{board[3:6]}/{board[6:]} {mover(board)}"


def show_cells(board: str) -> str:
    """A board as the mover's cells and the other's, which are the digits that a move is: `+15-39`."""
    own = mover(board)
    cells = [(str(cell), mark) for cell, mark in enumerate(board, start=1) if mark != "."]
    mine, others = (
        "".join(cell for cell, mark in cells if (mark == own) is is_own) for is_own in (True, False)
    )
    return f"+{mine}-{others}"


NOTATIONS: dict[str, Callable[[str], str]] = {"rows": show, "cells": show_cells}


def read_board(text: str) -> str:
    """The board of a text as one of `NOTATIONS` writes it; of rows, slashes and mover may be missing. Raises
    UserError for another text, or for marks that no game can have."""
    if found := re.fullmatch(r"\+([1-9]*)-([1-9]*)", text.strip()):
        return _of_cells(text, *found.groups())
    board, _, named = text.strip().partition(" ")
    board = board.replace("/", "")
    if len(board) != 9 or set(board) - set("XO."):
        raise UserError(f"{text!r} is no board; write one as X.O/.X./..O, row by row")
    if board.count("X") - board.count("O") not in (0, 1) or named not in ("", mover(board)):
        raise UserError(f"{text!r}: X and O move in turn, and X begins")
    return board


def _of_cells(text: str, mine: str, others: str) -> str:
    if len(set(mine + others)) < len(mine + others) or len(others) - len(mine) not in (0, 1):
        raise UserError(
            f"{text!r} is no board; each cell is one side's, and the mover has as many or one less"
        )
    marks = dict.fromkeys(mine, "X" if len(mine) == len(others) else "O")
    marks |= dict.fromkeys(others, "O" if len(mine) == len(others) else "X")
    return "".join(marks.get(str(cell), ".") for cell in range(1, 10))


def read_move(text: str) -> int | None:
    """The cell that a text names, 1 to 9 and nothing else; None for another text."""
    bare = text.strip(" \t\r\n")
    return int(bare) if re.fullmatch("[1-9]", bare) else None


def mover(board: str) -> str:
    """Whose move it is: X or O."""
    return "X" if board.count("X") == board.count("O") else "O"


@cache
def winner(board: str) -> str | None:
    """Who has three in a row, if anybody has."""
    for a, b, c in LINES:
        if board[a - 1] != "." and board[a - 1] == board[b - 1] == board[c - 1]:
            return board[a - 1]
    return None


def moves(board: str) -> tuple[int, ...]:
    """The cells that the mover may take; none when the game is over."""
    if winner(board):
        return ()
    return tuple(cell for cell in range(1, 10) if board[cell - 1] == ".")


def play(board: str, cell: int) -> str:
    """The board after a move. Raises ValueError for one that the rules do not allow."""
    if cell not in moves(board):
        raise ValueError(f"{cell} is no move on {show(board)}")
    return board[: cell - 1] + mover(board) + board[cell:]


@cache
def value(board: str) -> int:
    """What the mover gets when both play perfectly: 1 a win, 0 a draw, -1 a loss (minimax)."""
    if winner(board):
        return -1
    return max((-value(play(board, cell)) for cell in moves(board)), default=0)


def best_moves(board: str) -> tuple[int, ...]:
    """The moves that keep the value of the position."""
    return tuple(cell for cell in moves(board) if -value(play(board, cell)) == value(board))


@lru_cache(maxsize=1)
def positions() -> tuple[str, ...]:
    """Every board that a game can come to, finished ones too, by the number of marks: 5,478."""
    found = {EMPTY: None}
    waiting = [EMPTY]
    for board in waiting:  # grows as it is read
        for cell in moves(board):
            after = play(board, cell)
            if after not in found:
                found[after] = None
                waiting.append(after)
    return tuple(found)


def canonical(board: str) -> str:
    """The first in the alphabet of the eight boards that are the same but for turns and mirrors."""
    boards = []
    for _ in range(4):
        board = "".join(board[i] for i in _TURNED)
        boards += [board, "".join(board[i] for i in _MIRRORED)]
    return min(boards)


# A player: the moves that it may choose on a board, with their probabilities.
Player = Callable[[str], dict[int, float]]


def _even(cells: tuple[int, ...] | list[int]) -> dict[int, float]:
    return {cell: 1 / len(cells) for cell in cells}


def random_player(board: str) -> dict[int, float]:
    """Any move, all alike."""
    return _even(moves(board))


def weak_player(board: str) -> dict[int, float]:
    """Wins if it can at once, else any move: it never looks at what the other may do. The recorded one."""
    return _even(_winning(board) or moves(board))


def depth_2_player(board: str) -> dict[int, float]:
    """Looks two moves ahead: wins if it can at once, else leaves the other no win at once if it can, else any
    move."""
    if winning := _winning(board):
        return _even(winning)
    return _even([cell for cell in moves(board) if not _winning(play(board, cell))] or moves(board))


def minimax_player(board: str) -> dict[int, float]:
    """Any of the best moves."""
    return _even(best_moves(board))


PLAYERS: dict[str, Player] = {
    "random": random_player,
    "weak": weak_player,
    "depth-2": depth_2_player,
    "minimax": minimax_player,
}


def _winning(board: str) -> list[int]:
    return [cell for cell in moves(board) if winner(play(board, cell))]
