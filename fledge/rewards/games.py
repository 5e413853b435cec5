"""The verifier for moves of a game: legal, and as good as the best."""

from __future__ import annotations

from fractions import Fraction

from fledge.errors import UserError
from fledge.rewards.matching import Row, Verifier, needed
from fledge.tasks.tictactoe import best_moves, moves, read_board, read_move


def tictactoe(*, legal: Fraction = Fraction(0)) -> Verifier:
    """1 if the text is the number (1 to 9) of a cell that keeps what the row's `board` is worth to the side
    that moves: wins where a win can be forced, else draws where a draw can. `legal`: the reward of any other
    move that the rules allow.

    A board is written as in `X.O/.X./..O`; where nothing can be saved every legal move is best.
    """

    def verify(text: str, row: Row) -> float:
        shown = needed(row, "board")
        board = read_board(shown) if isinstance(shown, str) else ""
        if not board or not moves(board):
            raise UserError(f'the field "board" must be a board on which the game goes on, not {shown!r}')
        cell = read_move(text)
        return 1.0 if cell in best_moves(board) else float(legal) if cell in moves(board) else 0.0

    return verify
