"""`fledge task`: writes the files of a task that a program can check, and checks what a model made of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from fledge.config import check_at_least
from fledge.device import DeviceName, pick_device
from fledge.engine.text import LocalChat, load_engine
from fledge.errors import UserError
from fledge.evals.facts import Share
from fledge.files import read_jsonl, write_json
from fledge.rewards.verifiers import Reward, highest, read_rewards, weighted_sum
from fledge.tasks.addition import addition_task
from fledge.tasks.countdown import MIN_TARGET, countdown_task
from fledge.tasks.files import Task, write_task
from fledge.tasks.games import is_test_board, tictactoe_task
from fledge.tasks.lines import policy_lines
from fledge.tasks.tictactoe import NOTATIONS, PLAYERS, best_moves, moves, positions, read_move
from fledge.train.progress import say
from fledge.types import Rollout, SamplingParams

Notation = Literal["rows", "cells"]


@dataclass(frozen=True, kw_only=True)
class AdditionConfig:
    """Write reversed addition: 123+456= is answered by the sum's digits from the last to the first, 975."""

    out: Path = Path("runs/addition")
    """New directory: sft.jsonl, text.jsonl, prompts.jsonl, test.jsonl, manifest.json."""
    train: int = 10_000
    """Prompts to practise on, with their answers."""
    test: int = 500
    """Test questions, none of which is in another file."""
    starter: int = 2_000
    """Worked examples as conversations."""
    text: int = 10_000
    """Worked examples as plain text, for pretraining."""
    digits: int = 3
    """Digits of the numbers that are added."""
    steps: bool = True
    """Work each digit out before the answer; without, examples are answers alone."""
    seed: int = 0
    """The same seed and settings give the same bytes."""
    overwrite: bool = False
    """Replace the task that --out holds."""


def addition(config: AdditionConfig) -> None:
    """Write the task and say how it is used."""
    check_at_least(config, 0, "seed", "starter", "text")
    check_at_least(config, 1, "train", "test", "digits")
    if config.digits > 18:
        raise UserError(f"--digits {config.digits}: must be at most 18")
    _write(config.out, config.overwrite, addition_task(**_settings(config)))


@dataclass(frozen=True, kw_only=True)
class CountdownConfig:
    """Write Countdown: make a target of some numbers with + - * /, each once; examples show the search."""

    out: Path = Path("runs/countdown")
    """New directory: sft.jsonl, text.jsonl, prompts.jsonl, test.jsonl, manifest.json."""
    train: int = 5_000
    """Prompts to practise on, with numbers and target."""
    test: int = 500
    """Test questions, none of which is in another file."""
    starter: int = 2_000
    """Worked examples as conversations."""
    text: int = 5_000
    """Worked examples as plain text, for pretraining."""
    numbers: tuple[int, ...] = (3, 4)
    """How many numbers a problem has; of several each is as likely."""
    largest: int = 20
    """Largest number."""
    max_target: int = 99
    """Largest target; the smallest is 10."""
    trace_lines: int = 16
    """Longest search that an example shows, with its solution."""
    steps: bool = True
    """Show the search before the answer; without, examples are expressions alone."""
    seed: int = 0
    """The same seed and settings give the same bytes."""
    overwrite: bool = False
    """Replace the task that --out holds."""


def countdown(config: CountdownConfig) -> None:
    """Write the task and say how it is used."""
    check_at_least(config, 0, "seed", "starter", "text")
    check_at_least(config, 1, "train", "test", "largest")
    check_at_least(config, MIN_TARGET, "max_target")
    if not config.numbers or not all(2 <= count <= 6 for count in config.numbers):
        raise UserError(f"--numbers {' '.join(map(str, config.numbers))}: each must be from 2 to 6")
    check_at_least(config, max(config.numbers), "trace_lines")
    _write(config.out, config.overwrite, countdown_task(**_settings(config)))


@dataclass(frozen=True, kw_only=True)
class TictactoeConfig:
    """Write tic-tac-toe: boards to answer with a cell, and recorded games."""

    out: Path = Path("runs/tictactoe")
    """New directory: sft.jsonl, text.jsonl, prompts.jsonl, test.jsonl, manifest.json."""
    train: int | None = None
    """Boards to practise on; by default all that are not for tests."""
    test: int | None = None
    """Test boards; by default all, a tenth, none of which is turned or mirrored elsewhere."""
    games: int = 2_000
    """Recorded games, as conversations and as plain text."""
    player: Literal["random", "weak", "depth-2", "minimax"] = "weak"
    """Who plays them, both sides: weak wins where it can at once and otherwise moves at random."""
    notation: Notation = "rows"
    """How prompts write a board: rows as X.O/.X./..O X, or cells as +15-39, the mover's and the other's."""
    seed: int = 0
    """The same seed and settings give the same bytes."""
    overwrite: bool = False
    """Replace the task that --out holds."""


def tictactoe(config: TictactoeConfig) -> None:
    """Write the task and say how it is used."""
    check_at_least(config, 0, "seed", "games")
    check_at_least(config, 1, "train", "test")
    _write(config.out, config.overwrite, tictactoe_task(**_settings(config)))


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Verify completions that `fledge generate --batch` wrote: how many are right."""

    data: Path
    """JSONL file of rows with "completions" and what the reward compares with."""
    reward: tuple[str, ...]
    """What is right, as in exact or number:tolerance=0.01; several are summed, each with a weight: 0.9*x."""
    right_from: float | None = None
    """Reward from which a completion is right; by default the most that verifiers give."""
    out: Path | None = None
    """File for the figures, as JSON."""
    examples: int = 0
    """How many completions that are not right to show."""


def check(config: CheckConfig) -> None:
    """Print the mean reward, and the shares of right completions and of prompts with a right one, where it is
    known what is right."""
    check_at_least(config, 0, "examples")
    if config.out is not None and config.out.exists():
        raise UserError(f"{config.out}: exists already; choose another --out")
    rewards_read = read_rewards(config.reward)
    groups = [_rollouts(f"{config.data}:{number}", row) for number, row in read_jsonl(config.data)]
    rollouts = [rollout for group in groups for rollout in group]
    if not rollouts:
        raise UserError(f"{config.data}: holds no completions")
    rewards = weighted_sum(rewards_read)(rollouts)
    best = _right_from(config, rewards_read)
    left = iter(rewards)
    by_prompt = [[next(left) for _ in group] for group in groups]
    summary: dict[str, Any] = {
        "reward": list(config.reward),
        "mean_reward": sum(rewards) / len(rewards),
        "highest_reward": max(rewards),
        "cut_off": sum(not rollout.ended for rollout in rollouts),
    }
    if best is not None:
        right = [[reward >= best for reward in group] for group in by_prompt]
        summary["right"] = Share(sum(map(sum, right)), len(rollouts)).as_dict()
        summary["prompts_with_a_right_one"] = Share(sum(map(any, right)), len(groups)).as_dict()
    if config.out is not None:
        write_json(config.out, summary)
    console = Console()
    least = max(rewards) if best is None else best
    wrong = [pair for pair in zip(rollouts, rewards, strict=True) if pair[1] < least]
    for rollout, reward in wrong[: config.examples]:
        say(console, f"--- {rollout.where}, reward {reward:g}\n{rollout.completion}")
    say(console, f"{len(rollouts):,} completions of {len(groups):,} prompts, {summary['cut_off']:,} cut off")
    say(console, f"mean reward:              {summary['mean_reward']:.4f}")
    if best is None:
        say(console, f"highest reward:           {max(rewards):g} (--right-from: from which one is right)")
        return
    say(console, f"right:                    {_percent(summary['right'])}")
    say(console, f"prompts with a right one: {_percent(summary['prompts_with_a_right_one'])}")


def _right_from(config: CheckConfig, rewards: Sequence[Reward]) -> float | None:
    """The reward from which a completion is right; None where a function's highest is not known."""
    most = highest(rewards) if config.right_from is None else config.right_from
    return None if most is None else most - 1e-9


@dataclass(frozen=True, kw_only=True)
class PlayConfig:
    """Let a model play tic-tac-toe: every line of play against four opponents, from both sides."""

    model: Path
    """Model directory."""
    out: Path | None = None
    """File for the figures, as JSON."""
    max_tokens: int = 8
    """Longest answer to a board, which is to be the move's cell alone. Decoding is greedy."""
    notation: Notation = "rows"
    """How the model reads a board, as of fledge task tictactoe."""
    batch_size: int = 256
    """Boards answered at once."""
    device: DeviceName = "auto"
    """Where to run."""


def play(config: PlayConfig) -> None:
    """Ask for a move on every board, then follow all that each opponent may do."""
    check_at_least(config, 1, "max_tokens", "batch_size")
    if config.out is not None and config.out.exists():
        raise UserError(f"{config.out}: exists already; choose another --out")
    device = pick_device(config.device)
    chat = LocalChat(*load_engine(config.model, device=device, batch_size=config.batch_size))
    policy = moves_of(chat, config.max_tokens, NOTATIONS[config.notation])
    boards = [board for board in positions() if moves(board)]
    tests = [board for board in boards if is_test_board(board)]
    summary: dict[str, Any] = {
        "model": str(config.model),
        "best_moves": _share(policy, boards, best_moves),
        "best_moves_on_test_boards": _share(policy, tests, best_moves),
        "legal_moves": _share(policy, boards, moves),
        "lines": {
            name: {side: asdict(policy_lines(policy.get, player, side)) for side in "XO"}
            for name, player in PLAYERS.items()
        },
    }
    if config.out is not None:
        write_json(config.out, summary)
    console = Console()
    table = Table(
        "opponent", "model is", "lines won", "drawn", "lost", "of those illegal", "won, drawn, lost"
    )
    for name, sides in summary["lines"].items():
        for side, ends in sides.items():
            counts = [f"{ends[end]:,}" for end in ("won", "drawn", "lost", "illegal")]
            likely = " ".join(f"{ends[f'p_{end}']:.1%}" for end in ("won", "drawn", "lost"))
            table.add_row(name, side, *counts, likely)
    console.print(table)
    for name in ("best_moves", "best_moves_on_test_boards", "legal_moves"):
        say(console, f"{name.replace('_', ' ')}: {_percent(summary[name])} of {summary[name]['n']:,}")


def _settings(config: Any) -> dict[str, Any]:
    """What the task is made with."""
    return {name: value for name, value in asdict(config).items() if name not in ("out", "overwrite")}


def _write(out: Path, overwrite: bool, task: Task) -> None:
    manifest = write_task(out, task, overwrite)
    table = Table("file", "rows")
    for name, rows in manifest["rows"].items():
        table.add_row(name, f"{rows:,}")
    console = Console(stderr=True)
    console.print(table)
    say(console, f"task:   {out}\nreward: {task.reward}")


def _rollouts(where: str, row: dict[str, Any]) -> list[Rollout]:
    """The completions of a row as `fledge generate --batch` writes them; none where it wrote an error."""
    made = row.get("completions", [] if "error" in row else None)
    if not isinstance(made, list) or not all(
        isinstance(one, dict) and isinstance(one.get("text"), str) for one in made
    ):
        raise UserError(f'{where}: no list "completions" as `fledge generate --batch` writes it')
    return [
        Rollout([], [], [], row, [], one["text"], one.get("finish_reason", "stop") == "stop", where)
        for one in made
    ]


def moves_of(chat: LocalChat, max_tokens: int, write: Callable[[str], str]) -> dict[str, int]:
    """A model's greedy move on every board on which a game goes on; none where it names no cell."""
    boards = [board for board in positions() if moves(board)]
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    replies = chat.replies([[{"role": "user", "content": write(board)}] for board in boards], params)
    named = {
        board: read_move(reply.text) if reply.finish_reason == "stop" else None
        for board, reply in zip(boards, replies, strict=True)
    }
    return {board: cell for board, cell in named.items() if cell is not None}


def _share(
    policy: dict[str, int], boards: list[str], good: Callable[[str], tuple[int, ...]]
) -> dict[str, Any]:
    return Share(sum(policy.get(board) in good(board) for board in boards), len(boards)).as_dict()


def _percent(share: dict[str, Any]) -> str:
    return f"{share['rate']:.1%} ({share['low']:.1%}-{share['high']:.1%})"


ACTIONS = {
    "addition": (AdditionConfig, addition),
    "countdown": (CountdownConfig, countdown),
    "tictactoe": (TictactoeConfig, tictactoe),
    "check": (CheckConfig, check),
    "play": (PlayConfig, play),
}
