"""`fledge dpo`: from an assistant and preferences to one that people prefer, without a reward model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fledge.config import check_at_least, check_positive, check_share, to_toml
from fledge.data.comparisons import Comparison, split_by_prompt
from fledge.data.preference_rows import Preferences, read_judged, read_pairs, strangers
from fledge.device import ComputeName, DeviceName, pick_compute_dtype, pick_device
from fledge.errors import UserError
from fledge.files import new_directory, sha256, write_json
from fledge.model.checkpoint import read_weights
from fledge.model.heads import add_blocks
from fledge.model.lora import TARGETS, LoRA, add_lora, lora_of, parameter_line, read_adapter
from fledge.model.transformer import CausalLM
from fledge.run import Run, lineage
from fledge.tokenizer.bpe import Tokenizer
from fledge.train.comparisons import Plan, memory_line, steps_of
from fledge.train.dpo import (
    Objective,
    Reference,
    cached_reference,
    fingerprint_of,
    held_out_figures,
    preference_steps,
    reference_of,
    scoring_of,
)
from fledge.train.dpo_losses import WITHOUT_REFERENCE, LossName
from fledge.train.loop import fit, last_evaluation
from fledge.train.optim import make_optimizers
from fledge.train.parallel import Ranks, joined
from fledge.train.plan import FitConfig
from fledge.train.progress import say
from fledge.train.saving import save_assistant
from fledge.train.start import load_start, require_chat


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train an assistant on preferences directly: DPO and its relatives."""

    model: Path
    """Model directory to start from, an assistant; as it is now, it is also the reference."""
    data: tuple[Path, ...]
    """JSONL or Parquet files of pairs or rankings; for kto of {"prompt", "completion", "label"}."""
    out: Path = Path("runs/dpo")
    """Run directory; the same command again resumes it."""
    loss: LossName = "sigmoid"
    """sigmoid (DPO), ipo, hinge, robust, kto (unpaired), orpo or simpo (both without a reference)."""
    beta: float | None = None
    """How closely the reference binds (ipo: tau; orpo: lambda); by default 0.1, for simpo 2."""
    label_smoothing: float = 0.0
    """sigmoid, robust: the share of turned labels to allow for, below 0.5."""
    simpo_gamma: float = 1.0
    """simpo: by how much the better completion is to win."""
    good_weight: float = 1.0
    """kto: weight of good completions."""
    bad_weight: float = 1.0
    """kto: weight of bad completions."""
    epochs: float = 1.0
    """How often each prompt is seen."""
    batch_prompts: int = 16
    """Prompts of an optimizer step; all completions of a prompt are in the same one."""
    micro_batch_tokens: int = 16_384
    """Most tokens in memory at once, padding included; larger batches are accumulated."""
    max_tokens: int | None = None
    """Longer completions (with their prompt) are left out; by default the model's context."""
    adam_lr: float | None = None
    """AdamW's peak learning rate; by default 1e-4, for new layers 1e-3; models of a billion parameters want
    a hundredth of that."""
    weight_decay: float = 0.0
    """Decoupled weight decay of all matrices."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises."""
    decay_share: float = 0.9
    """Share of the run, at its end, over which the learning rate falls to zero."""
    max_spike: float = 3.0
    """Stop when the loss jumps this much above its running mean."""
    new_layers: int | None = None
    """Train so many new layers above the assistant's, which stay as they are, instead of all weights."""
    lora_rank: int | None = None
    """Train an adapter (LoRA) of this rank beside frozen weights, which are then the reference too."""
    lora_alpha: float | None = None
    """The adapter counts alpha / rank times; by default alpha is twice the rank."""
    lora_targets: tuple[str, ...] = TARGETS
    """Layers that get an adapter."""
    checkpoint_activations: bool = False
    """Compute the inside of each block again in the backward pass: a third slower, far less memory."""
    validation_share: float = 0.1
    """Share of the prompts held out, chosen by a hash of their text."""
    evaluations: int = 4
    """How many times to save a checkpoint and evaluate it."""
    keep_checkpoints: int = 2
    """Latest checkpoints to keep, besides the best."""
    seed: int = 0
    """Seed of the data order."""
    device: DeviceName = "auto"
    """Where to train."""
    compute: ComputeName = "auto"
    """Type of matrix products; auto is bf16 where it is fast."""
    overwrite: bool = False
    """Delete what --out holds of an earlier run."""


def main(config: Config) -> None:
    """Train to the end, or go on where an interrupted run stopped."""
    with joined(config.device) as ranks:
        _train(config, ranks)


def _train(config: Config, ranks: Ranks) -> None:
    console = Console(stderr=True, quiet=not ranks.leads)
    _check(config)
    tokenizer = Tokenizer.load(config.model)
    run = Run.open(config.out, to_toml(replace(config, overwrite=False)), config.overwrite, ranks.leads)
    if run.finished:
        say(console, f"{config.out}: finished already; the model is {run.model}")
        return
    device = pick_device(config.device)
    dtype = pick_compute_dtype(device, config.compute)
    model = _load(config, tokenizer, device)
    most = min(config.max_tokens or 2**31, model.config.max_position_embeddings)
    found = _read(config, tokenizer, most)
    train, held = split_by_prompt(found.prompts, config.validation_share)
    objective = _objective(config, found, train, held, most)
    plan = Plan(config.batch_prompts, config.micro_batch_tokens, config.epochs, config.seed, ranks)
    fit_config = _fit_config(config, len(train), dtype)
    optimizers = make_optimizers(model, "adamw", 1.0, _rate(config), config.weight_decay)
    sizes = (config.micro_batch_tokens, dtype, config.checkpoint_activations)
    memory = memory_line(model, [*train, *held], *sizes, ranks)
    weights = sha256(sorted(config.model.glob("*.safetensors")))
    hashes = [sha256([path]) for path in config.data]
    inputs = {"the data": " ".join(hashes), "the tokenizer": tokenizer.fingerprint()}
    run.begin({**inputs, "the model": weights})
    _print_plan(console, config, model, found, (train, held), fit_config, memory)

    scoring = scoring_of(model, dtype)
    reference = Reference({}, {})
    if config.loss not in WITHOUT_REFERENCE:
        settings = (weights, plan, ranks.count, str(dtype), device.type, torch.__version__)
        fingerprint = fingerprint_of(train, objective, *settings, fingerprint_of(held, objective))
        compute = partial(reference_of, scoring, objective, plan, train, held)
        path = run.directory / "reference.json"
        with ranks.leader_first():
            reference = cached_reference(path, fingerprint, [*train, *held], compute)

    data = {path.name: content for path, content in zip(config.data, hashes, strict=True)}
    origin = lineage("dpo", config, config.model, data, tokenizer.fingerprint(), 0)
    lora = _lora(config)
    write = partial(
        save_assistant, model=model, tokenizer=tokenizer, origin=origin, base=config.model, lora=lora
    )

    steps = preference_steps(scoring, objective, reference, plan, train)
    figures = partial(held_out_figures, scoring, objective, reference, plan, held)
    measure = (lambda _step: figures()) if held else None
    read = read_weights if lora is None else read_adapter
    how = (fit_config, run, write, measure, None, read, ranks, config.loss == "kto")
    done = fit(model, optimizers, steps, objective.loss, *how)
    if not ranks.leads:
        return
    with new_directory(run.model, overwrite=True) as directory:
        write(directory, done["tokens"])
    write_json(run.directory / "summary.json", _summary(model, run, done, found, train, held))
    what, verb = ("model", "chat") if lora is None else ("adapter", "merge")
    say(console, f"the aligned {what} is {run.model}: fledge {verb} --model {run.model}")


def _check(config: Config) -> None:
    check_at_least(config, 0, "seed")
    check_at_least(config, 1, "batch_prompts", "micro_batch_tokens", "max_tokens", "new_layers")
    if _lora(config) and config.new_layers:
        raise UserError("--new-layers does not go with --lora-rank: choose what is trained")
    if not config.data:
        raise UserError("--data: name at least one file of preferences")
    check_positive(config, "epochs", "beta", "good_weight", "bad_weight")
    if not 0 <= config.simpo_gamma < math.inf:
        raise UserError(f"--simpo-gamma {config.simpo_gamma}: must be at least 0")
    if not 0 <= config.label_smoothing < 0.5:
        raise UserError(f"--label-smoothing {config.label_smoothing}: must be at least 0 and below 0.5")
    if config.label_smoothing and config.loss not in ("sigmoid", "robust"):
        raise UserError(f"--label-smoothing is for the losses sigmoid and robust, not for {config.loss}")
    check_share(config, "validation_share")


def _load(config: Config, tokenizer: Tokenizer, device: torch.device) -> CausalLM:
    require_chat(config.model, tokenizer)
    model = load_start(config.model, tokenizer, device, config.checkpoint_activations)
    generator = torch.Generator().manual_seed(config.seed)
    if config.new_layers:
        add_blocks(model, config.new_layers, generator)
    if (lora := _lora(config)) is not None:
        add_lora(model, lora, generator)
    return model


def _lora(config: Config) -> LoRA | None:
    return lora_of(config.lora_rank, config.lora_alpha, config.lora_targets)


def _rate(config: Config) -> float:
    default = 1e-3 if config.new_layers else 1e-4
    return default if config.adam_lr is None else config.adam_lr


def _read(config: Config, tokenizer: Tokenizer, most: int) -> Preferences:
    found = (read_judged if config.loss == "kto" else read_pairs)(config.data, tokenizer, most)
    if not found.prompts:
        raise UserError(
            f"{config.data[0]}: nothing to learn from; left out: {found.left_out_text()}; completions "
            f"have at most {most:,} tokens with their prompt"
        )
    if config.loss == "kto" and sum(len(prompt.ids) for prompt in found.prompts) < 2:
        raise UserError(f"{config.data[0]}: one completion; kto needs two or more, to tell how far it went")
    return found


def _beta(config: Config) -> float:
    return config.beta or (2.0 if config.loss == "simpo" else 0.1)


def _objective(
    config: Config, found: Preferences, train: list[Comparison], held: list[Comparison], most: int
) -> Objective:
    return Objective(
        name=config.loss,
        beta=_beta(config),
        label_smoothing=config.label_smoothing,
        gamma=config.simpo_gamma,
        weight_good=config.good_weight,
        weight_bad=config.bad_weight,
        labels=found.labels,
        strangers={
            key: stranger
            for part in ((train, held) if config.loss == "kto" else ())
            for key, stranger in strangers(part, config.seed, most).items()
        },
    )


def _fit_config(config: Config, prompts: int, dtype: torch.dtype) -> FitConfig:
    return FitConfig.of(
        config,
        label="dpo",
        total_steps=steps_of(prompts, config.batch_prompts, config.epochs),
        compute_dtype=dtype,
        validation_unit=f"({config.loss} loss)",
    )


def _summary(
    model: CausalLM,
    run: Run,
    done: dict[str, Any],
    found: Preferences,
    train: list[Comparison],
    held: list[Comparison],
) -> dict[str, Any]:
    return {
        "stage": "dpo",
        "parameters": model.num_parameters(),
        **done,
        "prompts": len(train),
        "held_out": len(held),
        **found.counts(),
        **last_evaluation(run),
    }


def _print_plan(
    console: Console,
    config: Config,
    model: CausalLM,
    found: Preferences,
    split: tuple[list[Comparison], list[Comparison]],
    fit_config: FitConfig,
    memory: str,
) -> None:
    train, held = split
    say(
        console,
        f"{len(train):,} prompts to learn from, {len(held):,} held out; {found}\n"
        f"{parameter_line(model)}; {fit_config.total_steps:,} steps; "
        f"{config.loss}, beta {_beta(config):g}; AdamW, peak rate {_rate(config):.3g}; "
        f"{fit_config.execution}\n{memory}",
    )
