"""How much memory training will take, said before the first step, and what would fit where it is too much.

docs/memory.md derives the formulas and compares them with measurements.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from fledge.errors import UserError
from fledge.model.config import ModelConfig
from fledge.model.transformer import EXPLICIT_ATTENTION_KEYS, CausalLM
from fledge.train import losses
from fledge.train.optim import OptimizerName, state_bytes

GB = 1e9
# What a CPU's heap holds for each byte in use, as blocks of many sizes leave gaps (see `keep_freed_memory`);
# more where gradients stay in between from one micro-batch to the next; compiled code leaves none. Measured;
# CUDA's share is a guess.
HEAP_SHARE, ACCUMULATING_HEAP_SHARE, COMPILED_HEAP_SHARE, CUDA_SHARE = 1.4, 1.9, 1.0, 1.1
# Modules, kernels and their work space that the first step brings, and the compiler's. Measured.
KERNEL_BYTES, COMPILER_BYTES = 90e6, 90e6


@dataclass(frozen=True)
class Setup:
    """What decides how much a step holds; `rows` are those of a micro-batch."""

    rows: int
    row_tokens: int
    optimizer: OptimizerName
    compute_dtype: torch.dtype = torch.float32
    compiled: bool = False
    checkpointed: bool = False
    segments: bool = True
    """Whether rows hide parts from each other."""
    accumulates: bool = False
    """Whether a step has several micro-batches."""
    on_cpu: bool = True
    trained_share: float = 1.0
    """Share of the weights that have gradients and moments (adapters: few)."""
    ranks: int = 1
    """Processes that the model is spread over."""
    neighbours: int = 1
    """How many of them share this machine's memory, where they compute on its CPU."""

    @property
    def is_compiled(self) -> bool:
        """Several ranks train without torch.compile, whatever was asked for."""
        return self.compiled and self.ranks == 1


@dataclass(frozen=True)
class Estimate:
    """Bytes at the fullest moment of training."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    rest: float
    whole: float = 0.0
    """Of several ranks: what an evaluation takes beyond a step, as each then has all the weights."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.rest + self.whole

    def __str__(self) -> str:
        shown = {name: value for name, value in vars(self).items() if value or name != "whole"}
        parts = ", ".join(f"{name} {value / GB:.1f}" for name, value in shown.items())
        return f"about {self.total / GB:.1f} GB ({parts})"


def estimate(config: ModelConfig, setup: Setup, rest: float) -> Estimate:
    """What training takes; `rest` bytes are the process's without the model (`resident_bytes`)."""
    with torch.device("meta"):  # shapes without memory
        model = CausalLM(config)
    weights = 4.0 * model.num_parameters()
    activations = _saved_bytes(config, setup) + head_bytes(config, setup)
    if setup.compute_dtype != torch.float32:  # the matrices once more
        activations += 2.0 * sum(p.numel() for p in model.parameters() if p.ndim == 2)
        if setup.ranks > 1 and setup.checkpointed:  # but then only those of a block at a time
            activations -= 2.0 * (config.num_hidden_layers - 1) * unit_sizes(model)[1]
    rest += setup.on_cpu * (KERNEL_BYTES + setup.is_compiled * COMPILER_BYTES)
    # With several ranks weights that come and go leave gaps too.
    heap = ACCUMULATING_HEAP_SHARE if setup.accumulates or setup.ranks > 1 else HEAP_SHARE
    share = CUDA_SHARE if not setup.on_cpu else COMPILED_HEAP_SHARE if setup.is_compiled else heap
    trained = setup.trained_share
    moments = trained * state_bytes(model, setup.optimizer)
    one = Estimate(weights, trained * weights, moments, share * activations, rest)
    return one if setup.ranks == 1 else _spread(one, unit_sizes(model), setup)


def unit_sizes(model: CausalLM) -> tuple[int, int]:
    """Weights that are brought together at once where a model is spread over ranks: those outside the blocks
    (from a forward pass to the end of its backward pass), and those of a block."""
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    return model.num_parameters() - block * len(model.model.layers), block


def _spread(one: Estimate, units: tuple[int, int], setup: Setup) -> Estimate:
    """What each of several ranks holds of that: its share, and while it computes the weights outside the
    blocks and of two blocks (the next one comes while one is computed), with the gradients of one."""
    (outside, block), count = units, setup.ranks
    step = Estimate(
        one.weights / count + 4.0 * (outside + 2 * block),
        one.gradients / count + 4.0 * setup.trained_share * (outside + block),
        one.optimizer / count,
        one.activations,
        one.rest,
    )
    whole = one.weights + one.weights / count + one.optimizer / count + one.rest
    return replace(step, whole=max(0.0, whole - step.total))


def block_bytes(config: ModelConfig, setup: Setup) -> float:
    """What the backward pass of one block needs of its forward pass, for each token of a row."""
    C, D, F, T = config.hidden_size, config.head_dim, config.intermediate_size, setup.row_tokens
    H, G, w = config.num_attention_heads, config.num_key_value_heads, setup.compute_dtype.itemsize
    low, masks = w < 4, 1.0 if setup.segments else 1 / setup.rows  # a mask for each row, or one for all
    if setup.is_compiled:  # norms are computed again; their outputs are kept as the products read them
        total = 2 * C * 4 + 2 * C * w + config.has_qk_norm * (H + G) * D * w + 3 * F * w
    else:  # autocast casts a norm's output anew for each of the five products that read it
        total = 4 * C * 4 + (5 * C * w if low else 2 * C * 4)
        total += config.has_qk_norm * 2 * (H + G) * D * 4 + 4 * F * w
    if setup.on_cpu and T <= EXPLICIT_ATTENTION_KEYS:  # softmax weights; keys of every head
        return total + 4 * H * D * w + H * T * (4 + w * low) + (0 if setup.is_compiled else masks * T)
    return total + 2 * (H + G) * D * w + masks * T * w


def _saved_bytes(config: ModelConfig, setup: Setup) -> float:
    """What the trunk keeps for the backward pass: all blocks, or their inputs and one at a time, which then
    has its gradients beside it."""
    block, layers, row = block_bytes(config, setup), config.num_hidden_layers, 4 * config.hidden_size
    kept = layers * row + 2 * block if setup.checkpointed else layers * block
    return float(setup.rows * setup.row_tokens * (2 * row + kept))


def head_bytes(config: ModelConfig, setup: Setup) -> float:
    """Scores over the vocabulary, their log-softmax and its gradient, in fp32; compiled: scores and gradient,
    in the type of the products; or a chunk of scores, with its copies in bf16."""
    scores = setup.rows * setup.row_tokens * config.vocab_size
    if scores > losses.WHOLE_SCORES:
        return losses.CHUNK_SCORES * (4.0 if setup.compute_dtype == torch.float32 else 8.0)
    return scores * (2.0 * setup.compute_dtype.itemsize if setup.is_compiled else 12.0)


def check_memory(
    config: ModelConfig,
    setup: Setup,
    rest: float,
    limit: float | None,
    smaller: Callable[[int], ModelConfig] | None = None,
) -> str:
    """A line for the plan. Raises UserError, with what would fit, if the estimate is over `limit` bytes.

    `smaller` gives the model of so many parameters where the size is free.
    """
    need = estimate(config, setup, rest)
    if limit is None:
        return f"memory: {need}"
    if need.total <= limit:
        return f"memory: {need} of {limit / GB:.1f} GB"
    frugal = replace(setup, checkpointed=True)
    fitting = [_fewer_rows(config, less, rest, limit) for less in (setup, frugal)]
    ways = list(dict.fromkeys(_flags(setup, less) for less in fitting if less is not None))
    params = need.weights / 4
    while not ways and smaller is not None and (params := 0.8 * params) > 1e5:
        try:
            less = _fewer_rows(smaller(int(params)), frugal, rest, limit)
        except UserError:  # the vocabulary alone is larger
            break
        ways = [] if less is None else [f"--params {params / 1e6:.1f}M {_flags(setup, less)}".strip()]
    advice = f"this would fit: {', or '.join(ways)}" if ways else "take a smaller model, or shorter rows"
    raise UserError(f"training would take {need}, and there are {limit / GB:.1f} GB; {advice}")


def check_memory_here(
    config: ModelConfig,
    setup: Setup,
    device: torch.device,
    parameters: int = 0,
    other: float = 0.0,
    smaller: Callable[[int], ModelConfig] | None = None,
) -> str:
    """`check_memory` with what this process holds and can still take. `parameters`: those of a model that is
    made already, so that they are not counted twice; `other`: bytes that the estimate does not know of."""
    held, free = resident_bytes(device), free_bytes(device)
    if free is not None and setup.on_cpu:
        free /= setup.neighbours
    rest = max(0.0, held - 4 * parameters) + other
    return check_memory(config, setup, rest, None if free is None else held + free, smaller)


def trained_share(model: nn.Module) -> float:
    """The share of a model's weights that have gradients."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained) / sum(size for size, _ in sizes)


def _fewer_rows(config: ModelConfig, setup: Setup, rest: float, limit: float) -> Setup | None:
    """The same with as many rows at once as fit, by halving; None if one is too many."""
    while estimate(config, setup, rest).total > limit:
        if setup.rows == 1:
            return None
        setup = replace(setup, rows=setup.rows // 2, accumulates=True)
    return setup


def _flags(setup: Setup, other: Setup) -> str:
    """What to add to a command for the other setup."""
    flags = ["--checkpoint-activations"] if other.checkpointed > setup.checkpointed else []
    if other.rows < setup.rows:
        flags.append(f"--micro-batch-tokens {other.rows * other.row_tokens}")
    return " ".join(flags)


def resident_bytes(device: torch.device) -> float:
    """What this process holds on the device now."""
    if device.type == "cuda":
        return float(torch.cuda.memory_reserved(device))
    status = Path("/proc/self/status")
    if not status.exists():
        return 0.4 * GB  # Python and PyTorch, where nobody tells
    return 1024.0 * int(re.findall(r"VmRSS:\s+(\d+)", status.read_text(encoding="utf-8"))[0])


def free_bytes(device: torch.device, root: Path = Path("/")) -> float | None:
    """What this process can still take: of the machine's memory and its control groups' limits, the least;
    of a CUDA device's. None where nobody tells."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    meminfo = root / "proc/meminfo"
    if device.type != "cpu" or not meminfo.exists():
        return None
    available = 1024.0 * int(re.findall(r"MemAvailable:\s+(\d+)", meminfo.read_text(encoding="utf-8"))[0])
    return min(available, *_group_bytes(root), available)


def _group_bytes(root: Path) -> Iterator[float]:
    """What the limits of this process's control groups (versions 1 and 2) leave; file caches give way."""
    for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "memory":
            mount, names = "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        elif not controllers:
            mount, names = "", ("memory.max", "memory.current", "inactive_file")
        else:
            continue
        folder = Path(group.lstrip("/"))
        for place in (folder, *folder.parents):  # a container may see only the last, as the whole
            limit, usage, stat = (
                root / "sys/fs/cgroup" / mount / place / name for name in (*names[:2], "memory.stat")
            )
            if limit.exists() and (most := limit.read_text(encoding="utf-8").strip()) != "max":
                cached = re.search(rf"^{names[2]} (\d+)", stat.read_text(encoding="utf-8"), re.MULTILINE)
                used = int(usage.read_text(encoding="utf-8")) - int(cached[1] if cached else 0)
                yield float(int(most) - used)
