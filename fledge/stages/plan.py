"""`fledge plan`: what training would take on so many GPUs, on paper."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from fledge.config import check_at_least, check_positive
from fledge.errors import UserError
from fledge.train.memory import GB, Setup
from fledge.train.optim import OptimizerName
from fledge.train.recipe import adapted, model_config, parse_count, recipe_for
from fledge.train.scale import Machine, StepPlan, plan_step


@dataclass(frozen=True, kw_only=True)
class Config:
    """Say on paper what pretraining would take on so many GPUs: memory, communication, time."""

    gpus: tuple[int, ...] = (8,)
    """Numbers of GPUs, one process each."""
    params: tuple[str, ...] = ("8B",)
    """Sizes of models, as in 1B or 70B."""
    tokens: str | None = None
    """How many tokens to train on, as in 1000B; by default 20 for each parameter."""
    batch_tokens: int | None = None
    """Tokens of an optimizer step; by default from --params."""
    row_tokens: int = 4096
    """Length of the training rows, in tokens."""
    micro_batch_tokens: int = 16_384
    """Most tokens in a GPU at once."""
    vocab_size: int = 131_072
    """Tokens of the vocabulary."""
    optimizer: OptimizerName = "muon"
    """muon (hidden matrices; AdamW for the rest) or adamw (for all)."""
    compute: Literal["bf16", "fp32"] = "bf16"
    """Type of matrix products; weights and what travels are fp32."""
    checkpoint_activations: bool = False
    """Checkpoint them also where they would fit otherwise."""
    gpu_memory_gb: float = 80.0
    """Memory of a GPU."""
    gpu_tflops: float = 989.0
    """Peak of a GPU in bf16, 1e12 operations a second."""
    reached: float = 0.4
    """Share of the peak that a GPU reaches by itself; measure it."""
    node_gpus: int = 8
    """GPUs of a machine."""
    node_gb_per_second: float = 400.0
    """From a GPU to the others of its machine."""
    network_gb_per_second: float = 50.0
    """From a GPU to other machines."""
    hop_microseconds: float = 5.0
    """Delay of one hop of a collective."""
    json: bool = False
    """Print one JSON list in place of the table."""


def main(config: Config) -> None:
    """Compute and print a line for each size and number of GPUs."""
    _check(config)
    machine = Machine(
        memory=config.gpu_memory_gb * GB,
        peak=config.gpu_tflops * 1e12,
        node_gpus=config.node_gpus,
        node_bandwidth=config.node_gb_per_second * GB,
        network_bandwidth=config.network_gb_per_second * GB,
        latency=config.hop_microseconds * 1e-6,
        reached=config.reached,
    )
    found = [
        (params, gpus, *_plan(config, params, gpus, machine))
        for params in config.params
        for gpus in config.gpus
    ]
    if config.json:
        print(json.dumps([_as_dict(params, gpus, plan, total) for params, gpus, plan, total in found]))
        return
    console = Console(markup=False, highlight=False)
    console.print(_table(found))
    for params, gpus, plan, _ in found:
        for line in troubles(params, gpus, plan, machine):
            console.print(line, soft_wrap=True)


def troubles(params: str, gpus: int, plan: StepPlan, machine: Machine) -> list[str]:
    """What stands in the way, most serious first."""
    memory, where = plan.memory, f"{params} on {gpus:,}"
    lines = []
    if not plan.fits:
        need = (memory.total - memory.whole) / GB
        lines.append(f"{where}: a step does not fit: {need:,.0f} GB of {machine.memory / GB:,.0f}")
    elif memory.total > machine.memory:
        lines.append(
            f"{where}: a step fits, but evaluations and saving bring the whole model together on each GPU: "
            f"{memory.total / GB:,.0f} GB of {machine.memory / GB:,.0f}"
        )
    rows = plan.tokens // plan.setup.row_tokens
    if rows < gpus:
        lines.append(f"{where}: a batch has {rows:,} rows, so {gpus - rows:,} GPUs are idle")
    if plan.communication_seconds > plan.compute_seconds:
        lines.append(f"{where}: waits for the network; larger batches (--batch-tokens) would help")
    return lines


def _check(config: Config) -> None:
    check_at_least(config, 1, "batch_tokens", "row_tokens", "micro_batch_tokens", "vocab_size", "node_gpus")
    if not config.gpus or min(config.gpus) < 1:
        raise UserError("--gpus: give numbers of at least 1")
    if not 0 < config.reached <= 1:
        raise UserError(f"--reached {config.reached}: must be above 0 and at most 1")
    check_positive(config, "gpu_memory_gb", "gpu_tflops", "node_gb_per_second", "network_gb_per_second")
    check_at_least(config, 0, "hop_microseconds")


def _plan(config: Config, params: str, gpus: int, machine: Machine) -> tuple[StepPlan, int]:
    """A step, and how many there are."""
    recipe = recipe_for(parse_count(params, "params"), config.vocab_size)
    recipe = adapted(recipe, config.row_tokens, None, batch_tokens=config.batch_tokens)
    setup = Setup(
        rows=max(1, config.micro_batch_tokens // config.row_tokens),
        row_tokens=config.row_tokens,
        optimizer=config.optimizer,
        compute_dtype=torch.bfloat16 if config.compute == "bf16" else torch.float32,
        checkpointed=config.checkpoint_activations,
        segments=False,
        ranks=gpus,
    )
    shape = model_config(recipe, "qwen3", config.vocab_size, config.row_tokens)
    plan = plan_step(shape, setup, recipe.batch_tokens, machine)
    tokens = parse_count(config.tokens, "tokens") if config.tokens else recipe.tokens
    return plan, max(1, round(tokens / plan.tokens))


def _table(found: list[tuple[str, int, StepPlan, int]]) -> Table:
    table = Table(title="one optimizer step", title_justify="left")
    heads = (
        "model", "GPUs", "GB a GPU", "evaluation", "tokens", "micro-batches", "GB received", "compute s",
        "network s", "step s", "efficiency", "of peak", "days",
    )  # fmt: skip
    for head in heads:
        table.add_column(head, justify="left" if head == "model" else "right")
    for params, gpus, plan, steps in found:
        memory = plan.memory
        rows = f"{plan.micro_batches} x {plan.setup.rows}{' *' if plan.setup.checkpointed else ''}"
        table.add_row(
            params, f"{gpus:,}", f"{(memory.total - memory.whole) / GB:,.1f}", f"{memory.total / GB:,.1f}",
            f"{plan.tokens:,}", rows, f"{plan.traffic.total / GB:,.1f}", f"{plan.compute_seconds:.2f}",
            f"{plan.communication_seconds:.2f}", f"{plan.seconds:.2f}", f"{plan.efficiency:.0%}",
            f"{plan.peak_share:.0%}", f"{steps * plan.seconds / 86_400:,.1f}",
        )  # fmt: skip
    table.caption = "micro-batches of each GPU x rows; * activations are checkpointed"
    return table


def _as_dict(params: str, gpus: int, plan: StepPlan, steps: int) -> dict[str, Any]:
    setup = {**asdict(plan.setup), "compute_dtype": str(plan.setup.compute_dtype)}
    return {"params": params, "gpus": gpus, "steps": steps, **asdict(plan), "setup": setup}
