"""Optimizers: Muon for the matrices inside the blocks, AdamW for everything else."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW, Muon, Optimizer

from fledge.errors import UserError
from fledge.model.transformer import CausalLM

OptimizerName = Literal["muon", "adamw"]


def make_optimizers(
    model: CausalLM, name: OptimizerName, matrix_lr: float, adam_lr: float, weight_decay: float
) -> list[Optimizer]:
    """Muon (Jordan et al. 2024) on hidden matrices and AdamW on embeddings, head and norms; or AdamW on all.

    Each group remembers its peak as `peak_lr`; the loop multiplies it by the schedule. Raises UserError
    on a rate that is not above 0 or a negative decay.
    """
    for flag, rate in (("matrix-lr", matrix_lr), ("adam-lr", adam_lr)):
        if not 0 < rate < math.inf:
            raise UserError(f"--{flag} {rate}: must be a number above 0")
    if not 0 <= weight_decay < math.inf:
        raise UserError(f"--weight-decay {weight_decay}: must be a number, at least 0")
    matrices, rest = _split(model, name)
    optimizers: list[Optimizer] = []
    if matrices:
        optimizers.append(Muon(matrices, lr=matrix_lr, momentum=0.95, weight_decay=weight_decay))
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers.append(AdamW(groups, lr=adam_lr, betas=(0.9, 0.95), eps=1e-10, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def state_bytes(model: CausalLM, name: OptimizerName) -> float:
    """What the optimizers of `make_optimizers` will hold: a momentum for each weight of Muon's, two moments
    for each of AdamW's, all in fp32."""
    matrices, rest = _split(model, name)
    return 4.0 * sum(p.numel() for p in matrices) + 8.0 * sum(p.numel() for p in rest)


def _split(model: CausalLM, name: OptimizerName) -> tuple[list[Parameter], list[Parameter]]:
    """Muon's weights and AdamW's."""
    named = [(p, n.startswith("model.layers.") and p.ndim == 2) for n, p in model.named_parameters()]
    matrices, rest = [p for p, hidden in named if hidden], [p for p, hidden in named if not hidden]
    return ([], [*matrices, *rest]) if name == "adamw" else (matrices, rest)


def set_lr(optimizers: list[Optimizer], fraction: float) -> None:
    """Give every group its peak learning rate times `fraction`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * fraction


def get_lr(optimizers: list[Optimizer]) -> float:
    """The learning rate of the first group, which all others follow."""
    return float(optimizers[0].param_groups[0]["lr"])


def optimizer_tensors(optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """All state tensors under the names `<optimizer>.<parameter>.<key>`."""
    return {
        f"{i}.{index}.{key}": value.contiguous()
        for i, optimizer in enumerate(optimizers)
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(optimizers: list[Optimizer], tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`, into optimizers made for the same model."""
    for i, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            number, index, key = name.split(".")
            if int(number) == i:
                state.setdefault(int(index), {})[key] = value
        with torch.no_grad():
            optimizer.load_state_dict(
                {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
            )
