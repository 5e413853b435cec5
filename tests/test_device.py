"""What a machine is good for: the rules, on machines that are made up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fledge import device
from fledge.device import can_compile, pick_compute_dtype, pick_device
from fledge.errors import UserError


def with_gpus(monkeypatch: pytest.MonkeyPatch, cuda: int = 0, mps: bool = False, bf16: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def with_cpu(monkeypatch: pytest.MonkeyPatch, amx: bool = False, avx512_bf16: bool = False) -> None:
    monkeypatch.setattr(device, "cpu_has_amx", lambda: amx)
    monkeypatch.setattr(device, "cpu_has_avx512_bf16", lambda: avx512_bf16)


def test_auto_takes_a_cuda_gpu_else_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, cuda=1)
    assert pick_device() == torch.device("cuda")
    with_gpus(monkeypatch, mps=True)
    assert pick_device() == torch.device("cpu")


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, cuda=2, mps=True)
    for name in ("cpu", "cuda", "cuda:1", "mps"):
        assert str(pick_device(name)) == name


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "gpu", "cpu:1", "cuda:x", "cuda:-1", ""])
def test_a_device_that_is_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch)
    with pytest.raises(UserError, match=repr(name)):
        pick_device(name)


def test_a_gpu_beyond_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, cuda=2)
    with pytest.raises(UserError, match="last one is cuda:1"):
        pick_device("cuda:2")


def test_bf16_only_where_it_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda, mps = torch.device("cpu"), torch.device("cuda"), torch.device("mps")
    with_gpus(monkeypatch, cuda=1, mps=True)
    with_cpu(monkeypatch)
    assert pick_compute_dtype(cpu) == torch.float32
    assert pick_compute_dtype(mps) == torch.float32
    assert pick_compute_dtype(cuda) == torch.bfloat16
    with_gpus(monkeypatch, cuda=1, bf16=False)
    assert pick_compute_dtype(cuda) == torch.float32
    with_cpu(monkeypatch, amx=True)
    assert pick_compute_dtype(cpu) == torch.bfloat16
    with_cpu(monkeypatch, avx512_bf16=True)
    assert pick_compute_dtype(cpu) == torch.bfloat16


def test_the_compute_type_by_name_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cpu(monkeypatch)
    assert pick_compute_dtype(torch.device("cpu"), "bf16") == torch.bfloat16
    with_cpu(monkeypatch, amx=True)
    assert pick_compute_dtype(torch.device("cpu"), "fp32") == torch.float32
    with pytest.raises(UserError, match="'fp16'"):
        pick_compute_dtype(torch.device("cpu"), "fp16")


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    compiles, reason = can_compile()
    assert not compiles
    assert "no C++ compiler" in reason


def test_compiler_without_python_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "mycxx"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    missing = f"no Python headers: {tmp_path}/Python.h is missing (install python3-dev)"
    assert can_compile() == (False, missing)
    (tmp_path / "Python.h").touch()
    assert can_compile() == (True, str(compiler))


@pytest.mark.slow
def test_what_can_compile_says_is_what_happens(tmp_path: Path) -> None:
    program = "import torch; torch.compile(lambda x: (x * 2 + 1).relu())(torch.ones(100))"
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    assert (done.returncode == 0) == can_compile()[0]
