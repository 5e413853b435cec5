"""An n-gram model from a mixture: its documents are counted instead of learned from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console

from fledge.config import Dataclass
from fledge.data.mixture import MixtureSource
from fledge.errors import UserError
from fledge.files import new_directory, write_json
from fledge.model.ngram import BYTES_A_TOKEN, NgramConfig, NgramModel
from fledge.run import Run
from fledge.tokenizer.bpe import Tokenizer
from fledge.train.memory import free_bytes
from fledge.train.progress import say

# The settings of `fledge pretrain` that an n-gram model is made by; all others mean nothing to it.
SETTINGS = (
    "data", "tokenizer", "out", "model_type", "order", "context", "row_tokens", "shards", "skip_bad_lines",
    "validation_share", "prompts", "overwrite",
)  # fmt: skip


def count_sources(
    run: Run,
    console: Console,
    config: Dataclass,
    shape: NgramConfig,
    tokenizer: Tokenizer,
    sources: Sequence[MixtureSource],
    evaluate: Callable[[NgramModel], dict[str, float]],
    origin: Callable[[int], dict[str, Any]],
) -> None:
    """Count every training document once, whatever its source's weight, and write `model/`, its figures and
    `summary.json`. `evaluate` gives them, with those of `validation/SOURCE`; `origin` the lineage of a model
    that has read so many tokens. Raises UserError where memory for counting lacks."""
    if unused := without_meaning(config):
        say(console, f"without a meaning for an n-gram model: {', '.join(unused)}")
    tokens = sum(source.training_tokens for source in sources)
    _check_memory(tokens)
    say(console, f"counting {tokens:,} tokens, each document once, whatever its source's weight")
    documents = (
        source.shards.read(document, 0, int(source.shards.lengths[document]))
        for source in sources
        for document in source.training.tolist()
    )
    model = NgramModel.count(documents, tokenizer.eos_id, shape)
    run.rewind(-1, -1)  # what an interrupted run has logged
    figures = evaluate(model)
    run.log("metrics", {"step": 0, "tokens": tokens, **figures})
    with new_directory(run.model, overwrite=True) as directory:
        model.save(directory, tokenizer, origin(tokens), tokenizer.eos_id)
    bits = {source.name: figures[f"validation/{source.name}"] for source in sources}
    summary = {"stage": "pretrain", "parameters": model.num_parameters(), "tokens": tokens}
    write_json(run.directory / "summary.json", {**summary, "bits_per_byte": bits})
    named = ", ".join(f"{name} {value:.3f}" for name, value in bits.items())
    say(console, f"{model.num_parameters():,} n-grams; bits per byte of what was held out: {named}")
    say(console, f"the base model is {run.model}")


def _check_memory(tokens: int) -> None:
    needed, free = BYTES_A_TOKEN * tokens, free_bytes(torch.device("cpu"))
    if free is not None and needed > free:
        raise UserError(
            f"counting {tokens:,} tokens takes about {needed / 2**30:.1f} GiB of memory, and "
            f"{free / 2**30:.1f} are free; leave out sources, or train a model instead"
        )


def without_meaning(config: Dataclass) -> list[str]:
    """The flags that were set and mean nothing to an n-gram model."""
    return [
        f"--{field.name.replace('_', '-')}"
        for field in dataclasses.fields(config)
        if field.name not in SETTINGS and getattr(config, field.name) != field.default
    ]
