"""Tiny Shakespeare by byte, on a CPU, with the budget of nanoGPT's CPU task: how low, and how soon.

    python bench/char.py input.txt [--seeds 0 1 2]

At most 0.81M parameters, a context of 64, at most 1.54M training tokens from the first nine tenths of
the text. Shown are the loss over the whole last tenth, in nats per byte (the text is ASCII: per
character) in windows of 64 that do not overlap, and the seconds of the whole process: start, training,
scoring. A process for each seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONTEXT, MOST_TOKENS, MOST_PARAMETERS = 64, 1_536_000, 810_000


def train(options: argparse.Namespace, seed: int) -> dict[str, float]:
    """One run in this process."""
    import torch

    from fledge.device import pick_compute_dtype
    from fledge.model.config import ModelConfig
    from fledge.model.transformer import CausalLM
    from fledge.run import Run
    from fledge.train.loop import fit
    from fledge.train.losses import forward_of, next_token_loss
    from fledge.train.optim import make_optimizers
    from fledge.train.plan import FitConfig
    from fledge.train.steps import row_steps
    from fledge.types import Batch

    text = torch.frombuffer(bytearray(Path(options.text).read_bytes()), dtype=torch.uint8).long()
    learnt, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    shape = (options.width, options.inner, options.layers, options.heads, options.heads)
    head = options.width // options.heads
    model = CausalLM(ModelConfig("qwen3", 256, *shape, head, CONTEXT, tie_word_embeddings=True))
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    assert model.num_parameters() <= MOST_PARAMETERS, model.num_parameters()
    steps = min(options.tokens, MOST_TOKENS) // (options.rows * CONTEXT)
    starts = torch.randint(len(learnt) - CONTEXT, (steps * options.rows,), generator=generator)
    span = torch.arange(CONTEXT + 1)

    def rows(first: int, count: int) -> Batch:
        ids = learnt[starts[first : first + count, None] + span]
        return Batch(ids, torch.ones_like(ids, dtype=torch.bool), None)

    dtype = pick_compute_dtype(torch.device("cpu"), options.dtype)
    plan = FitConfig(
        f"seed {seed}",
        steps,
        warmup_steps=20,
        decay_share=options.decay_share,
        evaluations=1,
        compute_dtype=dtype,
        compile=options.compile,
    )
    optimizers = make_optimizers(model, "muon", options.matrix_lr, options.adam_lr, options.weight_decay)
    with tempfile.TemporaryDirectory() as folder:
        run = Run.open(Path(folder) / "run", "")
        run.begin({})
        wanted = row_steps(rows, options.rows, options.rows)
        done = fit(model, optimizers, wanted, next_token_loss, plan, run, lambda _directory, _tokens: None)
    windows = held_out.unfold(0, CONTEXT + 1, CONTEXT)
    forward, nats = forward_of(model), 0.0
    with torch.inference_mode():
        for some in windows.split(256):
            nats += float(forward(some, None).sum())
    tokens = windows.shape[0] * CONTEXT
    return {
        "loss": nats / tokens,
        "tokens": tokens,
        "parameters": model.num_parameters(),
        "trained": done["tokens"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", nargs="?", help="Tiny Shakespeare's input.txt")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--inner", type=int, default=384)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=940_000)
    parser.add_argument("--matrix-lr", type=float, default=0.03)
    parser.add_argument("--adam-lr", type=float, default=0.01)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--decay-share", type=float, default=0.9)
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.text is None:  # `make bench` has none
        print("char.py needs Tiny Shakespeare's input.txt; nothing is measured")
        return
    if options.one:
        print(json.dumps(train(options, options.seeds[0])))
        return
    found = []
    for seed in options.seeds:
        started = time.perf_counter()
        command = [sys.executable, __file__, *sys.argv[1:], "--one", "--seeds", str(seed)]
        result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        result["seconds"] = time.perf_counter() - started
        found.append(result)
        print(
            f"seed {seed}: {result['loss']:.4f} nats per character over {result['tokens']:,} in windows of "
            f"{CONTEXT}; {result['seconds']:.1f} s; {result['parameters']:,} parameters, "
            f"{result['trained']:,} tokens",
            flush=True,
        )
    for what in ("loss", "seconds"):
        values = [result[what] for result in found]
        print(f"{what}: median {statistics.median(values):.4g}, {min(values):.4g} to {max(values):.4g}")


if __name__ == "__main__":
    main()
