"""`fledge doctor` tells what is there, and its choice is the one that the stages make."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch

from fledge.cli import main
from fledge.device import can_compile, pick_compute_dtype, pick_device
from fledge.stages import doctor


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    device = pick_device()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["torch"] == torch.__version__
    assert found["cores"] == os.cpu_count()
    assert found["memory_total_bytes"] > found["memory_available_bytes"] > 2**20
    assert found["fp32_gflops"] > 0
    assert found["bf16_gflops"] > 0
    assert found["use"] == {
        "device": str(device),
        "compute_dtype": {torch.bfloat16: "bf16", torch.float32: "fp32"}[pick_compute_dtype(device)],
        "compile": can_compile()[0],
        "threads": torch.get_num_threads(),
    }


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for name in ("Python", "PyTorch", "AMX", "AVX512-BF16", "GPU", "Memory", "C++ compiler", "will use"):
        assert name in printed


def test_what_a_machine_lacks_is_said() -> None:
    found = {
        "python": "3.11.0", "torch": "2.9.0", "system": "Linux", "cpu": "abacus", "cores": 1, "threads": 1,
        "amx": False, "avx512_bf16": False, "gpu": [], "memory_total_bytes": None,
        "memory_available_bytes": None, "compiler": "no C++ compiler: g++ is not installed",
        "fp32_gflops": 0.1, "bf16_gflops": 0.1,
    }  # fmt: skip
    rows = dict(doctor.machine_rows(found))
    assert rows["GPU"] == "none"
    assert rows["Memory"] == "unknown"
    assert "g++ is not installed" in rows["C++ compiler"]
    use = {"device": "cpu", "compute_dtype": "fp32", "compile": False, "threads": 1}
    assert "eager" in " ".join(value for _, value in doctor.use_rows(use))


def test_rate_counts_two_operations_a_product_term(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that takes a second for one 256 x 256 product does 2 * 256^3 operations in it."""
    monkeypatch.setattr(doctor, "_elapsed", lambda a, repeats: float(repeats))
    rate = doctor.product_gflops(torch.device("cpu"), torch.float32)
    assert rate == pytest.approx(0.033554432)
