"""Direct preference optimisation: the reference's log-probabilities, steps, held-out figures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fledge.data.comparisons import Comparison, in_batches
from fledge.data.preference_rows import Logps, judged_batches, pair_batch, rows_of
from fledge.files import read_json, write_json
from fledge.model.transformer import CausalLM
from fledge.train.comparisons import steps_of
from fledge.train.dpo_losses import (
    WITHOUT_REFERENCE,
    LossName,
    judged_loss,
    pair_loss,
    preferred_loss,
    row_logps,
    shared_kl,
)
from fledge.train.loop import Metrics, MicroBatch, Step, Steps
from fledge.train.losses import Forward, Term, forward_of
from fledge.train.memory import Setup, check_memory, free_bytes, resident_bytes


@dataclass(frozen=True)
class Plan:
    """Which prompts are in which step and micro-batch."""

    batch_prompts: int
    micro_tokens: int
    epochs: float
    seed: int

    def steps(self, prompts: Sequence[Comparison], first: int = 0) -> Iterator[list[list[Comparison]]]:
        """The micro-batches of each step from `first` on: whole prompts, in another order each epoch. The
        last step has what is left."""
        total = max(1, round(self.epochs * len(prompts)))
        for step in range(first, steps_of(len(prompts), self.batch_prompts, self.epochs)):
            begin = step * self.batch_prompts
            places = [divmod(i, len(prompts)) for i in range(begin, min(begin + self.batch_prompts, total))]
            orders = {
                epoch: np.random.default_rng([self.seed, epoch]).permutation(len(prompts))
                for epoch, _ in places
            }
            chosen = [prompts[orders[epoch][i]] for epoch, i in places]
            yield list(in_batches(chosen, self.micro_tokens))


@dataclass(frozen=True)
class Objective:
    """What is learned, and what it is measured against."""

    name: LossName
    beta: float
    label_smoothing: float = 0.0
    gamma: float = 0.0
    weight_good: float = 1.0
    weight_bad: float = 1.0
    labels: Mapping[str, list[bool]] = field(default_factory=dict)
    """kto: by a prompt's key, which completions are good."""
    strangers: Mapping[str, Comparison] = field(default_factory=dict)
    """kto: by a prompt's key, the prompt with the completions of others."""

    def loss(self, forward: Forward, batch: Any) -> dict[str, Term]:
        """The terms of a micro-batch, as `fit` wants them."""
        if self.name == "kto":
            return judged_loss(forward, batch, self.beta, self.weight_good, self.weight_bad)
        loss = pair_loss(self.name, self.beta, self.label_smoothing, self.gamma)
        return preferred_loss(forward, batch, loss, self.beta)

    def strangers_of(
        self, parts: Sequence[Sequence[Comparison]], micro_tokens: int
    ) -> list[list[Comparison]]:
        """The micro-batches of the strangers of a step's prompts; none but for kto."""
        if self.name != "kto":
            return []
        found = [self.strangers[prompt.key] for part in parts for prompt in part]
        return list(in_batches(found, micro_tokens))


@dataclass(frozen=True)
class Reference:
    """Log-probabilities under the reference: of completions, and for kto of strangers."""

    rows: Logps
    strangers: Logps


@dataclass(frozen=True)
class Scoring:
    """The trainer's own forward pass without gradients."""

    forward: Forward
    device: torch.device
    compute_dtype: torch.dtype

    @torch.no_grad()
    def logps(self, part: Sequence[Comparison]) -> list[list[float]]:
        """Of a micro-batch: for each prompt the log-probabilities of its completions."""
        input_ids, loss_mask = (tensor.to(self.device) for tensor in rows_of(part))
        with _cast(self.device, self.compute_dtype):
            found = iter(row_logps(self.forward, input_ids, loss_mask).tolist())
        return [[next(found) for _ in prompt.ids] for prompt in part]


def scoring_of(model: CausalLM, compute_dtype: torch.dtype) -> Scoring:
    """The forward pass that `fit` uses for this model."""
    return Scoring(forward_of(model), model.model.embed_tokens.weight.device, compute_dtype)


def _cast(device: torch.device, compute_dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32)


def reference_of(
    scoring: Scoring,
    objective: Objective,
    plan: Plan,
    train: Sequence[Comparison],
    held: Sequence[Comparison],
) -> Reference:
    """What the model, before it is trained, gives to every completion, each in the micro-batch in which
    training first meets it: so that the first step's ratios are exactly 1, also where the rounding of bf16
    depends on a batch's shape."""
    rows: dict[str, list[float]] = {}
    strangers: dict[str, list[float]] = {}

    def add(parts: Iterable[Sequence[Comparison]], found: dict[str, list[float]]) -> None:
        for part in parts:
            if any(prompt.key not in found for prompt in part):
                for prompt, logps in zip(part, scoring.logps(part), strict=True):
                    found.setdefault(prompt.key, logps)

    for parts in plan.steps(train):
        add(parts, rows)
        add(objective.strangers_of(parts, plan.micro_tokens), strangers)
        if len(rows) == len(train):
            break
    held_parts = list(in_batches(held, plan.micro_tokens))
    add(held_parts, rows)
    add(objective.strangers_of(held_parts, plan.micro_tokens), strangers)
    return Reference(rows, strangers)


def cached_reference(
    path: Path, fingerprint: str, prompts: Sequence[Comparison], compute: Callable[[], Reference]
) -> Reference:
    """The reference of a file if it has this fingerprint, else a new one, which is kept there."""
    keys = [prompt.key for prompt in prompts]
    if path.exists():
        saved = read_json(path)
        if saved.get("fingerprint") == fingerprint:
            sides = ({k: v for k, v in zip(keys, saved[n], strict=True) if v} for n in ("rows", "strangers"))
            return Reference(*sides)
    found = compute()
    lists = {name: [list(logps.get(key, ())) for key in keys] for name, logps in vars(found).items()}
    write_json(path, {"fingerprint": fingerprint, **lists})
    return found


def fingerprint_of(prompts: Sequence[Comparison], objective: Objective, *what: object) -> str:
    """A hash of all that the reference's log-probabilities depend on: ids, masks, and `what` besides."""
    digest = hashlib.sha256(repr(what).encode())
    for prompt in prompts:
        rows = [prompt.ids, prompt.masks]
        if stranger := objective.strangers.get(prompt.key):
            rows += [stranger.ids, stranger.masks]
        digest.update(json.dumps(rows).encode())
    return digest.hexdigest()


def preference_batches(
    scoring: Scoring,
    objective: Objective,
    reference: Reference,
    parts: Sequence[Sequence[Comparison]],
    micro_tokens: int,
) -> Sequence[MicroBatch]:
    """The micro-batches of one step as tensors. For kto the policy first reads the strangers: its distance to
    the reference is one number for the step, so that accumulation changes nothing."""
    if objective.name in WITHOUT_REFERENCE:
        return [pair_batch(part, None) for part in parts]
    if objective.name != "kto":
        return [pair_batch(part, reference.rows) for part in parts]
    ratios = [
        logp - ref
        for part in objective.strangers_of(parts, micro_tokens)
        for prompt, logps in zip(part, scoring.logps(part), strict=True)
        for logp, ref in zip(logps, reference.strangers[prompt.key], strict=True)
    ]
    return judged_batches(parts, objective.labels, reference.rows, shared_kl(ratios))


def preference_steps(
    scoring: Scoring, objective: Objective, reference: Reference, plan: Plan, prompts: Sequence[Comparison]
) -> Steps:
    """The plan's steps, for `fit`."""

    def steps(
        first: int, _state: dict[str, Any], _metrics: Metrics | None
    ) -> Generator[Step, Metrics | None, None]:
        for parts in plan.steps(prompts, first):
            yield Step(preference_batches(scoring, objective, reference, parts, plan.micro_tokens))

    return steps


@torch.no_grad()
def held_out_figures(
    scoring: Scoring, objective: Objective, reference: Reference, plan: Plan, prompts: Sequence[Comparison]
) -> Metrics:
    """The terms of the loss over held-out prompts: `validation` is the loss, the others `validation_...`."""
    parts = list(in_batches(prompts, plan.micro_tokens))
    batches = preference_batches(scoring, objective, reference, parts, plan.micro_tokens)
    counts: dict[str, int] = {}
    sums: dict[str, tuple[float, str]] = {}
    for batch in batches:
        for per, count in batch.denominators().items():
            counts[per] = counts.get(per, 0) + count
        with _cast(scoring.device, scoring.compute_dtype):
            terms = objective.loss(scoring.forward, batch.to(scoring.device))
        for name, term in terms.items():
            sums[name] = (sums.get(name, (0.0, ""))[0] + float(term.sum), term.per)
    figures = {f"validation_{name}": total / counts[per] for name, (total, per) in sums.items()}
    return {"validation": figures.pop("validation_loss"), **figures}


def memory_line(
    model: CausalLM, prompts: Sequence[Comparison], plan: Plan, compute_dtype: torch.dtype, checkpointed: bool
) -> str:
    """A line about what training will take; UserError if that is too much (see `check_memory`)."""
    device = model.model.embed_tokens.weight.device
    parts = list(in_batches(prompts, plan.micro_tokens))
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
    )
    held, free = resident_bytes(device), free_bytes(device)
    rest = max(0.0, held - 4 * model.num_parameters())
    return check_memory(model.config, setup, rest, None if free is None else held + free)
