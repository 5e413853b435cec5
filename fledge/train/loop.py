"""The one training loop. A stage differs in what its `steps` yield and in its loss, and in nothing else."""

from __future__ import annotations

import itertools
import math
import signal
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from fledge.config import Dataclass
from fledge.device import autocast, keep_freed_memory
from fledge.errors import UserError
from fledge.files import read_json, write_json
from fledge.model.checkpoint import read_weights
from fledge.model.transformer import CausalLM
from fledge.run import Checkpoint, Run
from fledge.train.losses import Term, forward_of
from fledge.train.optim import get_lr, load_optimizer_tensors, optimizer_tensors, set_lr
from fledge.train.progress import TrainingProgress, say
from fledge.train.schedule import warmup_stable_decay
from fledge.types import Batch

Metrics = dict[str, float]


class MicroBatch(Protocol):
    """What the loop asks of a batch; `Batch` describes it. No tokens: nothing to learn from."""

    def to(self, device: torch.device) -> Any:
        """The same batch on a device."""
        ...

    def num_tokens(self) -> int:
        """How many tokens are read."""
        ...

    def denominators(self) -> dict[str, int]:
        """What losses are averaged over, `tokens` among it."""
        ...


@dataclass
class Step:
    """One optimizer step: all of its micro-batches, whether a save may follow it, and what the generator
    wants handed back when it is resumed behind that save. `figures` are logged where nothing is learned."""

    batches: Sequence[MicroBatch]
    may_save: bool = True
    state: dict[str, Any] = field(default_factory=dict)
    figures: Metrics = field(default_factory=dict)


# (first step, saved state, metrics of the step before, if there was one) -> a generator of steps, which is
# sent the metrics of each of its own.
Steps = Callable[[int, dict[str, Any], Metrics | None], Generator[Step, Metrics | None, None]]

# (the forward pass that `fit` was given, a batch of the kind that the steps have) -> named sums.
Loss = Callable[[Any, Any], dict[str, Term]]


def row_steps(rows: Callable[[int, int], Batch], batch_rows: int, micro_rows: int) -> Steps:
    """Steps of `batch_rows` rows from the endless sequence that `rows(first, count)` reads, `micro_rows` at
    once."""

    def steps(
        first: int, _state: dict[str, Any], _metrics: Metrics | None
    ) -> Generator[Step, Metrics | None, None]:
        for step in itertools.count(first):
            end = (step + 1) * batch_rows
            spans = range(step * batch_rows, end, micro_rows)
            yield Step([rows(row, min(micro_rows, end - row)) for row in spans])

    return steps


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


class Diverged(UserError):
    """The loss or a gradient became NaN or jumped."""


@dataclass
class _Progress:
    """What a checkpoint holds besides tensors."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    mean_loss: float | None = None
    best: float | None = None
    best_step: int | None = None
    save_due: bool = True
    """A save and its evaluation are to come: now, or where the generator next allows it."""
    settled_step: int | None = None
    """The last step that was saved and evaluated."""
    metrics: Metrics | None = None
    """Of the last step; what the generator gets next."""
    data: dict[str, Any] = field(default_factory=dict)

    def note_validation(self, step: int, validation: float) -> None:
        if step and math.isfinite(validation) and (self.best is None or validation < self.best):
            self.best, self.best_step = validation, step

    def row(self) -> Metrics:
        return {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 3)}

    def summary(self) -> dict[str, Any]:
        return {
            "steps": self.step,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 1),
            "tokens_per_second": round(self.tokens / max(self.seconds, 1e-9), 1),
            "skipped_steps": self.skipped,
            "loss": self.mean_loss,
            "best_step": self.best_step,
        }


def fit(
    model: nn.Module,
    optimizers: list[Optimizer],
    steps: Steps,
    loss_fn: Loss,
    config: FitConfig,
    run: Run,
    write_model: Callable[[Path, int], None],
    evaluate: Callable[[int], Metrics] | None = None,
    forward: Callable[..., Tensor] | None = None,
    read_model: Callable[[Path], dict[str, Tensor]] = read_weights,
) -> dict[str, Any]:
    """Train to the end of the plan or of `steps`, from the last checkpoint on; returns what was done.

    `forward` is what the loss gets; by default the language model's `forward_of`. `read_model` reads what
    `write_model` wrote: the parameters that are trained, by their names.

    `write_model(directory, tokens)` makes every checkpoint a model directory. `evaluate(step)` returns
    figures for `metrics.jsonl`; its `validation` decides which checkpoint is the best (lower is better).
    Raises Diverged on NaN or a spike, KeyboardInterrupt after saving on Ctrl-C.
    """
    device = next(model.parameters()).device
    keep_freed_memory()
    if forward is None:
        assert isinstance(model, CausalLM)
        forward = forward_of(model)
    progress = _resume(model, optimizers, run, read_model, console := Console(stderr=True))
    plan = _Plan(config, run)
    forward = torch.compile(forward, dynamic=False) if config.compile else forward
    cast = autocast(device, config.compute_dtype)
    generator = steps(progress.step, progress.data, progress.metrics)
    metrics: Metrics | None = None  # a generator that has not begun takes none
    keep, unsaved = partial(_save, model, optimizers, run, progress, write_model), False
    with TrainingProgress(config.label, console) as bar, _Interrupt() as interrupt:

        def save() -> None:
            keep()  # before anything that could fail
            interrupt.obey(progress.step, bar)
            _settle(evaluate, plan, progress, run, bar)

        _settle(evaluate, plan, progress, run, bar)
        while not plan.done(progress.step):
            started = time.perf_counter()
            if (step := _next(generator, metrics, keep if unsaved else None)) is None:
                break
            counts = _denominators(step.batches)
            set_lr(optimizers, plan.lr_fraction(progress.step))
            if counts["tokens"]:
                with cast:
                    metrics = _accumulate(forward, step.batches, loss_fn, counts, device)
                metrics["grad_norm"] = float(clip_grad_norm_(model.parameters(), config.max_grad_norm))
                _stop_if_diverged(metrics, progress, config, run)
                _update(optimizers)
            else:  # nothing to learn from: never NaN, never silent
                metrics = {"skipped": 1.0, **step.figures}
            elapsed = time.perf_counter() - started
            tokens = sum(batch.num_tokens() for batch in step.batches)
            _advance(progress, metrics, tokens, elapsed, step)
            rate = plan.observe(progress.step, elapsed, tokens)
            pace = {"lr": get_lr(optimizers), "tokens_per_second": rate}
            run.log("metrics", {**progress.row(), **metrics, **pace})
            bar.show(progress.step, plan.total, progress.mean_loss, rate, plan.seconds_left(progress.step))
            progress.save_due |= plan.save_due(progress.step)
            unsaved = step.may_save
            if (step.may_save or plan.done(progress.step)) and (progress.save_due or interrupt.requested):
                save()
                unsaved = False
        if progress.settled_step != progress.step:  # the generator ended before the plan did
            progress.save_due = True
            save()
    return progress.summary()


def last_evaluation(run: Run) -> Metrics:
    """The figures of a run's last evaluation, whose names begin with `validation`; none if there was none."""
    last: Metrics = next((row for row in reversed(run.rows("metrics")) if "validation" in row), {})
    return {name: value for name, value in last.items() if name.startswith("validation")}


def _next(
    generator: Generator[Step, Metrics | None, None],
    metrics: Metrics | None,
    keep: Callable[[], object] | None,
) -> Step | None:
    """The next step, for which the generator gets the metrics of the last; None at its end. If it fails, as a
    reward function may, what was learned before is kept."""
    try:
        return generator.send(metrics)
    except StopIteration:
        return None
    except UserError:
        if keep is not None:
            keep()
        raise


def _denominators(batches: Sequence[MicroBatch]) -> dict[str, int]:
    counts: dict[str, int] = {"tokens": 0}
    for batch in batches:
        for name, count in batch.denominators().items():
            counts[name] = counts.get(name, 0) + count
    return counts


def _accumulate(
    forward: Callable[..., Tensor],
    batches: Sequence[MicroBatch],
    loss_fn: Loss,
    counts: dict[str, int],
    device: torch.device,
) -> Metrics:
    """Forward and backward over the micro-batches; every term's sum over the step by its denominator."""
    sums: dict[str, float] = {}
    for batch in batches:
        terms = loss_fn(forward, batch.to(device))
        objective = torch.stack([t.weight * t.sum / counts[t.per] for t in terms.values() if t.weight]).sum()
        objective.backward()  # type: ignore[no-untyped-call]
        for name, term in terms.items():
            sums[name] = sums.get(name, 0.0) + float(term.sum.detach()) / counts[term.per]
    return sums


def _update(optimizers: list[Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def _stop_if_diverged(metrics: Metrics, progress: _Progress, config: FitConfig, run: Run) -> None:
    """Called before the weights are touched, so nothing of it reaches a checkpoint."""
    step, loss = progress.step + 1, metrics["loss"]
    if not all(math.isfinite(value) for value in metrics.values()):
        bad = next(name for name, value in metrics.items() if not math.isfinite(value))
        raise Diverged(
            f"step {step}: {bad} is {metrics[bad]}; {_last_good(run, step)}; try a lower learning rate"
        )
    mean = progress.mean_loss
    if mean is not None and step > config.warmup_steps and loss > mean + config.max_spike:
        raise Diverged(
            f"step {step}: the loss jumped to {loss:.3f} from a running mean of {mean:.3f}; "
            f"{_last_good(run, step)}; try a lower learning rate, or allow it with --max-spike"
        )


def _stop_if_damaged(model: nn.Module, progress: _Progress, run: Run) -> None:
    """Called before a save: an update may itself overflow, behind a loss that was fine."""
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        raise Diverged(
            f"step {progress.step}: the update made weights that are no numbers; "
            f"{_last_good(run, progress.step + 1)}; try a lower learning rate"
        )


def _last_good(run: Run, step: int) -> str:
    """The last checkpoint whose weights gave a good loss before `step`, which used those of `step` - 1."""
    saved = [checkpoint for checkpoint in run.checkpoints() if checkpoint.step < step - 1]
    return f"the last good checkpoint is {saved[-1].path}" if saved else "no good checkpoint was saved yet"


def _advance(progress: _Progress, metrics: Metrics, tokens: int, elapsed: float, step: Step) -> None:
    progress.step += 1
    progress.tokens += tokens
    progress.seconds += elapsed
    progress.skipped += "skipped" in metrics
    progress.metrics, progress.data = metrics, step.state
    if "loss" in metrics:
        mean = progress.mean_loss
        progress.mean_loss = metrics["loss"] if mean is None else 0.9 * mean + 0.1 * metrics["loss"]


def _settle(
    evaluate: Callable[[int], Metrics] | None,
    plan: _Plan,
    progress: _Progress,
    run: Run,
    bar: TrainingProgress,
) -> None:
    """What follows a save: its evaluation, if it is due, and the end of older checkpoints."""
    if evaluate and progress.save_due:
        figures = plan.timed_evaluation(evaluate, progress.step)
        run.log("metrics", {"step": progress.step, "tokens": progress.tokens, **figures})
        validation = figures.get("validation")
        if validation is not None:
            bar.note(f"step {progress.step:,}: validation {validation:.4f} {plan.config.validation_unit}")
            progress.note_validation(progress.step, validation)
    if progress.save_due:
        progress.save_due, progress.settled_step = False, progress.step
    run.prune(plan.config.keep_checkpoints, progress.best_step)


def _save(
    model: nn.Module,
    optimizers: list[Optimizer],
    run: Run,
    progress: _Progress,
    write_model: Callable[[Path, int], None],
) -> Checkpoint:
    _stop_if_damaged(model, progress, run)

    def write(directory: Path) -> None:
        write_model(directory, progress.tokens)
        save_file(optimizer_tensors(optimizers), directory / "optimizer.safetensors")

    return run.save_checkpoint(progress.step, write, vars(progress))


def _resume(
    model: nn.Module,
    optimizers: list[Optimizer],
    run: Run,
    read_model: Callable[[Path], dict[str, Tensor]],
    console: Console,
) -> _Progress:
    """Go back to the last checkpoint; what was logged behind it will be logged again."""
    saved = run.checkpoints()
    if not saved:
        run.rewind(-1, -1)
        return _Progress()
    last = saved[-1]
    progress = _Progress(**last.state)
    weights = read_model(last.path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(weights[name])
    load_optimizer_tensors(optimizers, load_file(last.path / "optimizer.safetensors"))
    run.rewind(progress.step, progress.step)
    evaluations = [row for row in run.rows("metrics") if "lr" not in row]
    for row in evaluations:  # the checkpoint was saved before its own evaluation
        progress.note_validation(row["step"], row.get("validation", math.nan))
    if any(row["step"] == progress.step for row in evaluations):
        progress.save_due, progress.settled_step = False, progress.step
    else:
        run.rewind(progress.step, progress.step - 1)
    say(console, f"going on from step {progress.step:,} ({last.path})")
    return progress


class _Plan:
    """How many steps there will be, and after which of them to save."""

    CALIBRATE_SECONDS = 45.0  # or 15% of the budget, whichever is sooner

    def __init__(self, config: FitConfig, run: Run) -> None:
        self.config, self.path = config, run.directory / "plan.json"
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
        return warmup_stable_decay(
            step, self.total_at(step), self.config.warmup_steps, self.config.decay_share
        )

    def done(self, step: int) -> bool:
        return self.total is not None and step >= self.total

    def observe(self, step: int, elapsed: float, tokens: int) -> float:
        """Take note of a step's time; returns the recent tokens per second."""
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
                write_json(self.path, {"total_steps": self.total, "known_from_step": step})
        return round(statistics.median(self.rates), 1)

    def seconds_left(self, step: int) -> float | None:
        if self.total is None:
            return None
        return (self.total - step) * statistics.median(self.times[-50:])

    def save_due(self, step: int) -> bool:
        total, evaluations = self.total_at(step), self.config.evaluations
        if total is None or step == 0:
            return False
        return step == total or step * evaluations // total > (step - 1) * evaluations // total

    def timed_evaluation(self, evaluate: Callable[[int], Metrics], step: int) -> Metrics:
        started = time.perf_counter()
        figures = evaluate(step)
        self.evaluation_seconds = time.perf_counter() - started
        return figures


class _Interrupt:
    """The first Ctrl-C (or SIGTERM) asks the loop to save and stop; the second stops at once."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> _Interrupt:
        self.previous = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def obey(self, saved_step: int, bar: TrainingProgress) -> None:
        """Stop if asked to, now that the step is saved."""
        if self.requested:
            bar.note(f"interrupted: step {saved_step:,} is saved; run the same command again to go on")
            raise KeyboardInterrupt

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
