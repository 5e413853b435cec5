"""`fledge doctor`: what this machine offers and what fledge will use; or which programs read a model."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fledge.device import can_compile, cpu_has_amx, cpu_has_avx512_bf16, pick_compute_dtype, pick_device
from fledge.evals.readers import installed, verdicts

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Config:
    """Show what this machine offers and what fledge will use, or who can read a model directory."""

    model: Path | None = None
    """Model directory to judge instead: which programs can read it, and why not."""
    json: bool = False
    """Print one JSON object, for programs and bug reports, in place of the table."""


def main(config: Config) -> None:
    """Examine the machine, or the model, and print what was found."""
    if config.model is not None:
        _judge(config.model, config.json)
        return
    found = examine()
    if config.json:
        print(json.dumps(found, indent=2))
        return
    table = Table(show_header=False, title="fledge doctor", title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for i, section in enumerate((machine_rows(found), use_rows(found["use"]))):
        if i:
            table.add_section()
        for name, value in section:
            table.add_row(name, value)
    Console(markup=False, highlight=False).print(table)


def _judge(directory: Path, as_json: bool) -> None:
    """Print which programs read a model directory."""
    what, found = verdicts(directory)
    versions = installed()
    if as_json:
        rows = {
            name: {"reads": v.word, **asdict(v), "installed": versions[name]} for name, v in found.items()
        }
        print(json.dumps({"directory": str(directory), "what": what, "readers": rows}, indent=2))
        return
    table = Table(show_header=False, title=f"{directory}: {what}", title_justify="left", show_lines=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, verdict in found.items():
        version = f" ({versions[name]} here)" if versions[name] else ""
        lines = [*verdict.no, *verdict.unsure, *verdict.notes]
        table.add_row(f"{name}{version}", verdict.word, "\n".join(lines))
    Console(markup=False, highlight=False).print(table)


def examine() -> dict[str, Any]:
    """Return what the machine has (`python`, `cpu`, ...) and, under `use`, what fledge chooses."""
    device = pick_device()
    compiles, compiler = can_compile()
    total, available = memory_bytes()
    dtype = pick_compute_dtype(device)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "amx": cpu_has_amx(),
        "avx512_bf16": cpu_has_avx512_bf16(),
        "gpu": gpu_names(),
        "memory_total_bytes": total,
        "memory_available_bytes": available,
        "compiler": compiler,
        "fp32_gflops": round(product_gflops(device, torch.float32), 1),
        "bf16_gflops": round(product_gflops(device, torch.bfloat16), 1),
        "use": {
            "device": str(device),
            "compute_dtype": "bf16" if dtype == torch.bfloat16 else "fp32",
            "compile": compiles,
            "threads": torch.get_num_threads(),
        },
    }


def machine_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what the machine offers as (name, value) for people."""
    total, available = found["memory_total_bytes"], found["memory_available_bytes"]
    free = f", {available / GIB:.1f} GiB free" if available else ""
    return [
        ("Python", found["python"]),
        ("PyTorch", found["torch"]),
        ("System", found["system"]),
        ("CPU", f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads"),
        ("AMX", _yes(found["amx"])),
        ("AVX512-BF16", _yes(found["avx512_bf16"])),
        ("GPU", ", ".join(found["gpu"]) or "none"),
        ("Memory", f"{total / GIB:.1f} GiB{free}" if total else "unknown"),
        ("C++ compiler", found["compiler"]),
        ("Matrix product", f"fp32 {found['fp32_gflops']} GFLOP/s, bf16 {found['bf16_gflops']} GFLOP/s"),
    ]


def use_rows(use: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what fledge will use as (name, value) for people."""
    return [
        ("fledge will use", f"device {use['device']}, {use['threads']} threads"),
        ("", f"{use['compute_dtype']} matrix products on fp32 weights"),
        ("", "torch.compile where it pays" if use["compile"] else "eager execution, no torch.compile"),
    ]


def product_gflops(device: torch.device, dtype: torch.dtype, seconds: float = 0.1) -> float:
    """Measure the rate of square matrix products in 1e9 floating-point operations a second."""
    rate = 0.0
    # A device without instructions for `dtype` can be a thousand times slower: it gets the small size only.
    for size in (256, 1024, 4096):
        a = torch.ones(size, size, device=device, dtype=dtype)
        _elapsed(a, 1)  # warms up: the first call chooses kernels and starts threads
        once = max(_elapsed(a, 1), 1e-9)
        repeats = max(1, min(1000, int(seconds / once)))
        rate = repeats * 2 * size**3 / max(_elapsed(a, repeats), 1e-9) / 1e9
        if once * 64 > seconds:
            break
    return rate


def memory_bytes() -> tuple[int | None, int | None]:
    """Return the total and the free memory in bytes; None where the system does not tell."""
    table = Path("/proc/meminfo")
    if table.exists():
        fields = dict(line.split(":", 1) for line in table.read_text().splitlines())
        kib = {name: int(value.split()[0]) for name, value in fields.items()}
        return kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None
    except (AttributeError, ValueError, OSError):
        return None, None


def cpu_name() -> str:
    """Return the CPU's name as its maker writes it, or at least its architecture."""
    table = Path("/proc/cpuinfo")
    if table.exists():
        for line in table.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    """Return the GPUs that PyTorch sees."""
    if torch.cuda.is_available():
        gpus = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
        return [f"{gpu.name} ({gpu.total_memory / GIB:.0f} GiB)" for gpu in gpus]
    if torch.backends.mps.is_available():
        return ["Apple (mps; used only when asked for)"]
    return []


def _elapsed(a: torch.Tensor, repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        product = a @ a
    # Reading a number waits for a GPU to finish.
    product[0, 0].item()
    return time.perf_counter() - started


def _yes(value: bool) -> str:
    return "yes" if value else "no"
