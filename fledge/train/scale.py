"""Training on many GPUs on paper: memory, communication and time of a step, from a model's shape.

docs/scale.md derives the formulas, compares them with measurements and says what would break first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from fledge.model.config import ModelConfig
from fledge.model.transformer import CausalLM
from fledge.train.memory import Estimate, Setup, estimate, unit_sizes

# Of a process with CUDA, its libraries and NCCL's buffers. A guess.
CUDA_BYTES = 3e9
WORD = 4.0  # weights and gradients travel in fp32


@dataclass(frozen=True)
class Machine:
    """What a GPU can do, and the wires between them; by default an H100 with 80 GB in a machine of eight."""

    memory: float = 80e9
    """Bytes of a GPU."""
    peak: float = 989e12
    """bf16 operations a second."""
    node_gpus: int = 8
    node_bandwidth: float = 400e9
    """Bytes a second from a GPU to others of its machine."""
    network_bandwidth: float = 50e9
    """Bytes a second from a GPU to other machines."""
    latency: float = 5e-6
    """Seconds of one hop of a collective."""
    reached: float = 0.4
    """Share of the peak that a GPU reaches where it waits for no other."""

    def bandwidth(self, ranks: int) -> float:
        """Of all-gather and reduce-scatter for each GPU: rings between machines use all their wires."""
        if ranks <= self.node_gpus:
            return self.node_bandwidth
        return min(self.node_bandwidth, self.node_gpus * self.network_bandwidth)


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank receives in a step, and how many collectives bring them."""

    gathered: float
    """Weights, before they are used."""
    reduced: float
    """Gradients."""
    exchanged: float
    """Muon's matrices, to their owners and back."""
    collectives: int

    @property
    def total(self) -> float:
        """All of it."""
        return self.gathered + self.reduced + self.exchanged


@dataclass(frozen=True)
class StepPlan:
    """A step of training on so many GPUs."""

    setup: Setup
    micro_batches: int
    """Of each rank."""
    tokens: int
    memory: Estimate
    fits: bool
    """A step in a GPU's memory; an evaluation may take more (`memory.whole`)."""
    traffic: Traffic
    compute_seconds: float
    communication_seconds: float
    seconds: float
    efficiency: float
    """Of what as many GPUs would do that never waited for each other."""
    peak_share: float
    """Useful operations by the GPUs' peak (MFU)."""


def operations(config: ModelConfig, row_tokens: int) -> float:
    """Of a token, forward and backward: six for each weight of a product, and attention to half of the row
    (Kaplan et al. 2020; Chowdhery et al. 2022, "PaLM", appendix B)."""
    with torch.device("meta"):
        model = CausalLM(config)
    table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    width = config.num_attention_heads * config.head_dim
    attention = 6.0 * config.num_hidden_layers * width * row_tokens
    return 6.0 * (model.num_parameters() - table) + attention


def traffic(config: ModelConfig, setup: Setup, micro_batches: int) -> Traffic:
    """Of a step: for each micro-batch the weights of a block come together twice, in the forward and in the
    backward pass, those outside the blocks once; gradients are summed to their owners once."""
    if setup.ranks == 1:
        return Traffic(0.0, 0.0, 0.0, 0)
    outside, blocks, matrices = _sizes(config)
    others = (setup.ranks - 1) / setup.ranks
    layers = config.num_hidden_layers
    exchanged, rounds = 0.0, 0
    if setup.optimizer == "muon":
        sizes = sorted(rows * columns for rows, columns in matrices)
        groups = [sizes[i : i + setup.ranks] for i in range(0, len(sizes), setup.ranks)]
        # The first rank, which owns one of each group: the others' rows of it, and its own rows of the rest.
        exchanged = WORD * sum(own * others + sum(rest) / setup.ranks for own, *rest in groups)
        rounds = 2 * len(groups)
    return Traffic(
        gathered=micro_batches * WORD * (2 * blocks + outside) * others,
        reduced=micro_batches * WORD * setup.trained_share * (blocks + outside) * others,
        exchanged=exchanged,
        collectives=micro_batches * (3 * layers + 2) + rounds,
    )


def newton_schulz_operations(rows: int, columns: int, steps: int = 5) -> float:
    """Of Muon for one matrix: three products a step, on its shorter side."""
    short, long = sorted((rows, columns))
    return steps * (2.0 * short * short * long + 2.0 * short**3 + 2.0 * short * short * long)


def plan_step(config: ModelConfig, setup: Setup, batch_tokens: int, machine: Machine) -> StepPlan:
    """The step of a global batch with as many rows at once as fit, if need be with checkpointed activations;
    `setup` has the ranks, the optimizer and the length of rows, and the most rows at once."""
    rows = max(1, batch_tokens // setup.row_tokens)
    own = -(-rows // setup.ranks)
    most = max(1, min(setup.rows, own))
    setup, memory, fits = _fitting(config, replace(setup, rows=most, on_cpu=False), own, machine)
    micro_batches = -(-own // setup.rows)
    tokens = rows * setup.row_tokens
    moved = traffic(config, setup, micro_batches)
    useful = operations(config, setup.row_tokens) * tokens
    speed = machine.peak * machine.reached
    # The fullest rank decides: all wait for it.
    share = operations(config, setup.row_tokens) * own * setup.row_tokens
    compute = share * (4 / 3 if setup.checkpointed else 1.0) / speed
    outside, blocks, matrices = _sizes(config)
    wires = machine.bandwidth(setup.ranks)
    hops = moved.collectives * (setup.ranks - 1) * machine.latency
    communication = (moved.gathered + moved.reduced) / wires + hops
    alone = setup.ranks <= machine.node_gpus
    seconds = max(compute, communication)
    if setup.ranks > 1:  # the first weights, before there is anything to compute
        seconds += WORD * (outside + blocks / config.num_hidden_layers) / wires
    if setup.optimizer == "muon":  # between the steps
        work = sum(newton_schulz_operations(*matrix) for matrix in matrices)
        owned = math.ceil(len(matrices) / setup.ranks) * setup.ranks / len(matrices)
        seconds += work * owned / setup.ranks / speed
        seconds += moved.exchanged / (machine.node_bandwidth if alone else machine.network_bandwidth)
    ideal = useful / setup.ranks / speed
    return StepPlan(
        setup, micro_batches, tokens, memory, fits, moved, compute, communication, seconds,
        efficiency=ideal / seconds, peak_share=ideal / seconds * machine.reached,
    )  # fmt: skip


def _fitting(config: ModelConfig, setup: Setup, own: int, machine: Machine) -> tuple[Setup, Estimate, bool]:
    """As many rows at once as fit into a GPU, by halving; checkpointed where not even one does."""
    for checkpointed in (setup.checkpointed, True):
        tried = replace(setup, checkpointed=checkpointed)
        while True:
            tried = replace(tried, accumulates=tried.rows < own)
            memory = estimate(config, tried, CUDA_BYTES)
            if memory.total - memory.whole <= machine.memory:
                return tried, memory, True
            if tried.rows == 1:
                break
            tried = replace(tried, rows=tried.rows // 2)
    return tried, memory, False


def _sizes(config: ModelConfig) -> tuple[int, int, list[tuple[int, int]]]:
    """Weights outside the blocks and in all blocks, and the shapes of Muon's matrices."""
    with torch.device("meta"):
        model = CausalLM(config)
    outside, block = unit_sizes(model)
    shapes = [(int(p.shape[0]), int(p.shape[1])) for p in model.model.layers.parameters() if p.ndim == 2]
    return outside, block * config.num_hidden_layers, shapes
