"""`fledge reward`: from an assistant and preferences to a reward model, and its examination."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch.optim import Optimizer

from fledge.config import check_at_least, check_positive, check_share, to_toml
from fledge.data.comparisons import (
    Comparison,
    Comparisons,
    best_rows,
    compare,
    shuffled_labels,
    split_by_prompt,
    without_prompt,
)
from fledge.data.conversations import answer_rows, read_conversations
from fledge.data.preferences import read_rankings
from fledge.device import ComputeName, DeviceName, pick_compute_dtype, pick_device
from fledge.errors import UserError
from fledge.evals.preferences import accuracy, agreement, examine, pair_rows
from fledge.files import new_directory, read_json, remove, sha256, write_json, write_text
from fledge.model.checkpoint import read_weights
from fledge.model.heads import RewardModel, add_blocks
from fledge.model.lora import TARGETS, LoRA, add_lora, lora_of, parameter_line, read_adapter
from fledge.model.transformer import CausalLM
from fledge.report.reward import write_reward_report
from fledge.rewards.reward_model import save_reward_model, score_rows
from fledge.run import Run, lineage
from fledge.tokenizer.bpe import Tokenizer
from fledge.train.comparisons import Plan, held_out_figures, memory_line, reward_steps, steps_of
from fledge.train.loop import fit
from fledge.train.optim import make_optimizers
from fledge.train.parallel import Ranks, joined
from fledge.train.plan import FitConfig
from fledge.train.preference_losses import preference_loss
from fledge.train.progress import say
from fledge.train.start import load_start
from fledge.train.steps import Metrics

# Prompts to learn from, and held-out ones.
Split = tuple[list[Comparison], list[Comparison]]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a reward model on preferences: pairs, or rankings of several answers to a prompt."""

    model: Path
    """Model directory to start from: an assistant."""
    data: tuple[Path, ...]
    """JSONL or Parquet files: {"prompt", "chosen", "rejected"} or {"prompt", "completions", "ranks"}."""
    out: Path = Path("runs/reward")
    """Run directory; the same command again resumes it."""
    epochs: float = 1.0
    """How often each prompt is seen."""
    batch_prompts: int = 16
    """Prompts of an optimizer step; all completions of a prompt are in the same one."""
    micro_batch_tokens: int = 16_384
    """Most tokens in memory at once, padding included; larger batches are accumulated."""
    max_tokens: int | None = None
    """Longer completions (with their prompt) are left out; by default the model's context."""
    centring: float = 0.0
    """Weight of (better + worse reward)^2, which keeps rewards around 0; 0.01 is usual."""
    reference: Path | None = None
    """Conversations whose answers are to have the mean reward 0; by default the best completions."""
    adam_lr: float | None = None
    """AdamW's peak learning rate; by default 1e-4, for new layers 3e-3."""
    weight_decay: float = 0.0
    """Decoupled weight decay of all matrices."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises."""
    decay_share: float = 0.9
    """Share of the run, at its end, over which the learning rate falls to zero."""
    max_spike: float = 3.0
    """Stop when the loss jumps this many nats above its running mean."""
    new_layers: int | None = None
    """Train so many new layers above the assistant's, which stay as they are, instead of all weights."""
    lora_rank: int | None = None
    """Train an adapter (LoRA) of this rank beside frozen weights, instead of all weights."""
    lora_alpha: float | None = None
    """The adapter counts alpha / rank times; by default alpha is twice the rank."""
    lora_targets: tuple[str, ...] = TARGETS
    """Layers that get an adapter."""
    checkpoint_activations: bool = False
    """Compute the inside of each block again in the backward pass: a third slower, far less memory."""
    validation_share: float = 0.1
    """Share of the prompts held out for the examination, chosen by a hash of their text."""
    held_out: tuple[Path, ...] = ()
    """Files of preferences to examine with, instead of a share of the prompts."""
    controls: bool = True
    """Train two more models as controls: on shuffled labels, and on answers without their prompts."""
    evaluations: int = 4
    """How many times to save a checkpoint and evaluate it."""
    keep_checkpoints: int = 2
    """Latest checkpoints to keep, besides the best."""
    seed: int = 0
    """Seed of the new head and of the data order."""
    device: DeviceName = "auto"
    """Where to train."""
    compute: ComputeName = "auto"
    """Type of matrix products; auto is bf16 where it is fast. The head is always fp32."""
    overwrite: bool = False
    """Delete what --out holds of an earlier run."""


def main(config: Config) -> None:
    """Train to the end, or go on where an interrupted run stopped; then examine what was learned."""
    with joined(config.device) as ranks:
        _run(config, ranks)


def _run(config: Config, ranks: Ranks) -> None:
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
    found = _read(config.data, tokenizer, most)
    split = split_by_prompt(found.prompts, config.validation_share)
    if config.held_out:
        split = _apart(found.prompts, _read(config.held_out, tokenizer, most).prompts)
    reference = _reference(config, tokenizer, split[0], most)
    hashes = [sha256([path]) for path in config.data]
    inputs = {"the data": " ".join(hashes), "the tokenizer": tokenizer.fingerprint()}
    inputs["the model"] = sha256(sorted(config.model.glob("*.safetensors")))
    if config.reference:
        inputs["the reference"] = sha256([config.reference])
    if config.held_out:
        inputs["the held-out data"] = sha256(config.held_out)
    fit_config = _fit_config(config, len(split[0]), dtype)
    optimizers = _optimizers(config, model)
    sizes = (config.micro_batch_tokens, dtype, config.checkpoint_activations)
    memory = memory_line(model, split[0], *sizes, ranks)
    run.begin(inputs)
    _print_plan(console, config, model, found, split, fit_config, memory)

    data = {path.name: content for path, content in zip(config.data, hashes, strict=True)}
    origin = lineage("reward", config, config.model, data, tokenizer.fingerprint(), 0)
    write = _writer(config, tokenizer, origin)
    done = _train(config, model, optimizers, split, fit_config, run, write, ranks)

    score = partial(score_rows, compute_dtype=dtype, max_tokens=config.micro_batch_tokens)
    rewards = score(model, reference)
    figures = {"stage": "reward", "parameters": model.num_parameters(), **done}
    figures |= {"prompts": len(split[0]), "held_out": len(split[1]), **found.counts()}
    figures["offset"] = -sum(rewards) / len(rewards)
    controls = _controls(config, tokenizer, split, fit_config, device, ranks) if config.controls else {}
    if not ranks.leads:
        return
    held_rewards = score(model, [row for prompt in split[1] for row in prompt.ids])
    rows, own = pair_rows(split[1], held_rewards, **controls), agreement(found.prompts)
    figures |= {**examine(rows), "labelers_agree": None if own is None else own.as_dict()}
    lines = "".join(json.dumps(row.as_dict(), ensure_ascii=False) + "\n" for row in rows)
    write_text(run.directory / "pairs.jsonl", lines)
    write_json(run.directory / "summary.json", figures)
    if share := accuracy(rows):
        low, high = share.interval
        say(console, f"held-out pairs judged right: {share.rate:.1%} ({low:.1%}-{high:.1%} of {share.n:,})")
        say(console, f"the examination is {write_reward_report(run.directory)}")
    with new_directory(run.model, overwrite=True) as directory:
        write(directory, done["tokens"], model=model, offset=figures["offset"])
    say(console, f"the reward model is {run.model}")


def _check(config: Config) -> None:
    _lora(config)
    check_at_least(config, 0, "seed")
    check_at_least(config, 1, "batch_prompts", "micro_batch_tokens", "max_tokens", "new_layers")
    if config.new_layers and config.lora_rank:
        raise UserError("--new-layers does not go with --lora-rank: choose what is trained")
    if not config.data:
        raise UserError("--data: name at least one file of preferences")
    check_positive(config, "epochs")
    if not 0 <= config.centring < math.inf:
        raise UserError(f"--centring {config.centring}: must be at least 0")
    check_share(config, "validation_share")


def _load(config: Config, tokenizer: Tokenizer, device: torch.device) -> RewardModel:
    """The assistant with a new head, the same for every run with this seed."""
    language_model = load_start(config.model, tokenizer, device, config.checkpoint_activations)
    generator = torch.Generator().manual_seed(config.seed)
    if config.new_layers:
        add_blocks(language_model, config.new_layers, generator)
    model = RewardModel(language_model, generator)
    if (lora := _lora(config)) is not None:
        add_lora(model, lora, generator)
    return model


def _lora(config: Config) -> LoRA | None:
    return lora_of(config.lora_rank, config.lora_alpha, config.lora_targets)


def _read(paths: tuple[Path, ...], tokenizer: Tokenizer, most: int) -> Comparisons:
    rankings = [ranking for path in paths for ranking in read_rankings(path)]
    found = compare(rankings, tokenizer, most)
    if not found.prompts:
        raise UserError(
            f"{paths[0]}: nothing to learn from: {found.undecided:,} prompts whose completions are all "
            f"tied, the same, or too long ({found.overlong:,} have more than {most:,} tokens)"
        )
    return found


def _apart(train: list[Comparison], held: list[Comparison]) -> Split:
    """Raises UserError if a held-out prompt is also one to learn from."""
    both = {prompt.key for prompt in train} & {prompt.key for prompt in held}
    if both:
        raise UserError(f"--held-out: {len(both):,} of its prompts are in --data too; take them out of one")
    return train, held


def _reference(config: Config, tokenizer: Tokenizer, train: list[Comparison], most: int) -> list[list[int]]:
    """Rows whose mean reward is to be 0, each to the end of the answer."""
    if config.reference is None:
        return best_rows(train)
    return answer_rows(read_conversations(config.reference, tokenizer, most, cut_overlong=False))


def _optimizers(config: Config, model: RewardModel) -> list[Optimizer]:
    """AdamW on everything; the cast: all that is asked of the model is its parameters."""
    return make_optimizers(cast(CausalLM, model), "adamw", 1.0, _rate(config), config.weight_decay)


def _rate(config: Config) -> float:
    default = 3e-3 if config.new_layers else 1e-4
    return default if config.adam_lr is None else config.adam_lr


def _writer(config: Config, tokenizer: Tokenizer, origin: dict[str, Any]) -> Callable[..., None]:
    lora = _lora(config)
    return partial(save_reward_model, tokenizer=tokenizer, origin=origin, base=config.model, lora=lora)


def _train(
    config: Config,
    model: RewardModel,
    optimizers: list[Optimizer],
    split: Split,
    fit_config: FitConfig,
    run: Run,
    write: Callable[..., None],
    ranks: Ranks,
) -> dict[str, Any]:
    def evaluate(_step: int) -> Metrics:
        return held_out_figures(model, split[1], fit_config.compute_dtype, config.micro_batch_tokens)

    plan = Plan(config.batch_prompts, config.micro_batch_tokens, config.epochs, config.seed, ranks)
    steps = reward_steps(plan, split[0])
    loss = partial(preference_loss, centring=config.centring)
    measure = evaluate if split[1] else None
    read = read_weights if config.lora_rank is None else read_adapter
    how = (fit_config, run, partial(write, model=model), measure, model, read)
    return fit(model, optimizers, steps, loss, *how, ranks=ranks)


def _controls(
    config: Config,
    tokenizer: Tokenizer,
    split: Split,
    fit_config: FitConfig,
    device: torch.device,
    ranks: Ranks,
) -> dict[str, list[float]]:
    """Rewards of held-out completions by models that cannot know: their labels were shuffled, or they read no
    prompt. Each is a run of its own, of which only the rewards are kept."""
    rewards: dict[str, list[float]] = {}
    splits = {
        "shuffled": (shuffled_labels(split[0], config.seed), split[1]),
        "blind": (without_prompt(split[0], tokenizer), without_prompt(split[1], tokenizer)),
    }
    for name, own in splits.items() if split[1] else ():
        scores = config.out / "controls" / name / "rewards.json"
        if not ranks.share(scores.exists()):
            run = Run.open(scores.parent, to_toml(replace(config, overwrite=False)), writes=ranks.leads)
            run.begin({})
            model = _load(config, tokenizer, device)
            named = replace(fit_config, label=f"control: {name}")
            write = _writer(config, tokenizer, {})
            _train(config, model, _optimizers(config, model), own, named, run, write, ranks)
            rows = [row for prompt in own[1] for row in prompt.ids]
            if ranks.leads:
                how = (fit_config.compute_dtype, config.micro_batch_tokens)
                write_json(scores, score_rows(model, rows, *how))
                remove(scores.parent / "checkpoints")
        rewards[name] = ranks.share(read_json(scores) if ranks.leads else None)
    return rewards


def _fit_config(config: Config, prompts: int, dtype: torch.dtype) -> FitConfig:
    return FitConfig.of(
        config,
        label="reward",
        total_steps=steps_of(prompts, config.batch_prompts, config.epochs),
        compute_dtype=dtype,
        validation_unit="nats per comparison",
    )


def _print_plan(
    console: Console,
    config: Config,
    model: RewardModel,
    found: Comparisons,
    split: Split,
    fit_config: FitConfig,
    memory: str,
) -> None:
    train, held = split
    console.print(
        f"{len(train):,} prompts to learn from, {len(held):,} held out; {found}\n"
        f"{parameter_line(model)}; {fit_config.total_steps:,} steps"
        f"{', three times: two controls' if config.controls and held else ''}; AdamW, peak rate "
        f"{_rate(config):.3g}; {fit_config.execution}\n{memory}",
        highlight=False,
    )
