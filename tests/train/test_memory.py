"""Estimates of memory: formulas against what autograd really keeps, limits of the machine, and advice."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fledge.errors import UserError
from fledge.model.config import ModelConfig
from fledge.model.transformer import CausalLM
from fledge.train import memory
from fledge.train.memory import (
    GB,
    Setup,
    block_bytes,
    check_memory,
    check_memory_here,
    estimate,
    free_bytes,
    head_bytes,
    resident_bytes,
    trained_share,
)

CPU = torch.device("cpu")


def shape(layers: int = 2, family: str = "qwen3", groups: int = 2, width: int = 256) -> ModelConfig:
    return ModelConfig(family, 500, width, width * 11 // 4, layers, width // 64, groups, 64, 2048)


def kept_bytes(config: ModelConfig, setup: Setup) -> int:
    """What autograd keeps of the trunk's forward pass, weights and casts of weights left out."""
    model = CausalLM(config)
    model.init_weights(torch.Generator().manual_seed(0))
    model.checkpoint_activations = setup.checkpointed
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {p.shape for p in model.parameters() if p.ndim == 2}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        base = tensor.untyped_storage().data_ptr()
        if base not in weights and tensor.shape not in shapes and tensor.shape[::-1] not in shapes:
            kept[base] = tensor
        return tensor

    ids = torch.zeros(setup.rows, setup.row_tokens, dtype=torch.int64)
    low = setup.compute_dtype != torch.float32
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", setup.compute_dtype, enabled=low),
    ):
        out = model.hidden_rows(ids, ids if setup.segments else None)
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "row_tokens"), [(6, 128), (2, 640)])
@pytest.mark.parametrize("segments", [False, True])
def test_a_block_keeps_what_the_formula_says(
    family: str, groups: int, dtype: torch.dtype, rows: int, row_tokens: int, segments: bool
) -> None:
    setup = Setup(rows, row_tokens, "muon", dtype, segments=segments)
    more, less = (kept_bytes(shape(layers, family, groups), setup) for layers in (3, 1))
    assert (more - less) / 2 / rows / row_tokens == pytest.approx(
        block_bytes(shape(1, family, groups), setup), rel=0.01
    )


def test_checkpointing_keeps_the_inputs_of_the_blocks() -> None:
    setup = Setup(2, 64, "muon", checkpointed=True)
    more, less = (kept_bytes(shape(layers), setup) for layers in (5, 2))
    assert (more - less) / 3 == pytest.approx(2 * 64 * 256 * 4, rel=0.01)
    plain, frugal = (estimate(shape(12), replace(setup, checkpointed=on), 0.0) for on in (False, True))
    assert frugal.activations < plain.activations / 3


def test_by_hand() -> None:
    """qwen3 with 4 heads of 64, width 256, MLP 704, rows of 128, fp32, for a token and block: residuals and
    norms 6 x 256, queries and keys before and after their norms 4 x 256, q, k, v and output 4 x 256, softmax
    4 x 128, MLP 4 x 704, each of 4 bytes; a mask of 128 bytes."""
    setup = Setup(8, 128, "adamw", segments=True)
    assert block_bytes(shape(groups=4), setup) == 4 * (14 * 256 + 4 * 128 + 4 * 704) + 128
    assert head_bytes(shape(), setup) == 3 * 4 * 8 * 128 * 500
    need = estimate(shape(), setup, 1e9)
    parameters = CausalLM(shape()).num_parameters()
    assert (need.weights, need.gradients) == (4 * parameters, 4 * parameters)
    assert need.optimizer == 8 * parameters
    assert need.rest >= 1e9
    assert need.total == sum(vars(need).values())


def test_a_large_vocabulary_costs_no_more_than_its_chunks() -> None:
    setup = Setup(4, 1024, "muon")
    assert head_bytes(replace(shape(), vocab_size=151_936), setup) < 0.5 * GB
    assert head_bytes(replace(shape(), vocab_size=32_000), setup) > 1.5 * GB


# What would fit.


def advice(setup: Setup, limit: float, **more: Any) -> list[str]:
    with pytest.raises(UserError, match=r"training would take about .* GB") as caught:
        check_memory(shape(4), setup, 0.3 * GB, limit, **more)
    assert "\n" not in str(caught.value)
    return re.split(r"; this would fit: |, or ", str(caught.value))[1:]


def obey(setup: Setup, flags: str) -> Setup:
    rows = re.search(r"--micro-batch-tokens (\d+)", flags)
    return replace(
        setup,
        rows=int(rows[1]) // setup.row_tokens if rows else setup.rows,
        checkpointed=setup.checkpointed or "--checkpoint-activations" in flags,
        accumulates=setup.accumulates or rows is not None,
    )


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("limit", [0.7, 0.9, 1.6])
def test_what_is_advised_fits_and_twice_as_much_does_not(checkpointed: bool, limit: float) -> None:
    setup = Setup(128, 256, "muon", checkpointed=checkpointed)
    ways = advice(setup, limit * GB)
    assert len(ways) == (1 if checkpointed else 2)
    for way in ways:
        fitting = obey(setup, way)
        assert fitting != setup
        assert check_memory(shape(4), fitting, 0.3 * GB, limit * GB).startswith("memory: about ")
        if fitting.rows < setup.rows:
            rows = 2 * fitting.rows
            double = replace(fitting, rows=rows, accumulates=rows < setup.rows)
            assert estimate(shape(4), double, 0.3 * GB).total > limit * GB


def test_checkpointing_alone_may_do() -> None:
    setup = Setup(16, 256, "muon")
    limit = estimate(shape(4), replace(setup, checkpointed=True), 0.3 * GB).total
    fewer_rows, checkpointing = advice(setup, limit)
    assert checkpointing == "--checkpoint-activations"
    assert fewer_rows.startswith("--micro-batch-tokens ")


def test_a_smaller_model_where_nothing_else_fits() -> None:
    setup = Setup(2, 256, "muon")

    def smaller(params: int) -> ModelConfig:
        return shape(max(1, round(params / 1e6)))

    least = Setup(1, 256, "muon", checkpointed=True, accumulates=True)
    limit = estimate(shape(2), least, 0.3 * GB).total
    (way,) = advice(setup, limit, smaller=smaller)
    found = re.match(r"--params ([\d.]+)M --checkpoint-activations --micro-batch-tokens 256$", way)
    assert found is not None
    assert estimate(smaller(int(1e6 * float(found[1]))), obey(setup, way), 0.3 * GB).total <= limit
    with pytest.raises(UserError, match=r"there are 0\.3 GB; take a smaller model, or shorter rows"):
        check_memory(shape(4), setup, 0.3 * GB, 0.3 * GB, smaller)
    with pytest.raises(UserError, match="take a smaller model"):  # nobody asked for --params
        check_memory(shape(4), setup, 0.3 * GB, limit)


def test_the_line_of_the_plan() -> None:
    line = check_memory(shape(4), Setup(16, 256, "muon"), 0.3 * GB, 24 * GB)
    number = r"\d+\.\d"
    parts = rf"weights {number}, gradients {number}, optimizer {number}, activations {number}, rest {number}"
    assert re.fullmatch(rf"memory: about {number} GB \({parts}\) of 24\.0 GB", line)
    assert check_memory(shape(4), Setup(16, 256, "muon"), 0.3 * GB, None) == line.removesuffix(" of 24.0 GB")


def test_what_is_held_and_what_is_free_count(monkeypatch: pytest.MonkeyPatch) -> None:
    config, setup = shape(4), Setup(16, 256, "muon")
    monkeypatch.setattr(memory, "resident_bytes", lambda device: 2 * GB)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 6 * GB)
    assert check_memory_here(config, setup, CPU) == check_memory(config, setup, 2 * GB, 8 * GB)
    made = check_memory_here(config, setup, CPU, parameters=250_000_000, other=0.5 * GB)
    assert made == check_memory(config, setup, 1.5 * GB, 8 * GB), "a model that is there is in both"
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    assert check_memory_here(config, setup, CPU, 10**9) == check_memory(config, setup, 0.0, None)


def test_the_share_that_is_trained_by_hand() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False), torch.nn.Linear(4, 2))
    assert trained_share(model) == 1.0
    model[0].requires_grad_(False)
    assert trained_share(model) == 10 / 22


# The machine.


def machine(root: Path, cgroup: str, groups: dict[str, dict[str, str]]) -> Path:
    """A made-up /proc and /sys: 8,000 KiB available."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal:  16000 kB\nMemAvailable:    8000 kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for group, files in groups.items():
        (root / "sys/fs/cgroup" / group).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (root / "sys/fs/cgroup" / group / name).write_text(text)
    return root


def version_2(limit: str, usage: int, cache: int = 0) -> dict[str, str]:
    stat = f"anon 5\ninactive_file {cache}\n"
    return {"memory.max": f"{limit}\n", "memory.current": f"{usage}\n", "memory.stat": stat}


def test_without_limits_the_machine_says_it(tmp_path: Path) -> None:
    assert free_bytes(CPU, machine(tmp_path, "0::/\n", {})) == 8000 * 1024
    assert free_bytes(CPU, tmp_path / "elsewhere") is None


def test_limits_of_version_2_and_of_its_parents(tmp_path: Path) -> None:
    groups = {"a": version_2("5000000", 4_000_000, 500_000), "a/b": version_2("max", 100)}
    assert free_bytes(CPU, machine(tmp_path, "0::/a/b\n", groups)) == 1_500_000


def test_a_container_sees_its_limit_at_the_top(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/docker/abc\n", {"": version_2("3000000", 1_000_000)})
    assert free_bytes(CPU, root) == 2_000_000


def test_limits_of_version_1(tmp_path: Path) -> None:
    files = {
        "memory.limit_in_bytes": "6000000\n",
        "memory.usage_in_bytes": "5000000\n",
        "memory.stat": "inactive_file 1\ntotal_inactive_file 1000000\n",
    }
    root = machine(tmp_path, "4:memory:/job\n1:cpu:/\n", {"memory/job": files})
    assert free_bytes(CPU, root) == 2_000_000
    files["memory.limit_in_bytes"] = "9223372036854771712\n"  # none
    assert free_bytes(CPU, machine(tmp_path / "2", "4:memory:/job\n", {"memory/job": files})) == 8000 * 1024


def test_this_process_holds_what_it_takes() -> None:
    before = resident_bytes(CPU)
    block = torch.ones(50_000_000)
    assert block.sum() == 50_000_000
    if Path("/proc/self/status").exists():
        assert resident_bytes(CPU) - before == pytest.approx(200e6, rel=0.1)
