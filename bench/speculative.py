"""What speculative decoding is worth: tokens a second with and without, and how many guesses were kept.

    python bench/speculative.py MODEL TEXTS.jsonl --drafts lookup DIR ... [--enlarge] [--temperature 0]

TEXTS has {"question": ...} rows, which a chat model answers, or {"text": ...} rows: a text's first `--take`
tokens are the prompt; with `--copy`, twice, so that the model may write on by copying. `lookup` is prompt
look-up, DIR a model with the same tokenizer. Texts are made one after the other (`--rows` at a time), with
and without guesses in turn, round by round; medians of the rounds are shown. The time is that of all of it,
prompts and drafts included. At temperature 0 every text is compared with the one that is made without.

A small model costs so little that guessing for it gains nothing, and a large one with random weights says
nothing that could be guessed. `--enlarge` makes a model of 134M parameters that computes what MODEL does: its
weights with zeros around them, and layers that add nothing. So guesses are kept as often as they are for
MODEL, and a pass costs what one of such a size costs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fledge.engine.draft_models import load_draft, new_lookup
from fledge.engine.engine import Engine
from fledge.engine.products import QUANTIZED, WEIGHTS
from fledge.engine.speculative import Counts, Speculation
from fledge.engine.text import LocalChat, load_engine
from fledge.model.transformer import CausalLM
from fledge.tokenizer.bpe import Tokenizer
from fledge.types import SamplingParams

LARGE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 18}
HEADS = 12


@torch.no_grad()
def enlarged(model: CausalLM) -> CausalLM:
    """A model of `LARGE` sizes that gives the same scores."""
    old = model.config
    ratio = LARGE["hidden_size"] / old.hidden_size
    config = replace(
        old, **LARGE, num_attention_heads=HEADS, num_key_value_heads=HEADS, tie_word_embeddings=False,
        rms_norm_eps=old.rms_norm_eps / ratio,
    )  # fmt: skip
    assert old.num_attention_heads == old.num_key_value_heads
    large = CausalLM(config)
    small_state = dict(model.state_dict())
    for name, tensor in large.state_dict().items():
        tensor.zero_()
        small: Tensor | None = small_state.get(name)
        if small is None:
            continue
        # The mean square of a vector with zeros around it is smaller by the ratio of the widths.
        is_norm = name.endswith(("layernorm.weight", "model.norm.weight"))
        tensor[tuple(slice(0, size) for size in small.shape)] = small / math.sqrt(ratio) if is_norm else small
    for layer in large.model.layers:
        attention = layer.self_attn
        for norm, place in ((attention.q_norm, 0), (attention.k_norm, 0)):
            if hasattr(norm, "weight"):
                norm.weight[place:].masked_fill_(norm.weight == 0, 1.0)
    return large.eval()


def prompts_of(
    rows: list[dict[str, str]], engine: Engine, tokenizer: Tokenizer, options: argparse.Namespace
) -> list[list[int]]:
    found = []
    for row in rows:
        if "question" in row:
            chat = LocalChat(engine, tokenizer)
            found.append(chat.prompt([{"role": "user", "content": row["question"]}]))
            continue
        ids = tokenizer.encode(row["text"])[: options.take]
        if len(ids) == options.take:
            found.append(
                [*ids, *tokenizer.encode("\n\n"), *ids[: options.take // 2]] if options.copy else ids
            )
    return found


def make(
    engine: Engine, prompts: list[list[int]], params: SamplingParams, rows: int
) -> tuple[float, list[list[int]]]:
    """Seconds, and the texts."""
    started = time.perf_counter()
    made = []
    for i in range(0, len(prompts), rows):
        made += [one.ids for one in engine.generate(prompts[i : i + rows], params)]
    return time.perf_counter() - started, made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--drafts", nargs="+", default=["lookup"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[6], help="guessed ahead at most")
    parser.add_argument("--enlarge", action="store_true")
    parser.add_argument("--copy", action="store_true")
    parser.add_argument("--take", type=int, default=160)
    parser.add_argument("--limit", type=int, default=12, help="texts")
    parser.add_argument("--last", action="store_true", help="the file's last texts, not its first")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", choices=[*WEIGHTS, *QUANTIZED], default="bf16")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = {**WEIGHTS, **QUANTIZED}[options.weights]
    plain, tokenizer = load_engine(options.model, compute_dtype=dtype)
    model = enlarged(plain.model) if options.enlarge and isinstance(plain.model, CausalLM) else plain.model

    def engine_of(speculation: Speculation | None) -> Engine:
        engine = Engine(model, plain.eos_ids, 64, dtype, keep_cache=True)
        engine._decoder = decoder  # laid out once for all
        engine.speculation = speculation
        return engine

    decoder = Engine(model, plain.eos_ids, 64, dtype, keep_cache=True).decoder()
    engines = {"without": engine_of(None)}
    for name in options.drafts:
        for tokens in options.tokens:
            new_draft = new_lookup
            if name != "lookup":
                new_draft = load_draft(Path(name), tokenizer, model.config.vocab_size, None, dtype)
            engines[f"{name}, {tokens}"] = engine_of(Speculation(new_draft, tokens))
    lines = [json.loads(line) for line in options.texts.read_text().splitlines()]
    prompts = prompts_of(lines[::-1] if options.last else lines, plain, tokenizer, options)[: options.limit]
    ends = (
        () if tokenizer.end_of_turn_id is None or "question" not in lines[0] else (tokenizer.end_of_turn_id,)
    )
    params = SamplingParams(options.temperature, max_tokens=options.max_tokens, stop_ids=ends)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    texts: dict[str, list[list[int]]] = {}
    for _ in range(options.rounds + 1):
        for name, engine in engines.items():
            if engine.speculation is not None:
                engine.speculation.counts = Counts()
            taken, texts[name] = make(engine, prompts, params, options.rows)
            seconds[name].append(taken)
    speed = {n: sum(map(len, texts[n])) / statistics.median(seconds[n][1:]) for n in engines}
    title = (
        f"{model.num_parameters() / 1e6:.0f}M, {options.weights}, temperature {options.temperature:g}, "
        f"{len(prompts)} texts, {sum(map(len, texts['without'])):,} tokens, {options.rows} at a time"
    )
    table = Table("draft", "tokens/s", "times", "kept", "tokens a pass", "same texts", title=title)
    for name, engine in engines.items():
        counts = Counts() if engine.speculation is None else engine.speculation.counts
        same = sum(a == b for a, b in zip(texts[name], texts["without"], strict=True))
        table.add_row(
            name, f"{speed[name]:,.0f}", f"{speed[name] / speed['without']:.2f}",
            f"{counts.kept / counts.proposed:.0%}" if counts.proposed else "",
            f"{counts.tokens / counts.passes:.2f}" if counts.passes else "",
            f"{same} of {len(prompts)}" if options.temperature == 0 else "",
        )  # fmt: skip
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
