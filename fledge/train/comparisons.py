"""Steps of training on comparisons, and a reward model's figures on held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fledge.data.comparisons import Comparison, batch_of, in_batches
from fledge.device import autocast
from fledge.model.heads import RewardModel
from fledge.model.transformer import CausalLM
from fledge.train.memory import Setup, check_memory_here, trained_share
from fledge.train.parallel import ALONE, Ranks
from fledge.train.preference_losses import preference_loss
from fledge.train.steps import Metrics, MicroBatch, Step, Steps, own_batches


def steps_of(prompts: int, batch_prompts: int, epochs: float) -> int:
    """How many steps so many epochs take, the last of them perhaps smaller."""
    return math.ceil(max(1, round(epochs * prompts)) / batch_prompts)


@dataclass(frozen=True)
class Plan:
    """Which prompts are in which step and micro-batch."""

    batch_prompts: int
    micro_tokens: int
    epochs: float
    seed: int
    ranks: Ranks = field(default=ALONE, repr=False)

    def steps(self, prompts: Sequence[Comparison], first: int = 0) -> Iterator[list[list[Comparison]]]:
        """The micro-batches (see `in_batches`) of each step from `first` on: whole prompts, in another order
        each epoch. The last step has what is left."""
        total = max(1, round(self.epochs * len(prompts)))
        for start in range(first * self.batch_prompts, total, self.batch_prompts):
            places = [divmod(i, len(prompts)) for i in range(start, min(start + self.batch_prompts, total))]
            orders = {
                epoch: np.random.default_rng([self.seed, epoch]).permutation(len(prompts))
                for epoch, _ in places
            }
            chosen = [prompts[orders[epoch][i]] for epoch, i in places]
            yield self.ranks.even(list(in_batches(chosen, self.micro_tokens)))


def comparison_steps(
    plan: Plan,
    prompts: Sequence[Comparison],
    batches: Callable[[list[list[Comparison]]], Sequence[MicroBatch]],
) -> Steps:
    """The plan's steps, for `fit`; `batches` makes tensors of the parts of a step."""

    def steps(
        first: int, _state: dict[str, Any], _metrics: Metrics | None
    ) -> Generator[Step, Metrics | None, None]:
        for parts in plan.steps(prompts, first):
            yield Step(own_batches(plan.ranks, batches(parts)))

    return steps


def reward_steps(plan: Plan, prompts: Sequence[Comparison]) -> Steps:
    """The steps of a reward model."""
    return comparison_steps(plan, prompts, lambda parts: [batch_of(part) for part in parts])


@torch.no_grad()
def held_out_figures(
    model: RewardModel, prompts: Sequence[Comparison], compute_dtype: torch.dtype, max_tokens: int
) -> Metrics:
    """`validation`: nats per comparison; `validation_accuracy`: the share judged right."""
    device = model.score.weight.device
    loss = right = 0.0
    for part in in_batches(prompts, max_tokens):
        with autocast(device, compute_dtype):
            terms = preference_loss(model, batch_of(part).to(device))
        loss, right = loss + float(terms["loss"].sum), right + float(terms["accuracy"].sum)
    return {"validation": loss / len(prompts), "validation_accuracy": right / len(prompts)}


def memory_line(
    model: CausalLM | RewardModel,
    prompts: Sequence[Comparison],
    micro_tokens: int,
    compute_dtype: torch.dtype,
    checkpointed: bool,
    ranks: Ranks = ALONE,
) -> str:
    """A line about what training will take; UserError if that is too much (see `check_memory`)."""
    device = model.model.embed_tokens.weight.device
    parts = list(in_batches(prompts, micro_tokens))
    shapes = [(sum(len(p.ids) for p in part), max(len(row) for p in part for row in p.ids)) for part in parts]
    rows, row_tokens = max(shapes, key=lambda shape: shape[0] * shape[1])
    setup = Setup(
        rows=rows,
        row_tokens=row_tokens,
        optimizer="adamw",
        compute_dtype=compute_dtype,
        checkpointed=checkpointed,
        segments=False,
        accumulates=len(parts) > 1,
        on_cpu=device.type == "cpu",
        trained_share=trained_share(model),
        ranks=ranks.count,
        neighbours=ranks.neighbours,
    )
    config, tables = model.config, 0.0
    if isinstance(model, RewardModel):
        # No scores over the vocabulary; weights, gradients and moments of its embeddings all the same.
        tables = 16.0 * config.vocab_size * config.hidden_size
        # Of blocks below the first one that learns nothing is kept but their weights.
        learns = [any(p.requires_grad for p in block.parameters()) for block in model.model.layers]
        below = learns.index(True)
        tables += 4.0 * sum(p.numel() for block in model.model.layers[:below] for p in block.parameters())
        kinds = config.layer_types[below:]
        config = replace(config, vocab_size=1, num_hidden_layers=len(learns) - below, layer_types=kinds)
    return check_memory_here(config, setup, device, model.num_parameters(), tables)
