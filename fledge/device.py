"""Which device, number format and execution a machine is good for."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Literal

import torch

from fledge.errors import UserError

DeviceName = Literal["auto", "cpu", "cuda", "mps"]
ComputeName = Literal["auto", "bf16", "fp32"]


def pick_device(name: str = "auto") -> torch.device:
    """Return the device to compute on: `auto`, `cpu`, `cuda`, `cuda:1` or `mps`.

    `auto` takes a CUDA GPU if there is one, else the CPU; Apple's GPU (`mps`) only by its name.
    Raises UserError on an unknown name or a device that this machine lacks.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdecimal())):
        raise UserError(f"unknown device {name!r}; choose auto, cpu, cuda, cuda:INDEX or mps")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name!r} is not there: PyTorch sees no CUDA GPU; use auto or cpu")
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise UserError(f"device {name!r} is not there: the last one is cuda:{torch.cuda.device_count() - 1}")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device {name!r} is not there: PyTorch sees no Apple GPU; use auto or cpu")
    return torch.device(name)


def pick_compute_dtype(device: torch.device, name: str = "auto") -> torch.dtype:
    """Return what matrix products are computed in; weights stay in fp32.

    `auto` is bf16 where the device has instructions for it (CUDA since Ampere; a CPU with AMX or
    AVX512-BF16), else fp32: an emulated bf16 product is slower than a plain one.
    Raises UserError on an unknown name.
    """
    if name not in ("auto", "bf16", "fp32"):
        raise UserError(f"unknown compute type {name!r}; choose auto, bf16 or fp32")
    if name == "auto":
        return torch.bfloat16 if has_fast_bf16(device) else torch.float32
    return torch.bfloat16 if name == "bf16" else torch.float32


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16 matrix products."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and (cpu_has_amx() or cpu_has_avx512_bf16())


def cpu_has_amx() -> bool:
    """Whether the CPU has AMX tiles (Intel since Sapphire Rapids)."""
    return bool(torch.cpu._is_amx_tile_supported())


def cpu_has_avx512_bf16() -> bool:
    """Whether the CPU has AVX512-BF16 (Intel since Cooper Lake, AMD since Zen 4)."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def can_compile() -> tuple[bool, str]:
    """Whether torch.compile can build kernels for the CPU here, and with what or why not.

    Looks where TorchInductor looks: `$CXX`, else clang++ on macOS and g++ elsewhere; and for
    Python's C header, which the generated code includes. Nothing is compiled.
    """
    command = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    compiler = shutil.which(command)
    if compiler is None:
        return False, f"no C++ compiler: {command} is not installed"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    # A macOS framework Python keeps its headers elsewhere, and always has them.
    if sys.platform != "darwin" and not header.exists():
        return False, f"no Python headers: {header} is missing (install python3-dev)"
    return True, compiler


def pick_compile(name: str, minutes: float | None, operations: float) -> bool:
    """Whether to compile a training that takes so many minutes, or else floating-point operations. `auto`
    does it where there is a compiler and the run is long enough."""
    # Starting the compiler takes up to half a minute; shorter runs are over sooner without it.
    is_long = minutes > 2 if minutes else operations > 2e13
    return name == "yes" or (name == "auto" and is_long and can_compile()[0])


def autocast(device: torch.device, compute_dtype: torch.dtype, cache: bool = True) -> torch.autocast:
    """A block in which matrix products are computed in this type; for fp32 it changes nothing. Without
    `cache` no copy of a weight in this type outlives its use."""
    is_on = compute_dtype != torch.float32
    return torch.autocast(device.type, compute_dtype, enabled=is_on, cache_enabled=cache)


def use_fast_products(device: torch.device, compute_dtype: torch.dtype) -> None:
    """Let a GPU compute the products that stay in fp32 with TF32 (10 bits of fraction) where the others are
    in bf16 anyway; `fp32` stays exact."""
    if device.type == "cuda" and compute_dtype != torch.float32:
        torch.set_float32_matmul_precision("high")


def keep_freed_memory() -> None:
    """Tell glibc's allocator to keep what is freed instead of handing it back to the kernel.

    A training step on a CPU frees and takes the same large blocks again and again; faulting their
    pages back in costs a tenth of its time and more. No effect where the C library is another one.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold, largest = -1, -3, 2**31 - 1  # from malloc.h
        mallopt(m_trim_threshold, largest)
        mallopt(m_mmap_threshold, largest)
