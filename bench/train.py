"""Tokens a second of a training step on the CPU: fledge beside its peers, in one run.

    python bench/train.py [--size 10M] [--rounds 5] [--steps 4] [--only SUBSTRING;...]
                          [--nanogpt model.py] [--preload libtcmalloc_minimal.so.4]

A step is forward, backward, clipping and the optimizer's update of 16 rows of 256 tokens, fledge's as its
own training loop does it, logging included. Every variant is a process of its own, which compiles and warms
up alone and then waits for its turn; rounds are interleaved; medians and ranges over rounds are shown. Peers:
`transformers` (Qwen3ForCausalLM) if it is installed; nanoGPT's GPT of the same width, depth and number of
weights if the path of its model.py is given. `--preload` names a memory allocator that peers are also tried
with; fledge takes none. "Share" is of the speed of products of 2,048 x 2,048 x 2,048, same type, same run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

ROWS, TOKENS = 16, 256


@dataclass(frozen=True)
class Size:
    width: int
    inner: int
    layers: int
    heads: int
    vocabulary: int

    def products(self) -> float:
        """Floating-point operations a token in the matrix products of a step: 2 forward, 4 backward for each
        weight, and for each of the keys that a token sees on average in scores and sums."""
        matrices = self.layers * (4 * self.width**2 + 3 * self.width * self.inner)
        attention = self.layers * 2 * self.width * TOKENS / 2
        return 6.0 * (matrices + self.width * self.vocabulary + attention)


SIZES = {"10M": Size(384, 1024, 6, 6, 4096), "30M": Size(512, 1408, 8, 8, 8192)}


@dataclass(frozen=True)
class Variant:
    who: str
    dtype: str = "bf16"
    compiled: bool = False
    optimizer: str = "adamw"
    fused: bool = False
    preload: bool = False

    def words(self) -> str:
        names = [self.who, self.dtype, "compiled" if self.compiled else "eager"]
        names += ["Muon" if self.optimizer == "muon" else "fused AdamW" if self.fused else "AdamW"]
        return ", ".join(names + ["allocator"] * self.preload)


def variants(nanogpt: bool, preload: bool) -> Iterator[Variant]:
    yield Variant("products", "fp32")
    yield Variant("products", "bf16")
    for optimizer in ("adamw", "muon"):
        for dtype, compiled in (("fp32", True), ("bf16", False), ("bf16", True)):
            if optimizer == "adamw" or (dtype, compiled) == ("bf16", True):
                yield Variant("fledge", dtype, compiled, optimizer, fused=True)
    for who in ("transformers", *(["nanoGPT"] if nanogpt else [])):
        yield Variant(who, "fp32")
        yield Variant(who)
        yield Variant(who, compiled=True)
        yield Variant(who, compiled=True, fused=True)
        if preload:
            yield Variant(who, preload=True)
            yield Variant(who, compiled=True, fused=True, preload=True)


def transformers_loss(size: Size, compiled: bool) -> tuple[torch.nn.Module, Callable[[Tensor], Tensor]]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        head_dim=size.width // size.heads,
        max_position_embeddings=TOKENS,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = Qwen3ForCausalLM(config).train()
    forward = torch.compile(model) if compiled else model
    return model, lambda ids: forward(input_ids=ids[:, :-1], labels=ids[:, :-1]).loss


def nanogpt_loss(path: str, size: Size, compiled: bool) -> tuple[torch.nn.Module, Callable[[Tensor], Tensor]]:
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    config = module.GPTConfig(TOKENS, size.vocabulary, size.layers, size.heads, size.width, 0.0, False)
    model = module.GPT(config).train()
    forward = torch.compile(model) if compiled else model
    return model, lambda ids: forward(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())[1]


def peer_steps(variant: Variant, size: Size, nanogpt: str) -> Iterator[None]:
    """A plain training loop around a peer's model; one step for each item."""
    if variant.who == "transformers":
        model, loss_of = transformers_loss(size, variant.compiled)
    else:
        model, loss_of = nanogpt_loss(nanogpt, size, variant.compiled)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = {"fused": True} if variant.fused else {}
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), **fused)
    cast = torch.autocast("cpu", torch.bfloat16, enabled=variant.dtype == "bf16")
    while True:
        ids = torch.randint(size.vocabulary, (ROWS, TOKENS + 1))
        with cast:
            loss = loss_of(ids)
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(loss)
        yield


def product_steps(dtype: torch.dtype) -> Iterator[None]:
    """As many operations as one product of 2,048 x 2,048 x 2,048 for each item."""
    left, right = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    while True:
        left @ right
        yield


def train_fledge(variant: Variant, size: Size, turn: Callable[[], None]) -> None:
    """fledge's own loop; `turn` is called before every step."""
    from fledge.model.config import ModelConfig
    from fledge.model.transformer import CausalLM
    from fledge.run import Run
    from fledge.train.loop import fit
    from fledge.train.losses import next_token_loss
    from fledge.train.optim import make_optimizers
    from fledge.train.plan import FitConfig
    from fledge.train.steps import Metrics, Step
    from fledge.types import Batch

    head = size.width // size.heads
    config = ModelConfig(
        "qwen3",
        size.vocabulary,
        size.width,
        size.inner,
        size.layers,
        size.heads,
        size.heads,
        head,
        TOKENS,
        tie_word_embeddings=True,
    )
    model = CausalLM(config)
    model.init_weights(torch.Generator().manual_seed(0))
    optimizers = make_optimizers(model, "muon" if variant.optimizer == "muon" else "adamw", 1e-4, 1e-4, 0.1)
    kind = torch.bfloat16 if variant.dtype == "bf16" else torch.float32
    plan = FitConfig("bench", 10**6, compute_dtype=kind, compile=variant.compiled, max_spike=1e9)

    def steps(
        _first: int, _state: dict[str, Any], _metrics: Metrics | None
    ) -> Generator[Step, Metrics | None, None]:
        while True:
            turn()
            ids = torch.randint(size.vocabulary, (ROWS, TOKENS + 1))
            yield Step([Batch(ids, torch.ones_like(ids, dtype=torch.bool), None)], may_save=False)

    with tempfile.TemporaryDirectory() as folder:
        run = Run.open(Path(folder) / "run", "")
        run.begin({})
        fit(model, optimizers, steps, next_token_loss, plan, run, lambda _directory, _tokens: None)


class Turns:
    """The worker's side: says the seconds of the steps it was asked for, waits, and goes on when told."""

    def __init__(self, out: int) -> None:
        self.out, self.left, self.asked = out, 3, 3
        self.started: float | None = None

    def __call__(self) -> None:
        if self.started is not None:
            self.left -= 1
        if self.left == 0:
            seconds = (time.perf_counter() - (self.started or 0.0)) / self.asked
            os.write(self.out, f"{seconds}\n".encode())
            line = sys.stdin.readline()
            if not line:
                raise SystemExit
            self.left = self.asked = int(line)
            self.started = None
        if self.started is None:
            self.started = time.perf_counter()


def work(variant: Variant, size: Size, nanogpt: str) -> None:
    out = os.dup(1)
    os.dup2(2, 1)  # what models print is not for the parent
    turn = Turns(out)
    with contextlib.suppress(SystemExit):
        if variant.who == "fledge":
            train_fledge(variant, size, turn)
        kind = torch.bfloat16 if variant.dtype == "bf16" else torch.float32
        for _ in product_steps(kind) if variant.who == "products" else peer_steps(variant, size, nanogpt):
            turn()


class Worker:
    """The parent's side of one variant."""

    def __init__(self, variant: Variant, options: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--size", options.size, "--nanogpt", options.nanogpt]
        environment = dict(os.environ)
        if variant.preload:
            environment["LD_PRELOAD"] = options.preload
        self.variant = variant
        self.process = subprocess.Popen(
            [*command, "--worker", json.dumps(asdict(variant))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if options.verbose else subprocess.DEVNULL,
            env=environment,
            text=True,
        )
        started = time.perf_counter()
        self.ready = bool(self.process.stdout and self.process.stdout.readline())
        self.start_seconds = time.perf_counter() - started
        self.seconds: list[float] = []

    def measure(self, steps: int) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        self.seconds.append(float(self.process.stdout.readline()))


def show(workers: list[Worker], size: Size, title: str) -> None:
    peak = {
        w.variant.dtype: 2 * 2048**3 / statistics.median(w.seconds)
        for w in workers
        if w.variant.who == "products"
    }
    heads = ("variant", "tokens/s", "range", "share of the products' peak", "first steps, s")
    table = Table(*heads, title=title, title_justify="left")
    speeds: dict[str, list[float]] = {}
    for worker in workers:
        if worker.variant.who == "products":
            continue
        speed = [ROWS * TOKENS / s for s in worker.seconds]
        speeds[worker.variant.words()] = speed
        middle = statistics.median(speed)
        top = peak.get(worker.variant.dtype)
        share = f"{middle * size.products() / top:.0%}" if top else ""
        spread = f"{min(speed):,.0f}-{max(speed):,.0f}"
        table.add_row(worker.variant.words(), f"{middle:,.0f}", spread, share, f"{worker.start_seconds:.0f}")
    console = Console(width=120)
    console.print(table)
    for dtype, flops in peak.items():
        console.print(f"products in {dtype}: {flops / 1e12:.2f} TFLOP/s")
    ours = {name: speed for name, speed in speeds.items() if name.startswith("fledge") and "Muon" not in name}
    theirs = {name: speed for name, speed in speeds.items() if not name.startswith("fledge")}
    if not ours or not theirs:
        return
    best = max(ours, key=lambda name: statistics.median(ours[name]))
    rival = max(theirs, key=lambda name: statistics.median(theirs[name]))
    plain = Variant("transformers").words()
    for other in dict.fromkeys((rival, plain)):
        if other in theirs:  # the median of the rounds' ratios: a slow round slows both
            ratio = statistics.median(a / b for a, b in zip(ours[best], theirs[other], strict=True))
            console.print(f"{best} / {other}: {ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="10M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps of a variant in each round")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", help="variants whose words contain one of these, by ;")
    parser.add_argument("--nanogpt", default="", help="path of nanoGPT's model.py")
    parser.add_argument("--preload", default="", help="path of an allocator's shared library, for peers")
    parser.add_argument("--verbose", action="store_true", help="show what the variants print")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = SIZES[options.size]
    if options.worker:
        work(Variant(**json.loads(options.worker)), size, options.nanogpt)
        return
    chosen = [
        v
        for v in variants(bool(options.nanogpt), bool(options.preload))
        if v.who == "products" or any(word in v.words() for word in options.only.split(";"))
    ]
    if importlib.util.find_spec("transformers") is None:
        chosen = [v for v in chosen if v.who != "transformers"]
    workers = []
    for variant in chosen:  # one after the other: what compiles does not compete
        worker = Worker(variant, options)
        print(f"{variant.words()}: {'ready' if worker.ready else 'failed'}", file=sys.stderr)
        workers += [worker] if worker.ready else []
    for _ in range(options.rounds):
        for worker in workers:
            worker.measure(options.steps * (4 if worker.variant.who == "products" else 1))
    for worker in workers:
        assert worker.process.stdin
        worker.process.stdin.close()
        worker.process.wait()
    show(workers, size, f"Training {options.size}, {ROWS} rows of {TOKENS} tokens, {options.threads} threads")


if __name__ == "__main__":
    main()
