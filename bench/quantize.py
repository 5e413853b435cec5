"""What rounded weights cost and save: tokens a second by batch, and bits per byte.

    python bench/quantize.py [--sizes 134M] [--batches 1 2 4 8] [--variants bf16 fp16 int8 int4]
    python bench/quantize.py --model DIR --data NAME=TEXTS.jsonl [--held-out 0.02] [--most-bytes 200000]

The first measures speed as `generate.py` does: random weights of its shapes, prompts of 16 tokens, greedy;
rounds of all variants in turn, medians. `prompt`: seconds to read one of 512 tokens. The second measures a
trained model's loss with fp32 weights and with rounded ones, on the same texts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from generate import SHAPES, save_random
from rich.console import Console
from rich.table import Table

from fledge.data.conversations import read_texts
from fledge.data.mixture import load_sources
from fledge.data.sources import split_documents
from fledge.engine.engine import Engine
from fledge.engine.products import QUANTIZED, WEIGHTS
from fledge.engine.text import load_engine
from fledge.evals.bits import bits_per_byte
from fledge.model.checkpoint import load_model
from fledge.types import SamplingParams

DTYPES: dict[str, torch.dtype] = {**WEIGHTS, **QUANTIZED}
LONG_PROMPT = 512


def seconds_of(engine: Engine, batch: int, prompt_tokens: int, tokens: int, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, 4000, (batch, prompt_tokens), generator=generator).tolist()
    started = time.perf_counter()
    engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=tokens))
    return time.perf_counter() - started


def speed(size: str, options: argparse.Namespace) -> Table:
    with tempfile.TemporaryDirectory() as folder:
        save_random(Path(folder), SHAPES[size])
        model = load_model(Path(folder))
    engines = {name: Engine(model, [], 64, DTYPES[name], keep_cache=True) for name in options.variants}
    taken: dict[tuple[str, int], list[float]] = {}
    for number in range(options.rounds + 1):
        for name, engine in engines.items():
            for batch in options.batches:
                seconds = seconds_of(engine, batch, 16, options.tokens, number)
                taken.setdefault((name, batch), []).append(seconds)
            taken.setdefault((name, 0), []).append(seconds_of(engine, 1, LONG_PROMPT, 1, number))
    middle = {key: statistics.median(values[1:]) for key, values in taken.items()}
    columns = [f"{batch} at once" for batch in options.batches]
    title = f"{size}, tokens/s (times {options.variants[0]}), {options.tokens} new tokens"
    table = Table("weights", *columns, f"prompt of {LONG_PROMPT}, s", title=title)
    for name in options.variants:
        cells = []
        for batch in options.batches:
            ratio = middle[options.variants[0], batch] / middle[name, batch]
            cells.append(f"{batch * options.tokens / middle[name, batch]:,.0f} ({ratio:.2f})")
        table.add_row(name, *cells, f"{middle[name, 0]:.3f}")
    return table


def loss(options: argparse.Namespace) -> Table:
    table = Table("weights", title=str(options.model))
    figures: dict[str, list[float]] = {}
    for source in load_sources(tuple(options.data)):
        table.add_column(f"{source.name}, bits per byte")
        _, tokenizer = load_engine(options.model)
        documents, encode = read_texts(source, tokenizer)
        if options.held_out is not None:
            documents = split_documents(documents, options.held_out)[1]
        kept, size = [], 0
        for document in documents:
            if size < options.most_bytes:
                kept.append(document)
                size += len(document.encode())
        ids = encode(kept)
        for name in ("fp32", *options.variants):
            engine, _ = load_engine(options.model, compute_dtype=DTYPES[name])
            bits = bits_per_byte(engine, ids, size, tokenizer.start_id, tokenizer.special_ids, 256)
            figures.setdefault(name, []).append(bits)
    for name, row in figures.items():
        against = zip(row, figures["fp32"], strict=True)
        table.add_row(name, *(f"{bits:.5f} ({bits / exact - 1:+.2%})" for bits, exact in against))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["134M"], choices=list(SHAPES))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument(
        "--variants", nargs="+", default=["bf16", "fp16", "int8", "int4"], choices=list(DTYPES)
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=Path, help="measure the loss of this model instead")
    parser.add_argument("--data", nargs="+", help="texts: NAME=PATH, as of `fledge evaluate`")
    parser.add_argument("--held-out", type=float, help="as of `fledge evaluate`")
    parser.add_argument("--most-bytes", type=int, default=200_000, help="of each text")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=130)
    if options.model is not None:
        console.print(loss(options))
        return
    for size in options.sizes:
        console.print(speed(size, options))


if __name__ == "__main__":
    main()
