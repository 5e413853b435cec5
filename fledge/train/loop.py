"""The one training loop. A stage differs in what its `steps` yield and in its loss, and in nothing else."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from fledge.device import autocast, keep_freed_memory, use_fast_products
from fledge.errors import UserError
from fledge.model.checkpoint import read_weights
from fledge.model.transformer import CausalLM
from fledge.run import Run
from fledge.train.checkpoints import Progress, resume, save_checkpoint
from fledge.train.divergence import stop_if_diverged
from fledge.train.losses import Term, forward_of
from fledge.train.optim import get_lr, set_lr
from fledge.train.parallel import ALONE, Ranks
from fledge.train.plan import FitConfig, RunPlan
from fledge.train.progress import TrainingProgress, say
from fledge.train.steps import Idle, Metrics, MicroBatch, Step, Steps, on_device

if TYPE_CHECKING:  # only several ranks import torch.distributed
    from fledge.train.shards import Shards


# (the forward pass that `fit` was given, a batch of the kind that the steps have) -> named sums.
Loss = Callable[[Any, Any], dict[str, Term]]


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
    progress = resume(model, optimizers, run, read_model, console, ranks, shards)
    plan = RunPlan(config, run)
    forward = torch.compile(forward, dynamic=False) if config.compile else forward
    cast = autocast(device, config.compute_dtype, cache=shards is None)
    generator = steps(progress.step, progress.data, progress.metrics)
    metrics: Metrics | None = None  # a generator that has not begun takes none
    keep = partial(save_checkpoint, model, optimizers, run, progress, write_model, ranks, shards)
    unsaved = False
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
                stop_if_diverged(metrics, progress.step + 1, progress.mean_loss, config, run)
                _update(optimizers) if shards is None else shards.update()
            else:  # nothing to learn from: never NaN, never silent
                metrics = {"skipped": 1.0, **step.figures}
            elapsed = time.perf_counter() - started
            progress.advance(metrics, tokens, elapsed, step)
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


def _update(optimizers: list[Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def _settle(
    evaluate: Callable[[int], Metrics] | None,
    plan: RunPlan,
    progress: Progress,
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
