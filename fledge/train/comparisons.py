"""Steps of a reward model's training, and its figures on held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fledge.data.comparisons import Comparison, batch_of, in_batches
from fledge.model.heads import RewardModel
from fledge.train.loop import Metrics, Step, Steps
from fledge.train.memory import Setup, check_memory, free_bytes, resident_bytes
from fledge.train.preference_losses import preference_loss


def steps_of(prompts: int, batch_prompts: int, epochs: float) -> int:
    """How many steps so many epochs take, the last of them perhaps smaller."""
    return math.ceil(max(1, round(epochs * prompts)) / batch_prompts)


def comparison_steps(
    prompts: Sequence[Comparison], batch_prompts: int, micro_tokens: int, epochs: float, seed: int
) -> Steps:
    """Steps of whole prompts, in micro-batches of at most `micro_tokens` (see `in_batches`), in another order
    each epoch; the last step has what is left."""
    total = max(1, round(epochs * len(prompts)))

    def steps(
        first: int, _state: dict[str, Any], _metrics: Metrics | None
    ) -> Generator[Step, Metrics | None, None]:
        for start in range(first * batch_prompts, total, batch_prompts):
            places = [divmod(i, len(prompts)) for i in range(start, min(start + batch_prompts, total))]
            orders = {
                epoch: np.random.default_rng([seed, epoch]).permutation(len(prompts)) for epoch, _ in places
            }
            chosen = [prompts[orders[epoch][i]] for epoch, i in places]
            yield Step([batch_of(part) for part in in_batches(chosen, micro_tokens)])

    return steps


@torch.no_grad()
def held_out_figures(
    model: RewardModel, prompts: Sequence[Comparison], compute_dtype: torch.dtype, max_tokens: int
) -> Metrics:
    """`validation`: nats per comparison; `validation_accuracy`: the share judged right."""
    device = model.score.weight.device
    loss = right = 0.0
    for part in in_batches(prompts, max_tokens):
        with torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32):
            terms = preference_loss(model, batch_of(part).to(device))
        loss, right = loss + float(terms["loss"].sum), right + float(terms["accuracy"].sum)
    return {"validation": loss / len(prompts), "validation_accuracy": right / len(prompts)}


def memory_line(
    model: RewardModel,
    prompts: Sequence[Comparison],
    micro_tokens: int,
    compute_dtype: torch.dtype,
    checkpointed: bool,
) -> str:
    """A line about what training will take; UserError if that is too much (see `check_memory`)."""
    device = model.score.weight.device
    parts = list(in_batches(prompts, micro_tokens))
    shapes = [(sum(len(p.ids) for p in part), max(len(row) for p in part for row in p.ids)) for part in parts]
    rows, row_tokens = max(shapes, key=lambda shape: shape[0] * shape[1])
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    setup = Setup(
        rows=rows,
        row_tokens=row_tokens,
        optimizer="adamw",
        compute_dtype=compute_dtype,
        checkpointed=checkpointed,
        segments=False,
        accumulates=len(parts) > 1,
        on_cpu=device.type == "cpu",
        trained_share=trained / model.num_parameters(),
    )
    held, free = resident_bytes(device), free_bytes(device)
    # No scores over the vocabulary; weights, gradients and moments of its embeddings all the same.
    tables = 16.0 * model.config.vocab_size * model.config.hidden_size
    rest = max(0.0, held - 4 * model.num_parameters()) + tables
    limit = None if free is None else held + free
    return check_memory(replace(model.config, vocab_size=1), setup, rest, limit)
