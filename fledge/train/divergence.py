"""A run that has gone wrong stops before it saves what is wrong."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import nn

from fledge.errors import UserError
from fledge.run import Run
from fledge.train.plan import FitConfig
from fledge.train.steps import Metrics

if TYPE_CHECKING:  # only several ranks import torch.distributed
    from fledge.train.shards import Shards


class Diverged(UserError):
    """The loss or a gradient became NaN or jumped."""


def stop_if_diverged(metrics: Metrics, step: int, mean: float | None, config: FitConfig, run: Run) -> None:
    """Called before the weights are touched, so nothing of it reaches a checkpoint. `step` counts from 1;
    `mean` is the running mean of the losses before."""
    if not all(math.isfinite(value) for value in metrics.values()):
        bad = next(name for name, value in metrics.items() if not math.isfinite(value))
        raise Diverged(
            f"step {step}: {bad} is {metrics[bad]}; {_last_good(run, step)}; try a lower learning rate"
        )
    loss = metrics["loss"]
    if mean is not None and step > config.warmup_steps and loss > mean + config.max_spike:
        raise Diverged(
            f"step {step}: the loss jumped to {loss:.3f} from a running mean of {mean:.3f}; "
            f"{_last_good(run, step)}; try a lower learning rate, or allow it with --max-spike"
        )


def stop_if_damaged(model: nn.Module, step: int, run: Run, shards: Shards | None) -> None:
    """Called before a save: an update may itself overflow, behind a loss that was fine."""
    if shards is None:
        is_fine = all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    else:
        is_fine = shards.finite()
    if not is_fine:
        raise Diverged(
            f"step {step}: the update made weights that are no numbers; "
            f"{_last_good(run, step + 1)}; try a lower learning rate"
        )


def _last_good(run: Run, step: int) -> str:
    """The last checkpoint whose weights gave a good loss before `step`, which used those of `step` - 1."""
    saved = [checkpoint for checkpoint in run.checkpoints() if checkpoint.step < step - 1]
    return f"the last good checkpoint is {saved[-1].path}" if saved else "no good checkpoint was saved yet"
