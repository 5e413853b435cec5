"""What a constraint costs: tokens/s with and without one, for a JSON schema and regular expressions.

    python bench/constraints.py [--model DIR] [--rows 8] [--max-tokens 64] [--rounds 5]

Without --model it is a random model over a vocabulary that is trained on the standard library. Rounds are
interleaved, so that a slow minute of the machine slows them all; medians are shown. What is free runs to
--max-tokens; a constrained text may end before, so speeds are by token, and the passes through the model are
shown too: forced tokens share one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fledge.data.sources import parse_source, read_documents
from fledge.engine.constraints import Grammars
from fledge.engine.decoder import Decoder
from fledge.engine.engine import Engine
from fledge.engine.text import load_engine
from fledge.model.config import ModelConfig
from fledge.model.transformer import CausalLM
from fledge.tokenizer.bpe import Tokenizer, train_bpe
from fledge.types import Grammar, SamplingParams

SCHEMA = {
    "type": "object",
    "properties": {
        "module": {"type": "string", "maxLength": 40},
        "function": {"type": "string", "pattern": "[a-z_]{1,20}"},
        "arguments": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
        "deprecated": {"type": "boolean"},
        "version": {"type": "number"},
    },
    "required": ["module", "function", "arguments", "deprecated", "version"],
    "additionalProperties": False,
}
CASES: dict[str, Grammar | None] = {
    "free": None,
    "JSON schema": Grammar("json_schema", json.dumps(SCHEMA)),
    "regex": Grammar("regex", r"([A-Z][a-z]{2,12} [a-z ]{5,40}\. ){2,9}"),
    "any text": Grammar("regex", r"(?s:.*)"),
}


def random_engine(vocab_size: int) -> tuple[Engine, Tokenizer]:
    source = parse_source(str(Path(json.__file__).parent.parent / "*.py"))
    texts, size = [], 0
    for text in read_documents(source):
        texts.append(text)
        size += len(text)
        if size > 3e6:
            break
    tokenizer = train_bpe(texts, vocab_size)
    model = CausalLM(ModelConfig("qwen3", tokenizer.vocab_size, 256, 768, 6, 4, 2, 64, 512)).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    return Engine(model, [tokenizer.eos_id], grammars=grammars), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--vocab-size", type=int, default=32_768, help="of the random model")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    engine, tokenizer = load_engine(options.model) if options.model else random_engine(options.vocab_size)
    grammars = engine.grammars
    assert grammars is not None
    prompts = [tokenizer.encode(f"def f{i}():") for i in range(options.rows)]
    passes, extend = [0], Decoder.extend

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        passes[0] += 1
        return extend(*args, **kwargs)

    Decoder.extend = counted  # type: ignore[method-assign]
    speeds: dict[str, list[float]] = {name: [] for name in CASES}
    shares: dict[str, tuple[float, float]] = {}
    for number in range(options.rounds + 1):
        for name, grammar in CASES.items():
            params = SamplingParams(max_tokens=options.max_tokens, seed=number, constraint=grammar)
            masks, spent, passes[0] = grammars.masks, grammars.mask_seconds, 0
            started = time.perf_counter()
            completions = engine.generate(prompts, params)
            seconds = time.perf_counter() - started
            tokens = sum(len(completion.ids) for completion in completions)
            if number:
                speeds[name].append(tokens / seconds)
                made = max(1, grammars.masks - masks)
                shares[name] = (1e6 * (grammars.mask_seconds - spent) / made, tokens / passes[0])
    table = Table("", "tokens/s", "times free", "µs a mask", "tokens a pass", title_justify="left")
    free = statistics.median(speeds["free"])
    for name, values in speeds.items():
        microseconds, per_pass = shares[name]
        speed = statistics.median(values)
        table.add_row(name, f"{speed:,.0f}", f"{speed / free:.2f}", f"{microseconds:.0f}", f"{per_pass:.1f}")
    console = Console()
    console.print(table)
    size = engine.model.num_parameters() / 1e6
    console.print(
        f"{options.rows} rows, vocabulary {tokenizer.vocab_size:,}, {size:.1f} M parameters, "
        f"up to {options.max_tokens} tokens, medians of {options.rounds} rounds",
        highlight=False,
    )


if __name__ == "__main__":
    main()
