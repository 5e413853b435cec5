"""`fledge pretrain`: from text to a base model."""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from dataclasses import asdict, dataclass
from dataclasses import replace as with_values
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from fledge import __version__
from fledge.config import to_toml
from fledge.data.packing import Mixture, TokenSource
from fledge.data.sources import parse_sources, read_documents, split_documents
from fledge.device import ComputeName, DeviceName, can_compile, pick_compute_dtype, pick_device
from fledge.engine.engine import Engine
from fledge.errors import UserError
from fledge.evals.bits import bits_per_byte
from fledge.files import new_directory, write_json
from fledge.model.checkpoint import save_model
from fledge.model.transformer import CausalLM
from fledge.run import Run
from fledge.tokenizer.bpe import Tokenizer
from fledge.train.losses import next_token_loss
from fledge.train.loop import FitConfig, Metrics, Step, fit
from fledge.train.optim import OptimizerName, make_optimizers
from fledge.train.recipe import Recipe, model_config, parse_count, recipe_for
from fledge.types import SamplingParams

# A source's validation part beyond this costs more time at every evaluation than it adds precision.
VALIDATION_BYTES = 20_000


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
        console.print(f"{config.out}: finished already; the model is {run.model}", highlight=False)
        return
    device = pick_device(config.device)
    recipe = _recipe(config, tokenizer.vocab_size)
    texts = _Texts.read([(s.name, s.path, s.weight) for s in sources], tokenizer, config)
    model = CausalLM(model_config(recipe, config.model_type, tokenizer.vocab_size, config.context))
    model.init_weights(torch.Generator().manual_seed(config.seed))
    model.to(device)
    fit_config = _fit_config(config, recipe, device)
    _print_plan(console, config, recipe, model, texts, fit_config)
    rows = recipe.batch_tokens // config.row_tokens
    micro = max(1, config.micro_batch_tokens // config.row_tokens)

    def steps(first: int, _state: dict[str, Any]) -> Generator[Step, Metrics | None, None]:
        for step in range(first, 2**62):
            spans = range(step * rows, (step + 1) * rows, micro)
            yield Step([texts.mixture.rows(r, min(micro, (step + 1) * rows - r)) for r in spans])

    def lineage(tokens: int) -> dict[str, Any]:
        return {
            "stage": "pretrain",
            "parent": None,
            "fledge_version": __version__,
            "config": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()},
            "data": texts.fingerprints,
            "tokenizer": tokenizer.fingerprint(),
            "tokens": tokens,
        }

    def write_model(directory: Path) -> None:
        save_model(directory, model, tokenizer, lineage(0), [tokenizer.eos_id])

    def evaluate(step: int) -> Metrics:
        engine = Engine(model, [tokenizer.eos_id], compute_dtype=fit_config.compute_dtype)
        figures = texts.bits_per_byte(engine, tokenizer, config.row_tokens)
        for prompt in config.prompts:
            ids = [tokenizer.eos_id, *tokenizer.encode(prompt)]
            made = engine.generate([ids], SamplingParams(temperature=0.0, max_tokens=48))[0]
            run.log("samples", {"step": step, "prompt": prompt, "text": tokenizer.decode(made.ids)})
        shares = dict(zip(texts.names, texts.shares, strict=True))
        mean = sum(figures[name] * share for name, share in shares.items()) / sum(shares.values())
        return {"validation": mean, **{f"validation/{name}": value for name, value in figures.items()}}

    optimizers = make_optimizers(model, config.optimizer, recipe.matrix_lr, recipe.adam_lr, config.weight_decay)
    done = fit(model, optimizers, steps, next_token_loss, fit_config, run, write_model, evaluate)
    with new_directory(run.model, overwrite=True) as directory:
        save_model(directory, model, tokenizer, lineage(done["tokens"]), [tokenizer.eos_id])
    validation = [row for row in run.rows("metrics") if "validation" in row][-1]
    seen = texts.mixture.seen(done["steps"] * rows)
    write_json(
        run.directory / "summary.json",
        {
            "stage": "pretrain",
            "parameters": model.num_parameters(),
            **done,
            "bits_per_byte": {name: validation[f"validation/{name}"] for name in texts.names},
            "epochs": {s.name: round(n / len(s), 3) for s, n in zip(texts.mixture.sources, seen, strict=True)},
        },
    )
    console.print(f"the base model is {run.model}", highlight=False)


def _check(config: Config) -> None:
    if config.tokens and config.minutes:
        raise UserError("--tokens and --minutes: give one of them")
    if config.row_tokens > config.context:
        raise UserError(f"--row-tokens {config.row_tokens} is longer than --context {config.context}")
    if config.minutes is not None and config.minutes <= 0:
        raise UserError(f"--minutes {config.minutes}: must be above 0")
    if not 0 < config.validation_share < 1:
        raise UserError(f"--validation-share {config.validation_share}: must be between 0 and 1")
    for name in ("row_tokens", "context", "batch_tokens", "micro_batch_tokens", "evaluations", "keep_checkpoints"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")


def _recipe(config: Config, vocab_size: int) -> Recipe:
    recipe = recipe_for(parse_count(config.params, "params"), vocab_size)
    chosen: dict[str, Any] = {}
    if config.hidden_size:
        if config.hidden_size % 64:
            raise UserError(f"--hidden-size {config.hidden_size}: must be a multiple of 64")
        heads = config.hidden_size // 64
        chosen = {"hidden_size": config.hidden_size, "heads": heads, "key_value_heads": heads}
        chosen["intermediate_size"] = round(config.hidden_size * 8 / 3 / 64) * 64
    overrides = {
        "layers": config.layers,
        "batch_tokens": config.batch_tokens,
        "matrix_lr": config.matrix_lr,
        "adam_lr": config.adam_lr,
        "tokens": parse_count(config.tokens, "tokens") if config.tokens else None,
    }
    recipe = with_values(recipe, **chosen, **{k: v for k, v in overrides.items() if v is not None})
    return with_values(recipe, batch_tokens=max(1, recipe.batch_tokens // config.row_tokens) * config.row_tokens)


def _fit_config(config: Config, recipe: Recipe, device: torch.device) -> FitConfig:
    total = None if config.minutes else max(1, round(recipe.tokens / recipe.batch_tokens))
    # Starting the compiler takes up to half a minute; shorter runs are over sooner without it.
    long = config.minutes > 2 if config.minutes else recipe.tokens * 6 * parse_count(config.params, "params") > 2e13
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


@dataclass(frozen=True)
class _Texts:
    """The sources, tokenised: a mixture to train on and documents to validate on."""

    mixture: Mixture
    names: list[str]
    shares: list[float]
    counts: list[tuple[int, int]]
    """Training documents and bytes of each source."""
    validation: list[tuple[list[list[int]], int]]
    """Held-out documents of each source and their bytes."""
    fingerprints: dict[str, str]

    @classmethod
    def read(cls, sources: list[tuple[str, Path, float | None]], tokenizer: Tokenizer, config: Config) -> _Texts:
        packed, counts, validation, fingerprints = [], [], [], {}
        for number, (name, path, _) in enumerate(sources):
            documents = list(read_documents(path))
            if not documents:
                raise UserError(f"{path}: no text in it")
            train, held = split_documents(documents, config.validation_share)
            if not train or not held:
                raise UserError(f"{path}: one document is too little; nothing is left to hold out for validation")
            held = _first_bytes(held, VALIDATION_BYTES)
            encoded = tokenizer.encode_batch(train)
            packed.append(TokenSource.from_documents(name, encoded, tokenizer.eos_id, config.seed * 1000 + number))
            counts.append((len(train), sum(len(text.encode()) for text in train)))
            validation.append((tokenizer.encode_batch(held), sum(len(text.encode()) for text in held)))
            digest = hashlib.sha256()
            for text in documents:
                digest.update(hashlib.sha256(text.encode()).digest())
            fingerprints[name] = digest.hexdigest()
        weights = [weight for _, _, weight in sources]
        parts = [len(source) if weight is None else weight for source, weight in zip(packed, weights, strict=True)]
        shares = [part / sum(parts) for part in parts]
        mixture = Mixture(packed, shares, config.row_tokens, tokenizer.eos_id, config.isolate_documents)
        return cls(mixture, [name for name, _, _ in sources], shares, counts, validation, fingerprints)

    def bits_per_byte(self, engine: Engine, tokenizer: Tokenizer, window: int) -> dict[str, float]:
        return {
            name: bits_per_byte(engine, documents, size, tokenizer.eos_id, tokenizer.special_ids, window)
            for name, (documents, size) in zip(self.names, self.validation, strict=True)
        }


def _first_bytes(documents: list[str], limit: int) -> list[str]:
    taken, size = [], 0
    for document in documents:
        size += len(document.encode())
        if taken and size > limit:
            break
        taken.append(document)
    return taken


def _print_plan(
    console: Console, config: Config, recipe: Recipe, model: CausalLM, texts: _Texts, fit_config: FitConfig
) -> None:
    table = Table("source", "documents", "MB", "tokens", "share", "epochs", title="what it will read")
    planned = None if fit_config.total_steps is None else fit_config.total_steps * recipe.batch_tokens
    for source, share, (documents, size) in zip(texts.mixture.sources, texts.shares, texts.counts, strict=True):
        epochs = "?" if planned is None else f"{planned * share / len(source):.2f}"
        cells = [source.name, f"{documents:,}", f"{size / 1e6:.2f}", f"{len(source):,}", f"{share:.1%}", epochs]
        table.add_row(*cells)
    console.print(table)
    length = f"{config.minutes} minutes" if planned is None else f"{planned:,} tokens, {fit_config.total_steps:,} steps"
    console.print(
        f"{model.num_parameters():,} parameters: {recipe.layers} layers of width {recipe.hidden_size}, "
        f"{recipe.heads} heads, MLP {recipe.intermediate_size}, vocabulary {model.config.vocab_size:,}\n"
        f"{length}; {recipe.batch_tokens:,} tokens a step in rows of {config.row_tokens}; "
        f"{config.optimizer}, peak rates {recipe.matrix_lr:.3g} (hidden matrices) and {recipe.adam_lr:.3g} (the rest); "
        f"{str(fit_config.compute_dtype).removeprefix('torch.')}, {'compiled' if fit_config.compile else 'eager'}",
        highlight=False,
    )
