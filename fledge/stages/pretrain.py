"""`fledge pretrain`: from text to a base model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from fledge.config import check_at_least, to_toml
from fledge.data.accounts import Account, accounts
from fledge.data.mixture import MixtureSource, Packing, check_size, load_sources, mix
from fledge.data.sources import Source
from fledge.data.tables import account_table, plan_table
from fledge.device import ComputeName, DeviceName, pick_compile, pick_compute_dtype, pick_device
from fledge.engine.engine import Engine
from fledge.errors import UserError
from fledge.evals.held_out import held_out_evaluation
from fledge.files import new_directory, write_json
from fledge.model.checkpoint import save_model
from fledge.model.config import ModelConfig
from fledge.model.ngram import NgramConfig, NgramModel
from fledge.model.transformer import CausalLM
from fledge.run import Run, lineage
from fledge.tokenizer.bpe import Tokenizer
from fledge.train.counting import count_sources
from fledge.train.loop import fit
from fledge.train.losses import next_token_loss
from fledge.train.memory import Setup, check_memory_here
from fledge.train.optim import OptimizerName, make_optimizers
from fledge.train.parallel import Ranks, joined
from fledge.train.plan import FitConfig
from fledge.train.progress import say
from fledge.train.reading import begin_run, read_sources
from fledge.train.recipe import Recipe, adapted, model_config, parse_count, recipe_for
from fledge.train.steps import Metrics, row_steps


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a base model on text files."""

    data: tuple[str, ...]
    """A mixture file (.toml), or sources as NAME=PATH:WEIGHT: files, folders or globs of text, .jsonl..."""
    tokenizer: Path
    """Directory of a trained tokenizer."""
    weights: tuple[str, ...] = ()
    """Other weights of sources than theirs, as NAME=WEIGHT."""
    out: Path = Path("runs/pretrain")
    """Run directory; the same command again resumes it."""
    params: str = "10M"
    """The one dial: about how many parameters, as in 5M or 1.3B."""
    tokens: str | None = None
    """How many tokens to train on, as in 20M; by default 20 for each parameter."""
    minutes: float | None = None
    """Train about this long instead: the speed is measured once, then the number of steps stands."""
    model_type: Literal["qwen3", "llama", "ngram"] = "qwen3"
    """Model family; ngram counts the text (Kneser-Ney) instead of learning from it."""
    order: int | None = None
    """Of an n-gram model, which looks at the last order - 1 tokens; 5 by default."""
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
    checkpoint_activations: bool = False
    """Compute the inside of each block again in the backward pass: a third slower, far less memory."""
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
    packing: Packing = "stream"
    """stream: documents end to end, cut where a row is full. best-fit: whole where they fit, with padding."""
    isolate_documents: bool = False
    """Hide the documents of a row from each other."""
    shards: Path | None = None
    """Where tokenised sources are kept for further runs; by default `shards` beside --out."""
    skip_bad_lines: bool = False
    """Count lines that cannot be read and go on, instead of stopping at the first."""
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
    with joined(config.device) as ranks:
        _train(config, ranks)


def _train(config: Config, ranks: Ranks) -> None:
    console = Console(stderr=True, quiet=not ranks.leads)
    _check(config)
    tokenizer = Tokenizer.load(config.tokenizer)
    named = load_sources(config.data, config.weights)
    run = Run.open(config.out, to_toml(replace(config, overwrite=False)), config.overwrite, ranks.leads)
    if run.finished:
        say(console, f"{config.out}: finished already; the model is {run.model}")
        return
    if config.model_type == "ngram":
        if ranks.count > 1:
            raise UserError("--model-type ngram is counted by one process: start it without torchrun")
        _count(config, run, console, tokenizer, named)
        return
    device = pick_device(config.device)
    recipe = _recipe(config, tokenizer.vocab_size)
    prompts = _encode_prompts(config, tokenizer)
    fit_config = _fit_config(config, recipe, device)
    memory = _check_memory(config, tokenizer.vocab_size, recipe, fit_config, device, ranks)
    model = CausalLM(model_config(recipe, config.model_type, tokenizer.vocab_size, config.context))
    model.checkpoint_activations = config.checkpoint_activations
    model.init_weights(torch.Generator().manual_seed(config.seed))
    model.to(device)
    rates = (recipe.matrix_lr, recipe.adam_lr, config.weight_decay)
    optimizers = make_optimizers(model, config.optimizer, *rates)
    with ranks.leader_first():  # after all that can be wrong without it
        sources = _read(config, console, tokenizer, named)
    fit_config, planned = _within_maxima(fit_config, recipe, sources)
    console.print(plan_table(sources, planned))
    check_size(sources, recipe.batch_tokens, planned)
    mixture = mix(
        sources, config.packing, config.row_tokens, tokenizer.eos_id, config.seed, config.isolate_documents
    )
    data = begin_run(run, tokenizer, sources)
    _print_plan(console, config, recipe, model, fit_config, memory)
    rows = recipe.batch_tokens // config.row_tokens
    steps = row_steps(mixture.rows, rows, max(1, config.micro_batch_tokens // config.row_tokens), ranks)

    def write_model(directory: Path, tokens: int) -> None:
        origin = lineage("pretrain", config, None, data, tokenizer.fingerprint(), tokens)
        save_model(directory, model, tokenizer, origin, [tokenizer.eos_id])

    engine = Engine(model, [tokenizer.eos_id], compute_dtype=fit_config.compute_dtype)
    evaluate = held_out_evaluation(run, engine, tokenizer, prompts, sources, config.row_tokens)
    done = fit(model, optimizers, steps, next_token_loss, fit_config, run, write_model, evaluate, ranks=ranks)
    if not ranks.leads:
        return
    with new_directory(run.model, overwrite=True) as directory:
        write_model(directory, done["tokens"])
    read = accounts(sources, mixture, done["steps"] * rows)
    write_json(run.directory / "summary.json", _summary(run, model, done, read))
    console.print(account_table(read))
    say(console, f"the base model is {run.model}")


def _count(config: Config, run: Run, console: Console, tokenizer: Tokenizer, named: list[Source]) -> None:
    """An n-gram model: counts instead of weights."""
    prompts = _encode_prompts(config, tokenizer)
    shape = NgramConfig(tokenizer.vocab_size, config.order or 5, config.context)
    sources = _read(config, console, tokenizer, named)
    data = begin_run(run, tokenizer, sources)

    def evaluate(model: NgramModel) -> Metrics:
        engine = Engine(model, [tokenizer.eos_id])
        return held_out_evaluation(run, engine, tokenizer, prompts, sources, config.row_tokens)(0)

    def origin(tokens: int) -> dict[str, Any]:
        return lineage("pretrain", config, None, data, tokenizer.fingerprint(), tokens)

    count_sources(run, console, config, shape, tokenizer, sources, evaluate, origin)


def _read(config: Config, console: Console, tokenizer: Tokenizer, named: list[Source]) -> list[MixtureSource]:
    shards = config.shards or config.out.parent / "shards"
    return read_sources(console, named, tokenizer, shards, config.validation_share, config.skip_bad_lines)


def _within_maxima(
    fit_config: FitConfig, recipe: Recipe, sources: list[MixtureSource]
) -> tuple[FitConfig, int | None]:
    """The plan with the steps that all maxima of epochs allow as its limit, and its tokens. A plan is whole
    batches: where the next batch would pass a maximum, it is one batch shorter."""
    batch, steps = recipe.batch_tokens, fit_config.total_steps
    most = check_size(sources, batch, None)
    if most is not None:
        fit_config = replace(fit_config, most_steps=max(1, most // batch))
        if steps is not None and recipe.tokens < most + batch:
            steps = max(1, min(steps, most // batch))
            fit_config = replace(fit_config, total_steps=steps)
    return fit_config, steps and steps * batch


def _summary(run: Run, model: CausalLM, done: dict[str, Any], read: dict[str, Account]) -> dict[str, Any]:
    last = [row for row in run.rows("metrics") if "validation" in row][-1]
    return {
        "stage": "pretrain",
        "parameters": model.num_parameters(),
        **done,
        "bits_per_byte": {name: last[f"validation/{name}"] for name in read},
        "epochs": {name: account.epochs for name, account in read.items()},
        "sources": {name: asdict(account) for name, account in read.items()},
    }


def _encode_prompts(config: Config, tokenizer: Tokenizer) -> list[tuple[str, list[int]]]:
    prompts = [(prompt, [tokenizer.eos_id, *tokenizer.encode(prompt)]) for prompt in config.prompts]
    for _, ids in prompts:
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
    sizes = ("row_tokens", "context", "batch_tokens", "micro_batch_tokens", "layers", "order")
    check_at_least(config, 1, *sizes)
    if config.order is not None and config.model_type != "ngram":
        raise UserError("--order goes with --model-type ngram: no other model has one")


def _recipe(config: Config, vocab_size: int) -> Recipe:
    return adapted(
        recipe_for(parse_count(config.params, "params"), vocab_size),
        config.row_tokens,
        config.hidden_size,
        layers=config.layers,
        batch_tokens=config.batch_tokens,
        matrix_lr=config.matrix_lr,
        adam_lr=config.adam_lr,
        tokens=parse_count(config.tokens, "tokens") if config.tokens else None,
    )


def _fit_config(config: Config, recipe: Recipe, device: torch.device) -> FitConfig:
    operations = recipe.tokens * 6 * parse_count(config.params, "params")
    return FitConfig.of(
        config,
        label="pretrain",
        total_steps=None if config.minutes else max(1, round(recipe.tokens / recipe.batch_tokens)),
        minutes=config.minutes,
        compute_dtype=pick_compute_dtype(device, config.compute),
        compile=pick_compile(config.compile, config.minutes, operations),
    )


def _check_memory(
    config: Config,
    vocab_size: int,
    recipe: Recipe,
    fit_config: FitConfig,
    device: torch.device,
    ranks: Ranks,
) -> str:
    def sized(params: int) -> ModelConfig:
        other = _recipe(replace(config, params=str(params)), vocab_size)
        return model_config(other, config.model_type, vocab_size, config.context)

    batch_tokens = -(-recipe.batch_tokens // ranks.count)
    setup = Setup(
        rows=max(1, min(config.micro_batch_tokens, batch_tokens) // config.row_tokens),
        row_tokens=config.row_tokens,
        optimizer=config.optimizer,
        compute_dtype=fit_config.compute_dtype,
        compiled=fit_config.compile,
        checkpointed=config.checkpoint_activations,
        segments=config.isolate_documents or config.packing == "best-fit",
        accumulates=config.micro_batch_tokens < batch_tokens,
        on_cpu=device.type == "cpu",
        ranks=ranks.count,
        neighbours=ranks.neighbours,
    )
    shape = model_config(recipe, config.model_type, vocab_size, config.context)
    return check_memory_here(shape, setup, device, smaller=sized)


def _print_plan(
    console: Console, config: Config, recipe: Recipe, model: CausalLM, fit_config: FitConfig, memory: str
) -> None:
    length, steps = f"{config.minutes} minutes", fit_config.total_steps
    if steps is not None:
        length = f"{steps * recipe.batch_tokens:,} tokens, {steps:,} steps"
    console.print(
        f"{model.num_parameters():,} parameters: {recipe.layers} layers of width {recipe.hidden_size}, "
        f"{recipe.heads} heads, MLP {recipe.intermediate_size}, vocabulary {model.config.vocab_size:,}\n"
        f"{length}; {recipe.batch_tokens:,} tokens a step in rows of {config.row_tokens}; "
        f"{config.optimizer}, peak rates {recipe.matrix_lr:.3g} (hidden matrices) and {recipe.adam_lr:.3g} "
        f"(the rest); {fit_config.execution}\n{memory}",
        highlight=False,
    )
