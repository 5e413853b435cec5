"""Estimates of training's memory against measured peaks on the CPU.

    python bench/memory.py [--only SUBSTRING]

Each configuration trains two steps in a process of its own, saves included, whose peak is the kernel's VmHWM
(Linux). Random tokens: their number counts, not what they say. One thread.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import fledge.train.losses
from fledge.model.checkpoint import save_model
from fledge.model.config import ModelConfig
from fledge.model.transformer import CausalLM
from fledge.run import Run
from fledge.stages import pretrain
from fledge.train.loop import fit
from fledge.train.losses import next_token_loss
from fledge.train.memory import Setup, estimate, resident_bytes
from fledge.train.optim import make_optimizers
from fledge.train.plan import FitConfig
from fledge.train.steps import row_steps
from fledge.types import Batch

assert pretrain  # what a training process has imported counts


@dataclass(frozen=True)
class Case:
    name: str
    vocabulary: int
    width: int
    inner: int
    layers: int
    rows: int = 8
    row_tokens: int = 256
    accumulated: int = 1
    optimizer: str = "muon"
    bf16: bool = False
    compiled: bool = False
    checkpointed: bool = False
    segments: bool = False
    whole_scores: bool = False
    """Scores over the vocabulary at once, however many: what chunks save."""


M1 = Case("1M", 2048, 128, 320, 4)
M5 = Case("5M", 4096, 256, 704, 5)
M10 = Case("10M", 8192, 320, 832, 6)
M60 = Case("57M", 16_384, 576, 1536, 12, rows=2)
LARGE = Case("10M, 151,936 tokens", 151_936, 64, 192, 1, rows=4, row_tokens=1024)
CASES = [
    M1,
    replace(M1, compiled=True),
    M5,
    replace(M5, rows=32),
    replace(M5, rows=32, compiled=True),
    replace(M5, rows=32, checkpointed=True),
    replace(M5, rows=8, accumulated=4),
    replace(M5, rows=8, accumulated=4, compiled=True),
    replace(M5, rows=16, bf16=True, optimizer="adamw"),
    replace(M5, rows=16, bf16=True, compiled=True),
    replace(M5, rows=16, compiled=True, checkpointed=True),
    replace(M5, rows=4, row_tokens=1024, segments=True),
    replace(M5, rows=4, row_tokens=1024, segments=True, bf16=True, compiled=True),
    replace(M10, rows=16, bf16=True),
    M60,
    replace(M60, bf16=True, checkpointed=True),
    replace(M60, bf16=True, compiled=True),
    LARGE,
    replace(LARGE, bf16=True),
    replace(LARGE, whole_scores=True),
]


class NoTokenizer:
    def save(self, directory: Path) -> None:
        (directory / "tokenizer.json").write_text("{}", encoding="utf-8")


def run(case: Case) -> dict[str, float]:
    """Train in this process; bytes that were estimated and that were its peak."""
    torch.set_num_threads(1)
    if case.whole_scores:
        fledge.train.losses.WHOLE_SCORES = sys.maxsize
    heads = case.width // 64
    config = ModelConfig(
        "qwen3", case.vocabulary, case.width, case.inner, case.layers, heads, heads, 64, case.row_tokens
    )
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    setup = Setup(
        rows=case.rows,
        row_tokens=case.row_tokens,
        optimizer=case.optimizer,
        compute_dtype=dtype,
        compiled=case.compiled,
        checkpointed=case.checkpointed,
        segments=case.segments,
        accumulates=case.accumulated > 1,
    )
    expected = estimate(config, setup, resident_bytes(torch.device("cpu")))
    model = CausalLM(config)
    model.init_weights(torch.Generator().manual_seed(0))
    model.checkpoint_activations = case.checkpointed
    optimizers = make_optimizers(model, case.optimizer, 0.02, 0.003, 0.0)

    def rows(_first: int, count: int) -> Batch:
        ids = torch.randint(case.vocabulary, (count, case.row_tokens + 1))
        segments = torch.zeros_like(ids) if case.segments else None
        return Batch(ids, torch.ones_like(ids, dtype=torch.bool), segments)

    def write_model(directory: Path, _tokens: int) -> None:
        save_model(directory, model, NoTokenizer(), {}, [0])

    plan = FitConfig("memory", 2, evaluations=1, compute_dtype=dtype, compile=case.compiled, max_spike=1e9)
    with tempfile.TemporaryDirectory() as folder:
        out = Run.open(Path(folder) / "run", "")
        out.begin({})
        steps = row_steps(rows, case.rows * case.accumulated, case.rows)
        fit(model, optimizers, steps, next_token_loss, plan, out, write_model)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = 1024.0 * int(re.findall(r"VmHWM:\s+(\d+)", status)[0])
    return {"estimate": expected.total, "peak": peak, **vars(expected)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="configurations whose line contains this")
    parser.add_argument("--case", type=int, help="run one in this process, by number, and print JSON")
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(run(CASES[options.case])))
        return
    heads = ("model", "rows x tokens", "how", "estimate", "peak", "off by")
    table = Table(*heads, title="Memory of training on the CPU, MB", title_justify="left")
    for number, case in enumerate(CASES):
        how = [case.optimizer, "bf16" if case.bf16 else "fp32", "compiled" if case.compiled else "eager"]
        how += [f"{case.accumulated} micro-batches"] * (case.accumulated > 1)
        flags = ("checkpointed", "segments", "whole_scores")
        how += [flag.replace("_", " ") for flag in flags if getattr(case, flag)]
        line = (case.name, f"{case.rows} x {case.row_tokens}", ", ".join(how))
        if options.only in " ".join(line):
            command = [sys.executable, __file__, "--case", str(number)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            miss = found["estimate"] / found["peak"] - 1
            figures = (f"{found['estimate'] / 1e6:,.0f}", f"{found['peak'] / 1e6:,.0f}", f"{miss:+.0%}")
            table.add_row(*line, *figures)
            print("|", " | ".join((*line, *figures)), "|", flush=True)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
