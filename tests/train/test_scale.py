"""Training on many GPUs on paper: hand calculations, and what two processes really sent and held."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fledge.model.config import ModelConfig
from fledge.model.transformer import CausalLM
from fledge.train.memory import Setup, estimate
from fledge.train.optim import state_bytes
from fledge.train.recipe import model_config, recipe_for
from fledge.train.scale import (
    Machine,
    newton_schulz_operations,
    operations,
    plan_step,
    traffic,
)

from .bytes_script import SHAPE

SETUP = Setup(rows=4, row_tokens=128, optimizer="muon", segments=False, ranks=2)
# By hand: queries, keys, values, output (64 x 64 each), gate, up, down (128 x 64), norms (64, 64, 32, 32).
BLOCK = 4 * 64 * 64 + 3 * 64 * 128 + 64 + 64 + 32 + 32
OUTSIDE = 512 * 64 + 64


def billions(params: str) -> ModelConfig:
    return model_config(recipe_for(int(float(params) * 1e9), 131_072), "qwen3", 131_072, 4096)


def test_traffic_by_hand() -> None:
    """Half of everything comes from the other: weights of blocks twice, the rest once, gradients once."""
    found = traffic(SHAPE, SETUP, micro_batches=3)
    assert found.gathered == 3 * 4 * (2 * 3 * BLOCK + OUTSIDE) / 2
    assert found.reduced == 3 * 4 * (3 * BLOCK + OUTSIDE) / 2
    # 12 + 9 matrices in pairs: the first rank owns one of each, and half of its own it has already.
    owned, others = 6 * 64 * 64 + 5 * 64 * 128, 6 * 64 * 64 + 4 * 64 * 128
    assert found.exchanged == 4 * (owned / 2 + others / 2)
    assert found.total == found.gathered + found.reduced + found.exchanged
    assert traffic(SHAPE, replace(SETUP, optimizer="adamw"), 3).exchanged == 0
    assert traffic(SHAPE, replace(SETUP, ranks=1), 3).total == 0


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "micro_batches"), [("adamw", 1), ("muon", 3)])
def test_two_ranks_send_and_hold_what_the_formulas_say(
    optimizer: str, micro_batches: int, tmp_path: Path
) -> None:
    out = tmp_path / "found.json"
    script = Path(__file__).with_name("bytes_script.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend"]
    command = [*launcher, "c10d", "--rdzv-endpoint", "localhost:0", str(script), optimizer]
    made = subprocess.run(
        [*command, str(micro_batches), str(out)], env=environment, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    found = json.loads(out.read_text())
    setup = replace(SETUP, optimizer=optimizer)  # type: ignore[arg-type]
    expected = traffic(SHAPE, setup, micro_batches)
    received = {name: sum(sizes) for name, sizes in found["received"].items()}
    assert received["_allgather_base_"] == pytest.approx(expected.gathered, rel=1e-6)
    assert received["_reduce_scatter_base_"] == pytest.approx(expected.reduced, rel=1e-6)
    assert received.get("alltoall_base_", 0.0) == pytest.approx(expected.exchanged, rel=1e-6)
    assert sum(map(len, found["received"].values())) == expected.collectives
    model = CausalLM(SHAPE)
    assert found["held"]["weights"] == 4 * model.num_parameters() / 2
    assert found["held"]["moments"] == state_bytes(model, optimizer) / 2  # type: ignore[arg-type]


def test_a_share_of_weights_gradients_and_moments() -> None:
    """On so many ranks that a share is nothing, there is left what is brought together to be computed."""
    alone = estimate(SHAPE, replace(SETUP, ranks=1, on_cpu=False), 0.0)
    many = estimate(SHAPE, replace(SETUP, ranks=10**9, on_cpu=False), 0.0)
    assert many.weights == pytest.approx(4 * (OUTSIDE + 2 * BLOCK), rel=1e-6)
    assert many.gradients == pytest.approx(4 * (OUTSIDE + BLOCK), rel=1e-6)
    assert many.optimizer == pytest.approx(0, abs=1e-3)
    assert many.activations == alone.activations
    assert alone.whole == 0


def test_an_evaluation_has_the_whole_model_on_each_rank() -> None:
    shape = billions("70")
    setup = replace(SETUP, rows=1, row_tokens=4096, ranks=1024, on_cpu=False, checkpointed=True)
    found = estimate(shape, replace(setup, compute_dtype=torch.bfloat16), 0.0)
    with torch.device("meta"):
        weights = 4 * CausalLM(shape).num_parameters()
    assert found.total > weights > 5 * (found.total - found.whole)


def test_six_operations_a_weight() -> None:
    """Attention to half of a row: 6 x layers x width x tokens; at a short row 6 a weight is all but all."""
    weights = 3 * BLOCK + OUTSIDE
    assert operations(SHAPE, 100) == 6 * weights + 6 * 3 * 64 * 100
    untied = replace(SHAPE, tie_word_embeddings=False)
    assert operations(untied, 100) == operations(SHAPE, 100)  # reading a table is no product


def test_newton_schulz_by_hand() -> None:
    """Five times x x^T, its square, and a product with x; of a tall matrix its transpose."""
    assert newton_schulz_operations(10, 30) == 5 * (2 * 100 * 30 + 2 * 1000 + 2 * 100 * 30)
    assert newton_schulz_operations(30, 10) == newton_schulz_operations(10, 30)


def plan(params: str, ranks: int, batch_tokens: int = 2**22, machine: Machine | None = None):  # type: ignore[no-untyped-def]
    setup = replace(SETUP, row_tokens=4096, ranks=ranks, compute_dtype=torch.bfloat16)
    return plan_step(billions(params), setup, batch_tokens, machine or Machine())


def test_a_step_is_no_faster_than_its_parts_and_no_better_than_perfect() -> None:
    for params in ("1", "8"):
        for ranks in (1, 8, 64, 512):
            found = plan(params, ranks)
            assert found.seconds >= max(found.compute_seconds, found.communication_seconds)
            assert 0 < found.efficiency <= 1
            assert found.peak_share == pytest.approx(0.4 * found.efficiency)
            assert found.fits == (found.memory.total - found.memory.whole <= 80e9)
            # What all do together is the batch's work, with some of it done twice where that saves memory.
            work = operations(billions(params), 4096) * 2**22 * (4 / 3 if found.setup.checkpointed else 1)
            assert found.compute_seconds == pytest.approx(work / ranks / (0.4 * 989e12), rel=1e-9)


def test_without_communication_and_muon_nothing_is_lost() -> None:
    free = Machine(node_bandwidth=1e30, network_bandwidth=1e30, latency=0.0, memory=1e15)
    setup = replace(SETUP, row_tokens=4096, ranks=64, optimizer="adamw")
    assert plan_step(billions("1"), setup, 2**22, free).efficiency == pytest.approx(1, abs=1e-9)


def test_more_ranks_than_rows_leave_some_idle() -> None:
    """64 rows on 128 ranks: half of what they could do, and less for waiting."""
    assert plan("1", 128, 64 * 4096).efficiency < 0.5


def test_what_does_not_fit_is_said() -> None:
    assert not plan("70", 8).fits
    assert plan("8", 8).setup.checkpointed  # found by itself
    assert plan("1", 8).fits
