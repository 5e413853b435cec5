"""Tic-tac-toe against numbers from outside: positions, games, chances of random play, perfect play."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import pytest

from fledge.errors import UserError
from fledge.tasks.games import is_test_board, recorded_game, tictactoe_task
from fledge.tasks.lines import Lines, all_lines, policy_lines
from fledge.tasks.tictactoe import (
    EMPTY,
    PLAYERS,
    best_moves,
    canonical,
    depth_2_player,
    mover,
    moves,
    play,
    positions,
    random_player,
    read_board,
    read_move,
    show,
    show_cells,
    value,
    weak_player,
    winner,
)


def test_positions_and_symmetries() -> None:
    """5,478 positions, 765 but for turns and mirrors; 958 of them finished, 626 won by X, 316 by O."""
    boards = positions()
    assert len(boards) == len(set(boards)) == 5478
    assert len({canonical(board) for board in boards}) == 765
    ends = [winner(board) for board in boards if not moves(board)]
    assert (len(ends), ends.count("X"), ends.count("O")) == (958, 626, 316)


def test_all_games() -> None:
    """255,168 games: X wins 131,184, O 77,904, 46,080 are drawn; X wins 737/1260 of random ones."""
    lines = all_lines(random_player, random_player, "X")
    assert (lines.games, lines.won, lines.lost, lines.drawn) == (255_168, 131_184, 77_904, 46_080)
    assert lines.p_won == pytest.approx(float(Fraction(737, 1260)))
    assert lines.p_lost == pytest.approx(float(Fraction(121, 420)))
    assert lines.p_drawn == pytest.approx(float(Fraction(8, 63)))
    other = all_lines(random_player, random_player, "O")
    assert (other.won, other.lost, other.drawn) == (lines.lost, lines.won, lines.drawn)


@pytest.mark.parametrize("side", "XO")
@pytest.mark.parametrize("opponent", PLAYERS)
@pytest.mark.parametrize("choice", [0, -1])
def test_perfect_play_never_loses(opponent: str, side: str, choice: int) -> None:
    """By any of the best moves, against whatever the opponent may do."""
    lines = policy_lines(lambda board: best_moves(board)[choice], PLAYERS[opponent], side)
    assert (lines.lost, lines.illegal, lines.p_lost) == (0, 0, 0.0)
    assert lines.p_won + lines.p_drawn == pytest.approx(1.0)
    if opponent == "minimax":
        assert lines.won == 0


def by_hand(policy: dict[str, int], opponent: str, side: str) -> Lines:
    """Follow the lines one by one, without remembering positions."""
    ends = {"won": 0, "drawn": 0, "lost": 0, "illegal": 0}

    def follow(board: str) -> None:
        if winner(board):
            ends["won" if winner(board) == side else "lost"] += 1
        elif "." not in board:
            ends["drawn"] += 1
        elif mover(board) == side:
            if policy[board] in moves(board):
                follow(play(board, policy[board]))
            else:
                ends["lost"] += 1
                ends["illegal"] += 1
        else:
            for cell in PLAYERS[opponent](board):
                follow(play(board, cell))

    follow(EMPTY)
    return Lines(**ends)


@pytest.mark.parametrize(("opponent", "side"), list(itertools.product(PLAYERS, "XO")))
def test_lines_of_a_careless_policy_are_those_of_a_plain_walk(opponent: str, side: str) -> None:
    rng = random.Random(f"{opponent}{side}")
    policy = {board: rng.randint(1, 9) for board in positions()}
    lines, walked = policy_lines(policy.get, PLAYERS[opponent], side), by_hand(policy, opponent, side)
    assert (lines.won, lines.drawn, lines.lost, lines.illegal) == (
        walked.won,
        walked.drawn,
        walked.lost,
        walked.illegal,
    )
    assert lines.p_won + lines.p_drawn + lines.p_lost == pytest.approx(1.0)
    assert lines.illegal > 0


def test_a_policy_that_says_nothing_loses_at_its_first_move() -> None:
    lines = policy_lines(lambda board: None, random_player, "O")
    assert (lines.games, lines.lost, lines.illegal, lines.p_lost) == (9, 9, 9, pytest.approx(1.0))


def test_values_by_hand() -> None:
    assert value(EMPTY) == 0
    assert value("XX.OO....") == 1
    assert best_moves("XX.OO....") == (3,)
    assert value("XX.O.....") == -1  # O blocks at 3, and X at 5 has two ways to win
    assert best_moves("X...O...X") == (2, 4, 6, 8)


def test_players_by_hand() -> None:
    board = "XX.O.O..."
    assert set(weak_player(board)) == set(depth_2_player(board)) == {3}
    board = "XX..O...."
    assert set(weak_player(board)) == set(moves(board))
    assert set(depth_2_player(board)) == {3}
    for player in PLAYERS.values():
        for board in positions()[:500]:
            if moves(board):
                assert sum(player(board).values()) == pytest.approx(1.0)
                assert set(player(board)) <= set(moves(board))


@pytest.mark.parametrize("board", positions()[::97])
def test_a_board_is_read_back(board: str) -> None:
    assert read_board(show(board)) == read_board(board) == read_board(show(board)[:-2]) == board
    assert read_board(show_cells(board)) == board


def test_a_board_as_cells_is_seen_by_the_mover() -> None:
    assert show_cells(EMPTY) == "+-"
    assert show_cells("X.O.X....") == "+3-15"  # O moves
    assert show_cells("X.O.X...O") == "+15-39"
    task = tictactoe_task(0, train=3, test=3, games=3, notation="cells")
    for row in [*task.prompts, *task.test]:
        assert read_board(row["prompt"]) == read_board(row["board"]) and row["prompt"][0] == "+"
    for line in task.sft:
        assert line["messages"][1]["content"] not in line["messages"][0]["content"], "a free cell"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "X",
        "+11-2",
        "+1-1",
        "+12-3",
        "+1-234",
        "+0-1",
        "x......../",
        "XX.......",
        "O........",
        "X.O/.X./..O O",
        "X.O/.X./..O X X",
        "XOX.O.X.O.",
    ],
)
def test_what_is_no_board(text: str) -> None:
    with pytest.raises(UserError, match=r"board|in turn"):
        read_board(text)


@pytest.mark.parametrize(
    ("text", "cell"),
    [("7", 7), (" 7\n", 7), ("0", None), ("77", None), ("7.", None), ("\u0667", None), ("7 8", None)],
)
def test_a_move_is_one_digit_and_nothing_else(text: str, cell: int | None) -> None:
    assert read_move(text) == cell


def test_a_move_that_is_not_allowed_is_an_error() -> None:
    for board, cell in (("X........", 1), ("XXXOO....", 9), (EMPTY, 0), (EMPTY, 10)):
        with pytest.raises(ValueError, match="is no move"):
            play(board, cell)


def test_the_files_split_boards_by_symmetry() -> None:
    task = tictactoe_task(0, train=None, test=None, games=30)
    train, test = (
        {canonical(read_board(row["board"])) for row in rows} for rows in (task.prompts, task.test)
    )
    assert len(task.prompts) + len(task.test) == 4520
    assert not train & test
    shown = {canonical(read_board(line["messages"][0]["content"])) for line in task.sft}
    assert shown <= train
    assert canonical(EMPTY) in train  # where every game begins


@pytest.mark.parametrize("name", PLAYERS)
def test_recorded_games_are_games(name: str) -> None:
    rng = random.Random(0)
    for _ in range(30):
        board = EMPTY
        for shown, cell in recorded_game(PLAYERS[name], rng):
            assert shown == board
            assert cell in PLAYERS[name](board)
            board = play(board, cell)
        assert not moves(board)
        if name == "minimax":
            assert winner(board) is None


def test_texts_are_games_without_test_boards() -> None:
    task = tictactoe_task(0, train=1, test=1, games=50)
    lines = [line for row in task.text for line in row["text"].split("\n")]
    assert lines == [" ".join(message["content"] for message in row["messages"]) for row in task.sft]
    for line in lines:
        board = read_board(line[:-2])
        assert not is_test_board(board)
        assert int(line[-1]) in weak_player(board)
