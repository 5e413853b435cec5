"""Training by two processes on one CPU: memory of each, estimated and measured, and the time of a step.

    python bench/ranks.py [--ranks 1 2] [--only SUBSTRING]

Each line trains three steps, saves included, by so many processes; the peak is the kernel's VmHWM (Linux) of
the fullest. Random tokens. One thread a process.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from fledge.model.checkpoint import save_model
from fledge.model.config import ModelConfig
from fledge.model.transformer import CausalLM
from fledge.run import Run
from fledge.stages import pretrain
from fledge.train.loop import fit
from fledge.train.losses import next_token_loss
from fledge.train.memory import Setup, estimate, resident_bytes
from fledge.train.optim import make_optimizers
from fledge.train.parallel import joined
from fledge.train.plan import FitConfig
from fledge.train.steps import row_steps
from fledge.types import Batch

assert pretrain  # what a training process has imported counts

CASES = {
    "5M": (4096, 256, 704, 5, 8, "muon"),
    "57M": (16_384, 576, 1536, 12, 2, "muon"),
    "57M, adamw": (16_384, 576, 1536, 12, 2, "adamw"),
}
ROW_TOKENS, STEPS = 256, 3


class NoTokenizer:
    def save(self, directory: Path) -> None:
        (directory / "tokenizer.json").write_text("{}", encoding="utf-8")


def train(name: str, folder: Path) -> None:
    """In each process: train, and write what was found."""
    vocabulary, width, inner, layers, rows_each, optimizer = CASES[name]
    torch.set_num_threads(1)
    with joined("cpu") as ranks:
        heads = width // 64
        config = ModelConfig("qwen3", vocabulary, width, inner, layers, heads, heads, 64, ROW_TOKENS)
        setup = Setup(
            rows=rows_each, row_tokens=ROW_TOKENS, optimizer=optimizer, segments=False, ranks=ranks.count
        )
        expected = estimate(config, setup, resident_bytes(torch.device("cpu")))
        model = CausalLM(config)
        model.init_weights(torch.Generator().manual_seed(0))
        optimizers = make_optimizers(model, optimizer, 0.02, 0.003, 0.0)

        def rows(first: int, count: int) -> Batch:
            generator = torch.Generator().manual_seed(first)
            ids = torch.randint(vocabulary, (count, ROW_TOKENS + 1), generator=generator)
            return Batch(ids, torch.ones_like(ids, dtype=torch.bool))

        run = Run.open(folder / "run", "", writes=ranks.leads)
        run.begin({})
        plan = FitConfig(label=name, total_steps=STEPS, warmup_steps=1, evaluations=1)
        steps = row_steps(rows, rows_each * ranks.count, rows_each, ranks)
        fit(
            model, optimizers, steps, next_token_loss, plan, run,
            lambda directory, tokens: save_model(directory, model, NoTokenizer(), {"tokens": tokens}, [0]),
            lambda step: {"validation": 1.0}, ranks=ranks,
        )  # fmt: skip
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        peak = 1024 * int(re.findall(r"VmHWM:\s+(\d+)", status)[0])
        (folder / f"{ranks.rank}.json").write_text(json.dumps({"expected": expected.total, "peak": peak}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", default="")
    parser.add_argument("--case")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.case:
        train(given.case, given.folder)
        sys.stdout.flush()
        os._exit(0)
    print(f"| model | ranks | estimate, MB | peak, MB | off by | seconds a step |\n|{'---|' * 6}")
    for name in (name for name in CASES if given.only in name):
        for ranks in given.ranks:
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
                command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", __file__]
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                subprocess.run(
                    [*command, "--case", name, "--folder", folder],
                    check=True, env=environment, stderr=subprocess.DEVNULL,
                )  # fmt: skip
                found = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
                lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
                rows = [row for row in map(json.loads, lines) if "lr" in row]
                seconds = (rows[-1]["seconds"] - rows[0]["seconds"]) / (len(rows) - 1)
            most = max(found, key=lambda one: one["peak"])
            off = most["expected"] / most["peak"] - 1
            sizes = f"{most['expected'] / 1e6:,.0f} | {most['peak'] / 1e6:,.0f} | {off:+.0%}"
            print(f"| {name} | {ranks} | {sizes} | {seconds:.2f} |", flush=True)


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"in {time.perf_counter() - started:.0f} s", file=sys.stderr)
