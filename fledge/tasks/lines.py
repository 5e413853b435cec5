"""Every line of play of tic-tac-toe: how many end won, drawn and lost against an opponent, and how likely."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fledge.tasks.tictactoe import EMPTY, Player, mover, moves, play, winner

# What a deterministic player does: a board to a cell, or None where it names none.
Policy = Callable[[str], int | None]


@dataclass(frozen=True)
class Lines:
    """Ends of games, as the player sees them: how many lines, and with which probability.

    A line ends, lost, where the player makes no legal move; `illegal` of the lost ones ended so.
    """

    won: int = 0
    drawn: int = 0
    lost: int = 0
    illegal: int = 0
    p_won: float = 0.0
    p_drawn: float = 0.0
    p_lost: float = 0.0

    @property
    def games(self) -> int:
        """All lines."""
        return self.won + self.drawn + self.lost

    def joined(self, other: Lines, probability: float) -> Lines:
        """With those of a move that has a probability."""
        return Lines(
            self.won + other.won,
            self.drawn + other.drawn,
            self.lost + other.lost,
            self.illegal + other.illegal,
            self.p_won + probability * other.p_won,
            self.p_drawn + probability * other.p_drawn,
            self.p_lost + probability * other.p_lost,
        )


def all_lines(player: Player, opponent: Player, side: str) -> Lines:
    """Follow every move that both may choose, from the empty board; `side` (X or O) is the player's."""
    known: dict[str, Lines] = {}

    def follow(board: str) -> Lines:
        if board not in known:
            known[board] = _end(board, side) or _branches(board)
        return known[board]

    def _branches(board: str) -> Lines:
        choices = (player if mover(board) == side else opponent)(board)
        total = Lines()
        for cell, probability in choices.items():
            total = total.joined(follow(play(board, cell)) if cell in moves(board) else _ILLEGAL, probability)
        return total

    return follow(EMPTY)


def policy_lines(policy: Policy, opponent: Player, side: str) -> Lines:
    """`all_lines` of a deterministic policy, which is asked once for each board that it meets. No cell, or
    one that is not free, loses the game."""
    return all_lines(lambda board: {policy(board) or 0: 1.0}, opponent, side)


_ILLEGAL = Lines(lost=1, illegal=1, p_lost=1.0)


def _end(board: str, side: str) -> Lines | None:
    if won := winner(board):
        return Lines(won=1, p_won=1.0) if won == side else Lines(lost=1, p_lost=1.0)
    return None if moves(board) else Lines(drawn=1, p_drawn=1.0)
