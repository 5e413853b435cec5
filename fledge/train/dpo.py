"""Direct preference optimisation: the reference's log-probabilities, steps, held-out figures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fledge.data.comparisons import Comparison, in_batches
from fledge.data.preference_rows import Logps, judged_batches, pair_batch, rows_of
from fledge.device import autocast
from fledge.files import read_json, write_json
from fledge.model.transformer import CausalLM
from fledge.train.comparisons import Plan, comparison_steps
from fledge.train.dpo_losses import (
    WITHOUT_REFERENCE,
    LossName,
    judged_loss,
    pair_loss,
    preferred_loss,
    row_logps,
    shared_kl,
)
from fledge.train.losses import Forward, Term, forward_of
from fledge.train.steps import Metrics, MicroBatch, Steps


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
        with autocast(self.device, self.compute_dtype):
            found = iter(row_logps(self.forward, input_ids, loss_mask).tolist())
        return [[next(found) for _ in prompt.ids] for prompt in part]


def scoring_of(model: CausalLM, compute_dtype: torch.dtype) -> Scoring:
    """The forward pass that `fit` uses for this model."""
    return Scoring(forward_of(model), model.model.embed_tokens.weight.device, compute_dtype)


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

    def batches(parts: list[list[Comparison]]) -> Sequence[MicroBatch]:
        return preference_batches(scoring, objective, reference, parts, plan.micro_tokens)

    return comparison_steps(plan, prompts, batches)


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
        with autocast(scoring.device, scoring.compute_dtype):
            terms = objective.loss(scoring.forward, batch.to(scoring.device))
        for name, term in terms.items():
            sums[name] = (sums.get(name, (0.0, ""))[0] + float(term.sum), term.per)
    figures = {f"validation_{name}": total / counts[per] for name, (total, per) in sums.items()}
    return {"validation": figures.pop("validation_loss"), **figures}
