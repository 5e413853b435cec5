"""Small tasks for the tests, made from a seed."""

from __future__ import annotations

from collections.abc import Callable

from fledge.tasks.addition import addition_task
from fledge.tasks.countdown import countdown_task
from fledge.tasks.files import Task
from fledge.tasks.games import tictactoe_task

TASKS: dict[str, Callable[[int], Task]] = {
    "addition": lambda seed: addition_task(seed, train=200, test=50, starter=60, text=80),
    "countdown": lambda seed: countdown_task(seed, train=200, test=50, starter=60, text=80),
    "tictactoe": lambda seed: tictactoe_task(seed, train=200, test=50, games=10),
}
