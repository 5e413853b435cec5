"""`fledge pretrain`: from text to a base model."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace as with_values
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fledge.config import check_at_least, to_toml
from fledge.data.mixture import SourceTexts, read_sources
from fledge.data.packing import Mixture
from fledge.data.sources import parse_sources
from fledge.device import ComputeName, DeviceName, can_compile, pick_compute_dtype, pick_device
from fledge.engine.engine import Engine
from fledge.errors import UserError
from fledge.evals.bits import bits_per_byte
from fledge.files import new_directory, write_json
from fledge.model.checkpoint import save_model
from fledge.model.transformer import CausalLM
from fledge.run import Run, lineage
from fledge.tokenizer.bpe import Tokenizer
from fledge.train.loop import FitConfig, Metrics, fit, row_steps
from fledge.train.losses import next_token_loss
from fledge.train.optim import OptimizerName, make_optimizers
from fledge.train.progress import say
from fledge.train.recipe import Recipe, intermediate_size_for, model_config, parse_count, recipe_for
from fledge.types import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a base model on text files."""

    data: tuple[str, ...]
    """Sources as NAME=PATH:WEIGHT: text files, .jsonl files with a "text" field, or folders of them."""
    tokenizer: Path
    """Directory of a trained tokenizer."""
    out: Path = Path("runs/pretrain")
    """Run directory; the same command again resumes it."""
    params: str = "10M"
    """The one dial: about how many parameters, as in 5M or 1.3B."""
    tokens: str | None = None
    """How many tokens to train on, as in 20M; by default 20 for each parameter."""
    minutes: float | None = None
    """Train about this long instead: the speed is measured once, then the number of steps stands."""
    model_type: Literal["qwen3", "llama"] = "qwen3"
    """Model family."""
    layers: int | None = None
    """Blocks; by default from --params."""
    hidden_size: int | None = None
    """Width, a multiple of 64; by default from --params."""
    context: int = 1024
    """Longest sequence the model is declared for, in tokens."""
    row_tokens: int = 256
    """Length of the training rows, in tokens."""
    batch_tokens: int | None = None
    """Tokens of an optimizer step; by default from --params."""
    micro_batch_tokens: int = 16_384
    """Most tokens in memory at once; larger batches are accumulated."""
    optimizer: OptimizerName = "muon"
    """muon (hidden matrices; AdamW for the rest) or adamw (for all)."""
    matrix_lr: float | None = None
    """Muon's peak learning rate; by default from --params."""
    adam_lr: float | None = None
    """AdamW's peak learning rate; by default from --params."""
    weight_decay: float = 0.0
    """Decoupled weight decay of all matrices."""
    warmup_steps: int = 20
    """Steps over which the learning rate rises."""
    decay_share: float = 0.4
    """Share of the run, at its end, over which the learning rate falls to zero."""
    max_spike: float = 3.0
    """Stop when the loss jumps this many nats above its running mean."""
    isolate_documents: bool = False
    """Hide the documents of a row from each other."""
    validation_share: float = 0.01
    """Share of each source's documents held out, chosen by a hash of their text."""
    evaluations: int = 8
    """How many times to save a checkpoint and evaluate it."""
    keep_checkpoints: int = 2
    """Latest checkpoints to keep, besides the best."""
    prompts: tuple[str, ...] = ()
    """Texts the model continues at every evaluation, for samples.jsonl."""
    seed: int = 0
    """Seed of weights and data order."""
    device: DeviceName = "auto"
    """Where to train."""
    compute: ComputeName = "auto"
    """Type of matrix products; auto is bf16 where it is fast."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """torch.compile; auto uses it for runs long enough when there is a C++ compiler."""
    overwrite: bool = False
    """Delete what --out holds of an earlier run."""


def main(config: Config) -> None:
    """Train to the end, or go on where an interrupted run stopped."""
    console = Console(stderr=True)
    _check(config)
    tokenizer = Tokenizer.load(config.tokenizer)
    sources = parse_sources(config.data)
    run = Run.open(config.out, to_toml(with_values(config, overwrite=False)), config.overwrite)
    if run.finished:
        say(console, f"{config.out}: finished already; the model is {run.model}")
        return
    device = pick_device(config.device)
    recipe = _recipe(config, tokenizer.vocab_size)
    texts = read_sources(sources, tokenizer, config.validation_share, config.seed)
    training, shares = [text.training for text in texts], [text.share for text in texts]
    mixture = Mixture(training, shares, config.row_tokens, tokenizer.eos_id, config.isolate_documents)
    model = CausalLM(model_config(recipe, config.model_type, tokenizer.vocab_size, config.context))
    model.init_weights(torch.Generator().manual_seed(config.seed))
    model.to(device)
    fit_config = _fit_config(config, recipe, device)
    rates = (recipe.matrix_lr, recipe.adam_lr, config.weight_decay)
    optimizers = make_optimizers(model, config.optimizer, *rates)
    prompts = _encode_prompts(config, tokenizer)
    data = {text.name: text.fingerprint for text in texts}
    run.begin({"the tokenizer": tokenizer.fingerprint(), **{f"source {name!r}": data[name] for name in data}})
    _print_plan(console, config, recipe, model, texts, fit_config)
    rows = recipe.batch_tokens // config.row_tokens
    steps = row_steps(mixture.rows, rows, max(1, config.micro_batch_tokens // config.row_tokens))

    def write_model(directory: Path, tokens: int) -> None:
        origin = lineage("pretrain", config, None, data, tokenizer.fingerprint(), tokens)
        save_model(directory, model, tokenizer, origin, [tokenizer.eos_id])

    def evaluate(step: int) -> Metrics:
        engine = Engine(model, [tokenizer.eos_id], compute_dtype=fit_config.compute_dtype)
        figures = _bits(texts, engine, tokenizer, config.row_tokens)
        for prompt, ids in zip(config.prompts, prompts, strict=True):
            made = engine.generate([ids], SamplingParams(temperature=0.0, max_tokens=48))[0]
            run.log("samples", {"step": step, "prompt": prompt, "text": tokenizer.decode(made.ids)})
        mean = sum(figures[text.name] * text.share for text in texts)
        return {"validation": mean, **{f"validation/{name}": value for name, value in figures.items()}}

    done = fit(model, optimizers, steps, next_token_loss, fit_config, run, write_model, evaluate)
    with new_directory(run.model, overwrite=True) as directory:
        write_model(directory, done["tokens"])
    validation = [row for row in run.rows("metrics") if "validation" in row][-1]
    seen = mixture.seen(done["steps"] * rows)
    summary = {
        "stage": "pretrain",
        "parameters": model.num_parameters(),
        **done,
        "bits_per_byte": {text.name: validation[f"validation/{text.name}"] for text in texts},
        "epochs": {t.name: round(n / len(t.training), 3) for t, n in zip(texts, seen, strict=True)},
    }
    write_json(run.directory / "summary.json", summary)
    say(console, f"the base model is {run.model}")


def _bits(texts: list[SourceTexts], engine: Engine, tokenizer: Tokenizer, window: int) -> dict[str, float]:
    """Bits per byte on what is held out of each source."""
    special = tokenizer.special_ids
    return {
        t.name: bits_per_byte(engine, t.held_out, t.held_out_bytes, tokenizer.eos_id, special, window)
        for t in texts
    }


def _encode_prompts(config: Config, tokenizer: Tokenizer) -> list[list[int]]:
    prompts = [[tokenizer.eos_id, *tokenizer.encode(prompt)] for prompt in config.prompts]
    for ids in prompts:
        if len(ids) > config.context:
            raise UserError(f"--prompts: one has {len(ids)} tokens, longer than --context {config.context}")
    return prompts


def _check(config: Config) -> None:
    check_at_least(config, 0, "seed")
    if config.tokens and config.minutes:
        raise UserError("--tokens and --minutes: give one of them")
    if config.row_tokens > config.context:
        raise UserError(f"--row-tokens {config.row_tokens} is longer than --context {config.context}")
    if not 0 < config.validation_share < 1:
        raise UserError(f"--validation-share {config.validation_share}: must be between 0 and 1")
    if config.hidden_size is not None and (config.hidden_size < 64 or config.hidden_size % 64):
        raise UserError(f"--hidden-size {config.hidden_size}: must be a multiple of 64")
    check_at_least(config, 1, "row_tokens", "context", "batch_tokens", "micro_batch_tokens", "layers")


def _recipe(config: Config, vocab_size: int) -> Recipe:
    recipe = recipe_for(parse_count(config.params, "params"), vocab_size)
    chosen: dict[str, Any] = {}
    if config.hidden_size:
        heads = config.hidden_size // 64
        chosen = {"hidden_size": config.hidden_size, "heads": heads, "key_value_heads": heads}
        chosen["intermediate_size"] = intermediate_size_for(config.hidden_size)
    overrides: dict[str, Any] = {
        "layers": config.layers,
        "batch_tokens": config.batch_tokens,
        "matrix_lr": config.matrix_lr,
        "adam_lr": config.adam_lr,
        "tokens": parse_count(config.tokens, "tokens") if config.tokens else None,
    }
    chosen.update({name: value for name, value in overrides.items() if value is not None})
    recipe = with_values(recipe, **chosen)
    return with_values(
        recipe, batch_tokens=max(1, recipe.batch_tokens // config.row_tokens) * config.row_tokens
    )


def _fit_config(config: Config, recipe: Recipe, device: torch.device) -> FitConfig:
    total = None if config.minutes else max(1, round(recipe.tokens / recipe.batch_tokens))
    # Starting the compiler takes up to half a minute; shorter runs are over sooner without it.
    long = (
        config.minutes > 2
        if config.minutes
        else recipe.tokens * 6 * parse_count(config.params, "params") > 2e13
    )
    return FitConfig(
        label="pretrain",
        total_steps=total,
        minutes=config.minutes,
        warmup_steps=config.warmup_steps,
        decay_share=config.decay_share,
        max_spike=config.max_spike,
        evaluations=config.evaluations,
        keep_checkpoints=config.keep_checkpoints,
        compute_dtype=pick_compute_dtype(device, config.compute),
        compile=config.compile == "yes" or (config.compile == "auto" and long and can_compile()[0]),
    )


def _print_plan(
    console: Console,
    config: Config,
    recipe: Recipe,
    model: CausalLM,
    texts: list[SourceTexts],
    fit_config: FitConfig,
) -> None:
    table = Table("source", "documents", "MB", "tokens", "share", "epochs", title="what it will read")
    planned = None if fit_config.total_steps is None else fit_config.total_steps * recipe.batch_tokens
    for text in texts:
        tokens = len(text.training)
        epochs = "?" if planned is None else f"{planned * text.share / tokens:.2f}"
        size = f"{text.text_bytes / 1e6:.2f}"
        table.add_row(
            escape(text.name), f"{text.documents:,}", size, f"{tokens:,}", f"{text.share:.1%}", epochs
        )
    console.print(table)
    length = (
        f"{config.minutes} minutes"
        if planned is None
        else f"{planned:,} tokens, {fit_config.total_steps:,} steps"
    )
    console.print(
        f"{model.num_parameters():,} parameters: {recipe.layers} layers of width {recipe.hidden_size}, "
        f"{recipe.heads} heads, MLP {recipe.intermediate_size}, vocabulary {model.config.vocab_size:,}\n"
        f"{length}; {recipe.batch_tokens:,} tokens a step in rows of {config.row_tokens}; "
        f"{config.optimizer}, peak rates {recipe.matrix_lr:.3g} (hidden matrices) and {recipe.adam_lr:.3g} "
        f"(the rest); {fit_config.execution}",
        highlight=False,
    )
