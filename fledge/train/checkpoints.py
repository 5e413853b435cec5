"""How far a run has come: what its checkpoints hold, how they are written, and how it goes on from one."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from fledge.run import Run
from fledge.train.divergence import stop_if_damaged
from fledge.train.optim import load_optimizer_tensors, optimizer_tensors
from fledge.train.parallel import Ranks
from fledge.train.progress import say
from fledge.train.steps import Metrics, Step

if TYPE_CHECKING:  # only several ranks import torch.distributed
    from fledge.train.shards import Shards

# Of a checkpoint that several ranks wrote: their shares of the optimizers' state.
SPREAD_OPTIMIZER = "optimizer"


@dataclass
class Progress:
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

    def advance(self, metrics: Metrics, tokens: int, elapsed: float, step: Step) -> None:
        """Another step is taken."""
        self.step += 1
        self.tokens += tokens
        self.seconds += elapsed
        self.skipped += "skipped" in metrics
        self.metrics, self.data = metrics, step.state
        if "loss" in metrics:
            mean = self.mean_loss
            self.mean_loss = metrics["loss"] if mean is None else 0.9 * mean + 0.1 * metrics["loss"]

    def note_validation(self, step: int, validation: float) -> None:
        """The best one is kept."""
        if step and math.isfinite(validation) and (self.best is None or validation < self.best):
            self.best, self.best_step = validation, step

    def row(self) -> Metrics:
        """What every line of the log says."""
        return {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 3)}

    def summary(self) -> dict[str, Any]:
        """What a finished run says of itself."""
        return {
            "steps": self.step,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 1),
            "tokens_per_second": round(self.tokens / max(self.seconds, 1e-9), 1),
            "skipped_steps": self.skipped,
            "loss": self.mean_loss,
            "best_step": self.best_step,
        }


def save_checkpoint(
    model: nn.Module,
    optimizers: list[Optimizer],
    run: Run,
    progress: Progress,
    write_model: Callable[[Path, int], None],
    ranks: Ranks,
    shards: Shards | None,
) -> None:
    """Save model, optimizers and progress; raises Diverged instead if the weights are no numbers."""
    stop_if_damaged(model, progress.step, run, shards)

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


def resume(
    model: nn.Module,
    optimizers: list[Optimizer],
    run: Run,
    read_model: Callable[[Path], dict[str, Tensor]],
    console: Console,
    ranks: Ranks,
    shards: Shards | None,
) -> Progress:
    """Go back to the last checkpoint, whatever number of ranks made it; what was logged behind it will be
    logged again."""
    saved = run.checkpoints()
    path = ranks.share(str(saved[-1].path) if saved else None)
    if path is None:
        run.rewind(-1, -1)
        return Progress()
    last = Path(path)
    _read_checkpoint(model, optimizers, last, read_model(last), shards)
    progress = Progress(**ranks.share(_progress_of(run) if ranks.leads else None))
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
    progress = Progress(**run.checkpoints()[-1].state)
    run.rewind(progress.step, progress.step)
    evaluations = [row for row in run.rows("metrics") if "lr" not in row]
    for row in evaluations:  # the checkpoint was saved before its own evaluation
        progress.note_validation(row["step"], row.get("validation", math.nan))
    if any(row["step"] == progress.step for row in evaluations):
        progress.save_due, progress.settled_step = False, progress.step
    else:
        run.rewind(progress.step, progress.step - 1)
    return vars(progress)
