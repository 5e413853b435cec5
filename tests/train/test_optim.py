"""Which optimizer gets which weights, and that its state survives a save."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim import AdamW, Muon, Optimizer

from fledge.errors import UserError
from fledge.model.config import ModelConfig
from fledge.model.transformer import CausalLM
from fledge.train.optim import (
    get_lr,
    load_optimizer_tensors,
    make_optimizers,
    optimizer_tensors,
    set_lr,
    state_bytes,
)


def model(tied: bool = True, family: str = "qwen3") -> CausalLM:
    made = CausalLM(ModelConfig(family, 30, 16, 24, 2, 2, 1, 8, 32, tie_word_embeddings=tied))
    made.init_weights(torch.Generator().manual_seed(0))
    return made


def names_of(made: CausalLM, optimizer: Optimizer) -> set[str]:
    ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name for name, p in made.named_parameters() if id(p) in ids}


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_muon_gets_exactly_the_matrices_inside_the_blocks(tied: bool, family: str) -> None:
    made = model(tied, family)
    muon, adam = make_optimizers(made, "muon", 0.02, 0.003, 0.1)
    assert isinstance(muon, Muon)
    assert isinstance(adam, AdamW)
    matrices = {
        f"model.layers.{layer}.{part}.weight"
        for layer in (0, 1)
        for part in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        )
    }  # fmt: skip
    assert names_of(made, muon) == matrices
    assert names_of(made, adam) == {name for name, _ in made.named_parameters()} - matrices


def test_adamw_can_have_all() -> None:
    made = model()
    (adam,) = make_optimizers(made, "adamw", 0.02, 0.003, 0.1)
    assert names_of(made, adam) == {name for name, _ in made.named_parameters()}


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_norms_do_not_decay(name: str) -> None:
    made = model()
    for optimizer in make_optimizers(made, name, 0.02, 0.003, 0.1):
        for group in optimizer.param_groups:
            assert {p.ndim for p in group["params"]} == ({2} if group["weight_decay"] == 0.1 else {1})
            assert group["weight_decay"] in (0.0, 0.1)


def test_rates_follow_the_schedule_from_their_own_peaks() -> None:
    optimizers = make_optimizers(model(), "muon", 0.02, 0.003, 0.0)
    for fraction in (0.5, 0.25, 1.0):  # not compounded
        set_lr(optimizers, fraction)
        assert [{group["lr"] for group in o.param_groups} for o in optimizers] == [
            {0.02 * fraction},
            {0.003 * fraction},
        ]
        assert get_lr(optimizers) == 0.02 * fraction


@pytest.mark.parametrize(
    ("rates", "flag"),
    [
        ((0.0, 0.003, 0.0), "--matrix-lr 0.0"),
        ((0.02, -1.0, 0.0), "--adam-lr -1.0"),
        ((math.nan, 0.003, 0.0), "--matrix-lr nan"),
        ((0.02, 0.003, -0.1), "--weight-decay -0.1"),
    ],
)
def test_rates_that_make_no_sense_name_their_flag(rates: tuple[float, float, float], flag: str) -> None:
    with pytest.raises(UserError, match=flag):
        make_optimizers(model(), "muon", *rates)


def train(made: CausalLM, optimizers: list[Optimizer], first: int, steps: int) -> None:
    for step in range(first, first + steps):
        ids = torch.randint(30, (2, 9), generator=torch.Generator().manual_seed(step))
        made(ids).float().logsumexp(-1).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_saved_state_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    reference = model()
    train(reference, make_optimizers(reference, name, 0.02, 0.003, 0.1), 0, 6)

    first = model()
    optimizers = make_optimizers(first, name, 0.02, 0.003, 0.1)
    train(first, optimizers, 0, 3)
    save_file(optimizer_tensors(optimizers), tmp_path / "optimizer.safetensors")

    second = model()
    second.load_state_dict(first.state_dict())
    optimizers = make_optimizers(second, name, 0.02, 0.003, 0.1)
    load_optimizer_tensors(optimizers, load_file(tmp_path / "optimizer.safetensors"))
    train(second, optimizers, 3, 3)
    assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(reference.parameters(), first.parameters(), strict=True))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_the_state_is_as_large_as_foretold(name: str, tied: bool) -> None:
    made = model(tied)
    optimizers = make_optimizers(made, name, 0.02, 0.003, 0.1)
    train(made, optimizers, 0, 1)
    moments = [t for key, t in optimizer_tensors(optimizers).items() if not key.endswith(".step")]
    assert state_bytes(made, name) == sum(t.nbytes for t in moments)
