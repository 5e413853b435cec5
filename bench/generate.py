"""How fast a CPU decodes: the engine against `transformers.generate`, in tokens/s.

    python bench/generate.py [--sizes 15M 134M] [--batches 1 16 64] [--variants ...] [--rounds 3]

Random weights of two shapes, prompts of 16 tokens, greedy, 256 new tokens. Each variant is a process of its
own that lives over all rounds of a size and batch; rounds are interleaved, so that a slow minute of the
machine slows them all; medians are shown, and the slowest and fastest round. `memory` is the most that the
process ever held (the mapped file counts too). `bandwidth`: what must be read for each token (weights, keys
and values), as a share of what the same run measured for reading a large tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fledge.engine.engine import Engine
from fledge.model.checkpoint import load_model, save_model
from fledge.model.config import ModelConfig
from fledge.model.transformer import CausalLM
from fledge.types import SamplingParams

SHAPES = {
    "15M": ModelConfig("llama", 32000, 288, 768, 6, 6, 6, 48, 2048),
    "134M": ModelConfig("llama", 32000, 768, 2048, 12, 12, 12, 64, 2048, tie_word_embeddings=False),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PROMPT_TOKENS = 16
THEIRS = "transformers"
VARIANTS = [
    *(f"{THEIRS} {dtype} {cache}" for cache in ("dynamic", "compiled") for dtype in ("fp32", "bf16")),
    *(f"fledge {dtype}" for dtype in ("fp32", "bf16", "fp16")),
]
# (prompts, new tokens) -> seconds to the first token.
Generate = Callable[[list[list[int]], int], float]


class NoTokenizer:
    """Writes no file: the model has ids only."""

    def save(self, directory: Path) -> None:
        pass


def save_random(directory: Path, config: ModelConfig) -> None:
    model = CausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
    save_model(directory, model, NoTokenizer(), {"stage": "bench"}, [0])


def ours(directory: Path, dtype: torch.dtype, batch: int) -> Generate:
    # With fp32 the file's weights stay mapped, and other types are made of those.
    engine = Engine(load_model(directory), [], batch, dtype, keep_cache=True)

    def generate(prompts: list[list[int]], tokens: int) -> float:
        first: list[float] = []

        def note(place: int, token_id: int) -> bool:
            if not first:
                first.append(time.perf_counter() - started)
            return False

        started = time.perf_counter()
        made = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=tokens), note)
        assert [len(completion.ids) for completion in made] == [tokens] * batch
        return first[0]

    return generate


def theirs(directory: Path, dtype: torch.dtype, compiled: bool, most_tokens: int) -> Generate:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    settings: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": most_tokens}
    if compiled:
        compile_config = transformers.CompileConfig(mode="default", dynamic=False)
        compile_config._compile_all_devices = True
        settings |= {"cache_implementation": "static", "compile_config": compile_config}
    model.generation_config.eos_token_id = None

    def generate(prompts: list[list[int]], tokens: int) -> float:
        first: list[float] = []
        count = [0]

        def stop(ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            if not first:
                first.append(time.perf_counter() - started)
            count[0] += 1  # a short call has the shapes of a long one: nothing is compiled again
            return torch.full((len(ids),), count[0] >= tokens)

        ids_BT = torch.tensor(prompts)
        started = time.perf_counter()
        made = model.generate(
            ids_BT, attention_mask=torch.ones_like(ids_BT), stopping_criteria=[stop], **settings
        )
        assert made.shape == (len(prompts), PROMPT_TOKENS + tokens)
        return first[0]

    return generate


def work(variant: str, directory: Path, batch: int, tokens: int) -> None:
    """One variant's process: a round for every line of stdin, its figures as a line of JSON."""
    name, dtype, *cache = variant.split()
    if name == THEIRS:
        generate = theirs(directory, DTYPES[dtype], cache == ["compiled"], tokens)
    else:
        generate = ours(directory, DTYPES[dtype], batch)
    generator = torch.Generator().manual_seed(1)
    for line in sys.stdin:
        count = int(line)
        prompts = torch.randint(1, 32000, (batch, PROMPT_TOKENS), generator=generator).tolist()
        started = time.perf_counter()
        first = generate(prompts, count)
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "first": first, "memory": peak_memory()}), flush=True)


def peak_memory() -> int:
    """Bytes that this process held at most; what it was forked from does not count."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def read_bandwidth() -> float:
    """Bytes a second at which a tensor much larger than the caches is summed."""
    big = torch.ones(2**27)
    big.sum()
    started = time.perf_counter()
    big.sum()
    return big.nbytes / (time.perf_counter() - started)


def bytes_a_step(config: ModelConfig, variant: str, batch: int, tokens: int) -> float:
    """Weights of all products, and the keys and values of the average step."""
    C, D, H = config.hidden_size, config.head_dim, config.num_attention_heads
    layer = 4 * C * H * D + 3 * C * config.intermediate_size
    weights = config.num_hidden_layers * layer + config.vocab_size * C
    size = DTYPES[variant.split()[1]].itemsize
    cache_size = size if variant.startswith(THEIRS) else 4
    cached = 2 * config.num_hidden_layers * H * D * (PROMPT_TOKENS + tokens / 2) * batch
    return weights * size + cached * cache_size


def measure(directory: Path, size: str, batch: int, options: argparse.Namespace) -> None:
    """One table."""
    flags = ["--threads", str(options.threads), "--tokens", str(options.tokens), "--batches", str(batch)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    processes = {
        variant: subprocess.Popen(
            [sys.executable, __file__, "--work", variant, "--directory", str(directory), *flags],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=environment,
        )
        for variant in options.variants
    }  # fmt: skip

    def one_round(variant: str, tokens: int) -> dict[str, float]:
        process = processes[variant]
        assert process.stdin is not None and process.stdout is not None
        print(tokens, file=process.stdin, flush=True)
        answer: dict[str, float] = json.loads(process.stdout.readline())
        return answer

    try:
        for variant in options.variants:
            one_round(variant, 8)
        rounds: dict[str, list[dict[str, float]]] = {variant: [] for variant in options.variants}
        bandwidths = []
        for _ in range(options.rounds):
            bandwidths.append(read_bandwidth())
            for variant, figures in rounds.items():
                figures.append(one_round(variant, options.tokens))
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    bandwidth = statistics.median(bandwidths)
    speeds = {v: [batch * options.tokens / f["seconds"] for f in rounds[v]] for v in rounds}
    best = max((statistics.median(speeds[v]) for v in rounds if v.startswith(THEIRS)), default=None)
    title = f"{size}, batch {batch}; reading: {bandwidth / 1e9:.1f} GB/s"
    columns = ("tokens/s", "from", "to", "times their best", "first token, ms", "memory, MB", "bandwidth")
    table = Table("", *columns, title=title, title_justify="left")
    for variant, figures in rounds.items():
        speed = statistics.median(speeds[variant])
        step_bytes = bytes_a_step(SHAPES[size], variant, batch, options.tokens)
        table.add_row(
            variant, f"{speed:,.0f}", f"{min(speeds[variant]):,.0f}", f"{max(speeds[variant]):,.0f}",
            f"{speed / best:.2f}" if best else "",
            f"{1e3 * statistics.median(f['first'] for f in figures):,.1f}",
            f"{figures[-1]['memory'] / 1e6:,.0f}", f"{speed / batch * step_bytes / bandwidth:.0%}",
        )  # fmt: skip
    Console(width=130).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.work:
        work(options.work, options.directory, options.batches[0], options.tokens)
        return
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes:
            directory = Path(folder) / size
            directory.mkdir()
            save_random(directory, SHAPES[size])
            for batch in options.batches:
                measure(directory, size, batch, options)


if __name__ == "__main__":
    main()
