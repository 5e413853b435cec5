"""How long a run is to be, and after which of its steps it saves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fledge.config import Dataclass
from fledge.errors import UserError
from fledge.files import read_json, write_json
from fledge.run import Run
from fledge.train.parallel import Ranks
from fledge.train.schedule import warmup_stable_decay
from fledge.train.steps import Metrics


@dataclass(frozen=True)
class FitConfig:
    """What the loop itself needs to know."""

    label: str
    total_steps: int | None
    """None: from `minutes`, measured once and then frozen."""
    minutes: float | None = None
    most_steps: int | None = None
    """A limit of the data to what `minutes` would allow."""
    warmup_steps: int = 20
    decay_share: float = 0.4
    max_grad_norm: float = 1.0
    max_spike: float = 3.0
    """Nats above the running mean at which a loss counts as a spike."""
    evaluations: int = 8
    """How many times to save and evaluate, evenly spread; the last is at the end."""
    keep_checkpoints: int = 2
    compute_dtype: torch.dtype = torch.float32
    compile: bool = False
    validation_unit: str = "bits per byte"

    @classmethod
    def of(cls, settings: Dataclass, **own: Any) -> FitConfig:
        """From a stage's settings: those that every stage has, by their names, and what is its `own`."""
        common = ("warmup_steps", "decay_share", "max_spike", "evaluations", "keep_checkpoints")
        return cls(**{name: getattr(settings, name) for name in common}, **own)

    def __post_init__(self) -> None:
        """Raises UserError on settings that make no sense, by the names of their flags."""
        for name, value, good, rule in (
            ("minutes", self.minutes, self.minutes is None or self.minutes > 0, "above 0"),
            ("warmup-steps", self.warmup_steps, self.warmup_steps >= 0, "at least 0"),
            ("decay-share", self.decay_share, 0 <= self.decay_share <= 1, "from 0 to 1"),
            ("max-spike", self.max_spike, self.max_spike > 0, "above 0"),
            ("evaluations", self.evaluations, self.evaluations >= 1, "at least 1"),
            ("keep-checkpoints", self.keep_checkpoints, self.keep_checkpoints >= 1, "at least 1"),
        ):
            if not good:
                raise UserError(f"--{name} {value}: must be {rule}")

    @property
    def execution(self) -> str:
        """How it is computed, in words."""
        return f"{str(self.compute_dtype).removeprefix('torch.')}, {'compiled' if self.compile else 'eager'}"


class RunPlan:
    """How many steps there will be, and after which of them to save."""

    CALIBRATE_SECONDS = 45.0  # or 15% of the budget, whichever is sooner

    def __init__(self, config: FitConfig, run: Run) -> None:
        self.config, self.path, self.writes = config, run.directory / "plan.json", run.writes
        self.total, self.known_from = config.total_steps, 0
        if self.total is None and self.path.exists():
            plan = read_json(self.path)
            self.total, self.known_from = int(plan["total_steps"]), int(plan["known_from_step"])
        self.times: list[float] = []
        self.rates: list[float] = []
        self.evaluation_seconds = 0.0
        self.started = time.perf_counter()

    def total_at(self, step: int) -> int | None:
        """The number of steps as it was known after `step` steps, also when the run is begun again."""
        return self.total if step >= self.known_from else None

    def lr_fraction(self, step: int) -> float:
        """The learning rate of a step as a share of its peak."""
        return warmup_stable_decay(
            step, self.total_at(step), self.config.warmup_steps, self.config.decay_share
        )

    def done(self, step: int) -> bool:
        """Whether `step` steps are all."""
        return self.total is not None and step >= self.total

    def observe(self, step: int, elapsed: float, tokens: int, ranks: Ranks) -> float:
        """Take note of a step's time (the first rank's decide); returns the recent tokens per second."""
        self.times.append(elapsed)
        self.rates = [*self.rates[-19:], tokens / max(elapsed, 1e-9)]
        if self.total is None and self.config.minutes is not None:
            budget = 60 * self.config.minutes
            spent = time.perf_counter() - self.started
            most = self.config.most_steps
            if step == most or (len(self.times) > 5 and spent >= min(self.CALIBRATE_SECONDS, 0.15 * budget)):
                left = budget - spent - self.config.evaluations * self.evaluation_seconds
                steps = step + max(1, round(left / statistics.median(self.times[2:] or self.times)))
                self.total, self.known_from = steps if most is None else min(steps, most), step
            if ranks.count > 1:
                self.total, self.known_from = ranks.share([self.total, self.known_from])
            if self.total is not None and self.writes:
                write_json(self.path, {"total_steps": self.total, "known_from_step": step})
        return round(statistics.median(self.rates), 1)

    def seconds_left(self, step: int) -> float | None:
        """About how long the rest will take; None: not known yet."""
        if self.total is None:
            return None
        return (self.total - step) * statistics.median(self.times[-50:])

    def save_due(self, step: int) -> bool:
        """Whether to save and evaluate behind a step."""
        total, evaluations = self.total_at(step), self.config.evaluations
        if total is None or step == 0:
            return False
        return step == total or step * evaluations // total > (step - 1) * evaluations // total

    def timed_evaluation(self, evaluate: Callable[[int], Metrics], step: int) -> Metrics:
        """Evaluate, and take note of the time: later evaluations will take as long."""
        started = time.perf_counter()
        figures = evaluate(step)
        self.evaluation_seconds = time.perf_counter() - started
        return figures
