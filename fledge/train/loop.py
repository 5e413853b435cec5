"""The one training loop. A stage differs in what its `steps` yield and in its loss, and in nothing else."""

from __future__ import annotations

import itertools
import math
import signal
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, is_dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from fledge.config import Dataclass
from fledge.device import autocast, keep_freed_memory, use_fast_products
from fledge.errors import UserError
from fledge.files import read_json, write_json
from fledge.model.checkpoint import read_weights
from fledge.model.transformer import CausalLM
from fledge.run import Run
from fledge.train.losses import Term, forward_of
from fledge.train.optim import get_lr, load_optimizer_tensors, optimizer_tensors, set_lr
from fledge.train.parallel import ALONE, Ranks
from fledge.train.progress import TrainingProgress, say
from fledge.train.schedule import warmup_stable_decay
from fledge.types import Batch

if TYPE_CHECKING:  # only several ranks import torch.distributed
    from fledge.train.shards import Shards

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


@dataclass(frozen=True)
class Idle:
    """A micro-batch of another rank, gone through so that all take part in every pass; it does not count."""

    batch: MicroBatch

    def to(self, device: torch.device) -> Any:
        """The batch itself on a device."""
        return self.batch.to(device)

    def num_tokens(self) -> int:
        """None that count."""
        return 0

    def denominators(self) -> dict[str, int]:
        """None, by their names."""
        return dict.fromkeys(self.batch.denominators(), 0)


def own_batches(ranks: Ranks, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """This rank's of all micro-batches of a step. Those of one kind: each rank has as many, and in each round
    all compute the same way."""
    return [batches[i] if counts else Idle(batches[i]) for i, counts in ranks.turns(len(batches))]


@dataclass
class Step:
    """One optimizer step: all of its micro-batches (of this rank: see `own_batches`), whether a save may
    follow it, and what the generator wants handed back when it is resumed behind that save. `figures` are
    logged where nothing is learned."""

    batches: Sequence[MicroBatch]
    may_save: bool = True
    state: dict[str, Any] = field(default_factory=dict)
    figures: Metrics = field(default_factory=dict)


# (first step, saved state, metrics of the step before, if there was one) -> a generator of steps, which is
# sent the metrics of each of its own.
Steps = Callable[[int, dict[str, Any], Metrics | None], Generator[Step, Metrics | None, None]]

# (the forward pass that `fit` was given, a batch of the kind that the steps have) -> named sums.
Loss = Callable[[Any, Any], dict[str, Term]]

# Of a checkpoint that several ranks wrote: their shares of the optimizers' state.
SPREAD_OPTIMIZER = "optimizer"


def row_steps(
    rows: Callable[[int, int], Batch], batch_rows: int, micro_rows: int, ranks: Ranks = ALONE
) -> Steps:
    """Steps of `batch_rows` rows from the endless sequence that `rows(first, count)` reads, `micro_rows` at
    once; a rank reads its own of them."""
    spans = _row_spans(batch_rows, micro_rows, ranks.count)

    def steps(
        first: int, _state: dict[str, Any], _metrics: Metrics | None
    ) -> Generator[Step, Metrics | None, None]:
        for step in itertools.count(first):
            start = step * batch_rows
            batches: list[MicroBatch] = []
            for i, counts in ranks.turns(len(spans)):
                batch = rows(start + spans[i].start, len(spans[i]))
                batches.append(batch if counts else Idle(batch))
            yield Step(batches)

    return steps


def _row_spans(rows: int, most: int, ranks: int) -> list[range]:
    """So many rows in parts of at most `most`; for several ranks in as equal parts as can be, so many that
    each rank has as many of them, while there are rows."""
    if ranks == 1:
        return [range(first, min(first + most, rows)) for first in range(0, rows, most)]
    count = min(rows, ranks * -(-rows // (ranks * most)))
    return [range(rows * i // count, rows * (i + 1) // count) for i in range(count)]


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
    ranks: Ranks = ALONE,
    reads_model: bool = False,
) -> dict[str, Any]:
    """Train to the end of the plan or of `steps`, from the last checkpoint on; returns what was done.

    With several `ranks` the model is spread over them while it is trained, and whole again afterwards, in
    `evaluate` and `write_model`; `reads_model`: also while the first step is made, and those behind a step
    that a save may follow (RL: where it rolls out).

    `forward` is what the loss gets; by default the language model's `forward_of`. `read_model` reads what
    `write_model` wrote: the parameters that are trained, by their names.

    `write_model(directory, tokens)` makes every checkpoint a model directory. `evaluate(step)` returns
    figures for `metrics.jsonl`; its `validation` decides which checkpoint is the best (lower is better).
    Raises Diverged on NaN or a spike, KeyboardInterrupt after saving on Ctrl-C.
    """
    device = next(model.parameters()).device
    keep_freed_memory()
    use_fast_products(device, config.compute_dtype)
    console = Console(stderr=True, quiet=not ranks.leads)
    trained, shards = model, None
    together: Callable[[], AbstractContextManager[None]] = nullcontext
    if ranks.count > 1:
        shards = _spread(model, optimizers, ranks)
        trained, optimizers, together = shards.model, shards.optimizers, shards.whole
        config = _uncompiled(config, console)
    if forward is None:
        assert isinstance(trained, CausalLM)
        forward = forward_of(trained if shards is None else shards.reader())
    elif shards is not None:
        assert forward is model, "several ranks compute with the model that is trained"
        forward = trained
    progress = _resume(model, optimizers, run, read_model, console, ranks, shards)
    plan = _Plan(config, run)
    forward = torch.compile(forward, dynamic=False) if config.compile else forward
    cast = autocast(device, config.compute_dtype, cache=shards is None)
    generator = steps(progress.step, progress.data, progress.metrics)
    metrics: Metrics | None = None  # a generator that has not begun takes none
    keep, unsaved = partial(_save, model, optimizers, run, progress, write_model, ranks, shards), False
    with TrainingProgress(config.label, console) as bar, _Interrupt() as interrupt:

        def save() -> None:
            with together():
                keep()  # before anything that could fail
                interrupt.obey(progress.step, bar, ranks)
                _settle(evaluate, plan, progress, run, bar, ranks)

        with together() if evaluate and progress.save_due else nullcontext():
            _settle(evaluate, plan, progress, run, bar, ranks)
        is_read = reads_model
        while not plan.done(progress.step):
            started = time.perf_counter()
            with together() if is_read else nullcontext():
                step = _next(generator, metrics, keep if unsaved else None)
            if step is None:
                break
            counts, tokens, is_to_stop = _counted(step.batches, ranks, interrupt.requested)
            set_lr(optimizers, plan.lr_fraction(progress.step))
            if counts["tokens"]:
                with cast:
                    sums = _accumulate(forward, step.batches, loss_fn, counts, device)
                if shards is None:
                    norm = clip_grad_norm_(trained.parameters(), config.max_grad_norm)
                else:
                    norm = shards.clip(config.max_grad_norm)
                metrics = _metrics(sums, norm, ranks)
                _stop_if_diverged(metrics, progress, config, run)
                _update(optimizers) if shards is None else shards.update()
            else:  # nothing to learn from: never NaN, never silent
                metrics = {"skipped": 1.0, **step.figures}
            elapsed = time.perf_counter() - started
            _advance(progress, metrics, tokens, elapsed, step)
            rate = plan.observe(progress.step, elapsed, tokens, ranks)
            pace = {"lr": get_lr(optimizers), "tokens_per_second": rate}
            run.log("metrics", {**progress.row(), **metrics, **pace})
            bar.show(progress.step, plan.total, progress.mean_loss, rate, plan.seconds_left(progress.step))
            progress.save_due |= plan.save_due(progress.step)
            unsaved, is_read = step.may_save, reads_model and step.may_save
            if ranks.count == 1:  # several go by what they told each other, or they would not save together
                is_to_stop = interrupt.requested
            if (step.may_save or plan.done(progress.step)) and (progress.save_due or is_to_stop):
                save()
                unsaved = False
        if progress.settled_step != progress.step:  # the generator ended before the plan did
            progress.save_due = True
            save()
    if shards is not None:
        shards.fill()
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


def _spread(model: nn.Module, optimizers: list[Optimizer], ranks: Ranks) -> Shards:
    from fledge.train.shards import Shards

    return Shards(model, optimizers, ranks)


def _uncompiled(config: FitConfig, console: Console) -> FitConfig:
    if config.compile:
        say(console, "several ranks train without torch.compile: it does not see through sharded weights")
    return replace(config, compile=False)


def _counted(
    batches: Sequence[MicroBatch], ranks: Ranks, is_asked_to_stop: bool
) -> tuple[dict[str, int], int, bool]:
    """The step's denominators and tokens, over all ranks, and whether any of them was asked to stop."""
    counts: dict[str, int] = {"tokens": 0}
    for batch in batches:
        for name, count in batch.denominators().items():
            counts[name] = counts.get(name, 0) + count
    tokens = sum(batch.num_tokens() for batch in batches)
    if ranks.count == 1:
        return counts, tokens, is_asked_to_stop
    told = ranks.gather([counts, tokens, is_asked_to_stop])
    return _sums([one[0] for one in told]), sum(one[1] for one in told), any(one[2] for one in told)


def _sums(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By name, over all rows that have it."""
    found: dict[str, Any] = {}
    for row in rows:
        for name, value in row.items():
            found[name] = found.get(name, 0) + value
    return found


def _accumulate(
    forward: Callable[..., Tensor],
    batches: Sequence[MicroBatch],
    loss_fn: Loss,
    counts: dict[str, int],
    device: torch.device,
) -> list[tuple[str, int, Tensor]]:
    """Forward and backward over the micro-batches; every term of each as (name, denominator, sum). The sums
    stay on the device: reading one would wait for it to finish."""
    sums: list[tuple[str, int, Tensor]] = []
    for batch in batches:
        terms = loss_fn(forward, on_device(batch, device))
        objective = torch.stack([t.weight * t.sum / counts[t.per] for t in terms.values() if t.weight]).sum()
        if isinstance(batch, Idle):
            objective = objective * 0.0
        else:
            sums += [(name, counts[term.per], term.sum.detach()) for name, term in terms.items()]
        objective.backward()  # type: ignore[no-untyped-call]
    return sums


def _metrics(sums: list[tuple[str, int, Tensor]], norm: Tensor, ranks: Ranks) -> Metrics:
    """Every term's sum over the step by its denominator, and the norm; read from the device at once."""
    *values, grad_norm = _numbers([*(tensor for _, _, tensor in sums), norm])
    metrics: Metrics = {}
    for (name, count, _), value in zip(sums, values, strict=True):
        metrics[name] = metrics.get(name, 0.0) + value / count
    if ranks.count > 1:
        metrics = _sums(ranks.gather(metrics))
    return {**metrics, "grad_norm": grad_norm}


def _numbers(tensors: Sequence[Tensor]) -> list[float]:
    """Tensors of one number each; those on a GPU are read together, as each reading would wait for it."""
    there = [tensor for tensor in tensors if tensor.is_cuda]
    read = iter(torch.stack([tensor.double() for tensor in there]).tolist() if there else [])
    return [next(read) if tensor.is_cuda else float(tensor) for tensor in tensors]


def on_device(batch: Any, device: torch.device) -> Any:
    """A batch on a device. To a GPU its tensors go through pinned memory, so that nothing waits for the copy:
    the host makes the next micro-batch while this one is computed."""
    if device.type != "cuda":
        return batch.to(device)
    if isinstance(batch, Idle):
        batch = batch.batch
    return _pinned_to(batch, device)


def _pinned_to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value if value.is_cuda else value.pin_memory().to(device, non_blocking=True)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{name: _pinned_to(one, device) for name, one in vars(value).items()})
    return value


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


def _stop_if_damaged(model: nn.Module, progress: _Progress, run: Run, shards: Shards | None) -> None:
    """Called before a save: an update may itself overflow, behind a loss that was fine."""
    if shards is None:
        is_fine = all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    else:
        is_fine = shards.finite()
    if not is_fine:
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
    ranks: Ranks,
) -> None:
    """What follows a save: its evaluation, if it is due, and the end of older checkpoints."""
    if evaluate and progress.save_due:
        figures = ranks.share(plan.timed_evaluation(evaluate, progress.step))
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
    ranks: Ranks,
    shards: Shards | None,
) -> None:
    _stop_if_damaged(model, progress, run, shards)

    def write(directory: Path) -> None:
        write_model(directory, progress.tokens)
        if shards is None:
            save_file(optimizer_tensors(optimizers), directory / "optimizer.safetensors")
        else:
            shards.save_optimizers(Path(ranks.share(str(directory / SPREAD_OPTIMIZER))))

    with nullcontext() if shards is None else shards.whole():
        if ranks.leads:
            run.save_checkpoint(progress.step, write, vars(progress))
        else:
            assert shards is not None
            shards.save_optimizers(Path(ranks.share()))
        ranks.barrier()


def _resume(
    model: nn.Module,
    optimizers: list[Optimizer],
    run: Run,
    read_model: Callable[[Path], dict[str, Tensor]],
    console: Console,
    ranks: Ranks,
    shards: Shards | None,
) -> _Progress:
    """Go back to the last checkpoint, whatever number of ranks made it; what was logged behind it will be
    logged again."""
    saved = run.checkpoints()
    path = ranks.share(str(saved[-1].path) if saved else None)
    if path is None:
        run.rewind(-1, -1)
        return _Progress()
    last = Path(path)
    _read_checkpoint(model, optimizers, last, read_model(last), shards)
    progress = _Progress(**ranks.share(_progress_of(run) if ranks.leads else None))
    say(console, f"going on from step {progress.step:,} ({last})")
    return progress


def _read_checkpoint(
    model: nn.Module,
    optimizers: list[Optimizer],
    path: Path,
    weights: dict[str, Tensor],
    shards: Shards | None,
) -> None:
    spread, file = path / SPREAD_OPTIMIZER, path / "optimizer.safetensors"
    if shards is not None:
        shards.load_weights([name for name, _ in model.named_parameters()], weights)
        shards.load_optimizers(spread) if spread.is_dir() else shards.take_optimizers(load_file(file))
        return
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(weights[name])
    if spread.is_dir():
        from fledge.train.shards import whole_optimizers

        load_optimizer_tensors(optimizers, whole_optimizers(spread))
    else:
        load_optimizer_tensors(optimizers, load_file(file))


def _progress_of(run: Run) -> dict[str, Any]:
    """What the last checkpoint and the evaluations of it say; the log ends there."""
    progress = _Progress(**run.checkpoints()[-1].state)
    run.rewind(progress.step, progress.step)
    evaluations = [row for row in run.rows("metrics") if "lr" not in row]
    for row in evaluations:  # the checkpoint was saved before its own evaluation
        progress.note_validation(row["step"], row.get("validation", math.nan))
    if any(row["step"] == progress.step for row in evaluations):
        progress.save_due, progress.settled_step = False, progress.step
    else:
        run.rewind(progress.step, progress.step - 1)
    return vars(progress)


class _Plan:
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
        return warmup_stable_decay(
            step, self.total_at(step), self.config.warmup_steps, self.config.decay_share
        )

    def done(self, step: int) -> bool:
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

    def obey(self, saved_step: int, bar: TrainingProgress, ranks: Ranks) -> None:
        """Stop if this or another rank was asked to, now that the step is saved."""
        if any(ranks.gather(self.requested)):
            bar.note(f"interrupted: step {saved_step:,} is saved; run the same command again to go on")
            raise KeyboardInterrupt

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
