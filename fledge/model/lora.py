"""Low-rank adapters (LoRA): small matrices beside frozen ones, in PEFT's file format.

A linear layer with weight W (O, I) becomes W + (alpha / r) B A, with A (r, I) and B (O, r) (Hu et al. 2021).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fledge.errors import UserError
from fledge.files import read_json, write_json
from fledge.model.checkpoint import read_file
from fledge.model.heads import RewardModel
from fledge.model.transformer import CausalLM
from fledge.types import ModelFiles

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# What PEFT writes in front of every name.
PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoRA:
    """How large the adapter is, and beside which layers it stands."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"--lora-rank {self.rank}: must be at least 1")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"--lora-alpha {self.alpha}: must be a number above 0")
        wrong = next((name for name in self.targets if name not in TARGETS), None)
        if wrong is not None or not self.targets:
            raise UserError(f"--lora-targets {wrong or ''}: choose from {', '.join(TARGETS)}")


class LoRALinear(nn.Module):
    """A frozen linear layer with an adapter; the names of its own weight and bias stay."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.weight, self.bias = linear.weight, linear.bias
        place = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False, **place)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False, **place)
        nn.init.zeros_(self.lora_B.weight)  # at first the adapter changes nothing

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        out: Tensor = F.linear(x, self.weight, self.bias) + self.scale * self.lora_B(self.lora_A(x))
        return out

    def merged(self) -> nn.Linear:
        """The linear layer that computes the same."""
        outputs, inputs = self.weight.shape
        place = {"device": self.weight.device, "dtype": self.weight.dtype}
        linear = nn.Linear(inputs, outputs, bias=self.bias is not None, **place)
        delta = self.lora_B.weight.float() @ self.lora_A.weight.float()
        linear.weight = nn.Parameter((self.weight.float() + self.scale * delta).to(self.weight.dtype))
        if self.bias is not None:
            linear.bias = self.bias
        return linear


def add_lora(model: CausalLM | RewardModel, lora: LoRA, generator: torch.Generator) -> None:
    """Freeze the model and put an adapter beside each target; a reward model's head is trained whole."""
    model.requires_grad_(False)
    for layer in model.model.layers:
        for parent, name, child in list(_linears(layer)):
            if name in lora.targets:
                adapted = LoRALinear(child, lora.rank, lora.alpha / lora.rank)
                bound = child.in_features**-0.5  # PEFT's: Kaiming's with a = sqrt(5)
                drawn = torch.rand(adapted.lora_A.weight.shape, generator=generator) * 2 * bound - bound
                adapted.lora_A.weight.data.copy_(drawn)
                setattr(parent, name, adapted)
    if isinstance(model, RewardModel):
        model.score.requires_grad_(True)


@torch.no_grad()
def merge_lora(model: CausalLM | RewardModel) -> None:
    """Take every adapter into the weights it stands beside."""
    for module in list(model.model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoRALinear):
                setattr(module, name, child.merged())
    model.requires_grad_(True)


def _linears(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(its parent, its name there, a linear layer) for all that are inside."""
    for parent in module.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                yield parent, name, child


# Files.


def save_adapter(
    directory: Path,
    model: CausalLM | RewardModel,
    lora: LoRA,
    base: Path,
    tokenizer: ModelFiles,
    lineage: dict[str, Any],
) -> None:
    """Write a model's adapter into an existing folder, as PEFT does; `base` is the model it belongs to."""
    tokenizer.save(directory)
    write_json(directory / "lineage.json", lineage)
    is_reward = isinstance(model, RewardModel)
    trained = {f"{PREFIX}{name}": p.detach().contiguous() for name, p in trained_parameters(model).items()}
    save_file(trained, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if is_reward else "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": list(lora.targets),
        "modules_to_save": ["score"] if is_reward else None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    write_json(directory / ADAPTER_CONFIG, config)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name, what is not frozen."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def read_adapter(directory: Path) -> dict[str, Tensor]:
    """The tensors of an adapter under the names of the model's parameters."""
    tensors = read_file(directory / ADAPTER_WEIGHTS)
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def adapter_config(directory: Path) -> dict[str, Any]:
    """`adapter_config.json`, checked. Raises UserError for what is not implemented."""
    path = directory / ADAPTER_CONFIG
    if not path.exists():
        raise UserError(f"{directory}: no adapter: it has no {ADAPTER_CONFIG}")
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds no JSON object")
    only: dict[str, tuple[Any, ...]] = {
        "peft_type": ("LORA",),
        "bias": ("none", None),
        "fan_in_fan_out": (False, None),
        "use_dora": (False, None),
        "alora_invocation_tokens": (None, []),
        "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
        "rank_pattern": ({}, None),
        "alpha_pattern": ({}, None),
        "modules_to_save": (None, [], ["score"], ["classifier", "score"]),
    }
    for key, allowed in only.items():
        if config.get(key) not in allowed:
            raise UserError(f"{path}: {key} = {config.get(key)!r} is not supported")
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UserError(f"{path}: {key} = {value!r} is not a number above 0")
    return config


@torch.no_grad()
def load_adapter(model: CausalLM | RewardModel, directory: Path) -> None:
    """Put an adapter's tensors beside (and, of a reward model, its head into) a model's weights.

    Raises UserError for an adapter of another kind, or one that does not fit the model.
    """
    config, tensors = adapter_config(directory), read_adapter(directory)
    rank = int(config["r"])
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    modules = dict(model.named_modules())
    where = directory / ADAPTER_WEIGHTS
    for name in sorted(tensors):
        if not name.endswith(".lora_A.weight"):
            continue
        path = name.removesuffix(".lora_A.weight")
        parent, _, child = path.rpartition(".")
        linear = modules.get(path)
        if not path.startswith("model.layers."):
            raise UserError(f"{where}: adapts {path}; only layers inside the blocks can be adapted here")
        if not isinstance(linear, nn.Linear):
            raise UserError(f"{where}: {name} stands beside a layer that the model does not have")
        setattr(modules[parent], child, LoRALinear(linear, rank, scale))
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name not in parameters or not (".lora_" in name or name == "score.weight"):
            raise UserError(f"{where}: holds {name}, which has no place in the model")
        if parameters[name].shape != tensor.shape:
            raise UserError(
                f"{where}: {name} has shape {tuple(tensor.shape)}, the model calls for "
                f"{tuple(parameters[name].shape)}; the adapter belongs to another model"
            )
        parameters[name].copy_(tensor)
    missing = [name for name in parameters if ".lora_" in name and name not in tensors]
    if missing:
        raise UserError(f"{where}: has no {missing[0]}")


def base_of(directory: Path) -> Path:
    """The model directory that an adapter names as its own."""
    name = adapter_config(directory).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{directory / ADAPTER_CONFIG}: names no base model; give it with --base")
    return Path(name)


def has_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter."""
    return (directory / ADAPTER_CONFIG).exists()


def lora_of(rank: int | None, alpha: float | None, targets: tuple[str, ...]) -> LoRA | None:
    """The adapter that flags ask for: alpha is twice the rank by default; None without a rank."""
    if rank is None:
        if alpha is not None or targets != TARGETS:
            raise UserError("--lora-alpha and --lora-targets go with --lora-rank")
        return None
    return LoRA(rank, 2.0 * rank if alpha is None else alpha, targets)


def parameter_line(model: nn.Module) -> str:
    """`56,789 parameters`, and how many are trained, where that is not all."""
    trained = sum(p.numel() for p in trained_parameters(model).values())
    total = sum(p.numel() for p in model.parameters())
    return f"{total:,} parameters" + (f", {trained:,} of them trained" if trained < total else "")
