"""`fledge grpo`: from a model and a reward that a program gives to one that is right more often."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from fledge.config import check_at_least, to_toml
from fledge.device import ComputeName, DeviceName, pick_compute_dtype, pick_device
from fledge.errors import UserError
from fledge.files import new_directory, sha256, write_json
from fledge.model.checkpoint import load_model, read_weights
from fledge.model.lora import TARGETS, LoRA, add_lora, lora_of, parameter_line, read_adapter
from fledge.model.transformer import CausalLM
from fledge.rewards.specs import read_specs, reward_files
from fledge.run import Run, lineage
from fledge.tokenizer.bpe import Tokenizer
from fledge.train.actor_critic import load_policy
from fledge.train.groups import Settings, World
from fledge.train.grpo import grpo_loss, grpo_steps, held_out_figures, memory_line
from fledge.train.grpo_losses import Advantage, Mean
from fledge.train.loop import fit, last_evaluation
from fledge.train.optim import make_optimizers
from fledge.train.parallel import Ranks, joined
from fledge.train.plan import FitConfig
from fledge.train.ppo import sample_lines
from fledge.train.progress import say
from fledge.train.prompts import Prompts, end_ids, read_split
from fledge.train.saving import save_policy
from fledge.train.self_play import game_prompts, play_figures, self_play_reward
from fledge.train.steps import Metrics

# Squares are averaged over a hundred steps: those of a policy's gradient are few and uneven. Gradients of
# tokens that are hardly ever sampled are below eps, so that they are not blown up to full steps.
ADAM = {"betas": (0.9, 0.99), "eps": 1e-8}
# What a setting is that is left open: with prompts, and in a game.
OPEN: dict[str, tuple[float, float]] = {
    "rollouts": (200, 24),
    "batch_prompts": (32, 4520),
    "samples": (8, 4),
    "max_tokens": (128, 4),
    "minibatches": (2, 32),
    "beta": (0.0, 0.3),
    "matrix_lr": (0.0, 0.007),
    "adam_lr": (3e-5, 1e-3),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a model on a checkable task: sample groups of answers, favour those better than their group."""

    model: Path
    """Model directory to start from; as it is now, it is also the reference."""
    prompts: tuple[Path, ...] = ()
    """JSONL or Parquet files of {"prompt"} or {"messages"}; other fields are for the reward."""
    reward: tuple[str, ...] = ()
    """A verifier, `file.py:function` or a reward model's directory; several are summed, as in 0.9*exact."""
    game: Literal["tictactoe", "tictactoe-cells"] | None = None
    """Instead of both: learn a game from playing against itself; its boards in rows, or as +15-39. It has
    other defaults."""
    reward_as_text: bool = False
    """Let a reward model read conversations as text, in its own template: for another tokenizer."""
    out: Path = Path("runs/grpo")
    """Run directory; the same command again resumes it."""
    plain: bool = False
    """Continue prompts as plain texts, to the end of the document: for a base model."""
    rollouts: int | None = None
    """How many times to sample groups and learn from them; by default 200, in a game 24."""
    batch_prompts: int | None = None
    """Groups of a roll-out: prompts; by default 32, in a game all its boards, 4520."""
    samples: int | None = None
    """Completions of a group; by default 8, in a game 4."""
    max_tokens: int | None = None
    """Longest completion, by default 128, in a game 4; prompts that leave less room in the model's context
    are left out."""
    temperature: float = 1.0
    """Randomness of the sampling; log-probabilities are taken at the same one."""
    advantage: Advantage = "grpo"
    """grpo: (reward - group's mean) / deviation; dr-grpo: reward - mean; rloo: - mean of the others."""
    average: Mean | None = None
    """Of the loss: tokens (default of grpo), completions, length (of dr-grpo), whole (of rloo)."""
    resample: int = 0
    """How often to sample further prompts in place of groups whose rewards are all equal."""
    missing_eos_score: float | None = None
    """Score of a completion that does not end within --max-tokens; by default what the reward gives it."""
    epochs: int = 2
    """How often each roll-out is learned from."""
    minibatches: int | None = None
    """Optimizer steps of an epoch; by default 2, in a game 32."""
    micro_batch_tokens: int = 16_384
    """Most tokens in memory at once, padding included; larger minibatches are accumulated."""
    decode_rows: int = 64
    """Most completions that are sampled at once."""
    beta: float | None = None
    """Price of a nat of KL to the reference (k3 of each token), in the loss; by default 0, in a game 0.3."""
    clip: float = 0.2
    """How far below 1 a probability ratio may move before its gradient stops."""
    clip_high: float | None = None
    """How far above 1; by default as far as below. 0.28 keeps rare tokens alive (DAPO)."""
    stop_kl: float | None = None
    """Stop when the KL of a roll-out (nats a completion) is above this."""
    adam_lr: float | None = None
    """AdamW's peak learning rate: about a tenth of that at which the model last learned; by default 3e-5, in
    a game 1e-3."""
    matrix_lr: float | None = None
    """Muon's peak rate, for the matrices inside the blocks; 0: AdamW learns them too. By default 0, in a game
    0.007."""
    weight_decay: float = 0.0
    """Decoupled weight decay of all matrices."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises."""
    decay_share: float = 0.9
    """Share of the run, at its end, over which the learning rate falls to zero."""
    max_spike: float = 10.0
    """Stop when the loss jumps this much above its running mean."""
    lora_rank: int | None = None
    """Train adapters (LoRA) of this rank beside frozen weights, which are then the reference too."""
    lora_alpha: float | None = None
    """The adapter counts alpha / rank times; by default alpha is twice the rank."""
    lora_targets: tuple[str, ...] = TARGETS
    """Layers that get an adapter."""
    checkpoint_activations: bool = False
    """Compute the inside of each block again in the backward pass: a third slower, far less memory."""
    validation_share: float = 0.1
    """Share of the prompts held out, chosen by a hash of their text."""
    evaluation_prompts: int = 64
    """Most held-out prompts to measure on."""
    evaluation_samples: int = 4
    """Completions for each of them."""
    evaluations: int = 10
    """How many times to save a checkpoint, measure on held-out prompts and show completions."""
    keep_checkpoints: int = 2
    """Latest checkpoints to keep, besides the best."""
    seed: int = 0
    """Seed of the sampling and of all orders."""
    device: DeviceName = "auto"
    """Where to train."""
    compute: ComputeName = "auto"
    """Type of matrix products; auto is bf16 where it is fast."""
    overwrite: bool = False
    """Delete what --out holds of an earlier run."""


def main(config: Config) -> None:
    """Train to the end, or go on where an interrupted run stopped."""
    filled = {
        name: pair[config.game is not None] for name, pair in OPEN.items() if getattr(config, name) is None
    }
    with joined(config.device) as ranks:
        _train(replace(config, **filled), ranks)  # type: ignore[arg-type]


def _train(config: Config, ranks: Ranks) -> None:
    console = Console(stderr=True, quiet=not ranks.leads)
    check_at_least(config, 1, "decode_rows", "evaluation_prompts", "evaluation_samples")
    settings = Settings(**{field.name: getattr(config, field.name) for field in fields(Settings)})
    lora = lora_of(config.lora_rank, config.lora_alpha, config.lora_targets)
    tokenizer = Tokenizer.load(config.model)
    run = Run.open(config.out, to_toml(replace(config, overwrite=False)), config.overwrite, ranks.leads)
    if run.finished:
        say(console, f"{config.out}: finished already; the model is {run.model}")
        return
    device = pick_device(config.device)
    policy = load_policy(config.model, tokenizer, config.plain, device, config.checkpoint_activations)
    room = policy.config.max_position_embeddings - settings.max_tokens
    prompts = _prompts(config, tokenizer, room)
    longest = prompts.longest + settings.max_tokens
    world = replace(_world(config, lora, tokenizer, policy, settings, longest), ranks=ranks)
    if config.game is not None:
        itself = [self_play_reward(world, prompts.train)]
        world = replace(world, rewards=itself, judges_apart=False, keeps_equal=False, reads_once=True)
    rates = (config.matrix_lr or 1.0, config.adam_lr or 0.0, config.weight_decay)
    optimizers = make_optimizers(policy, "muon" if config.matrix_lr else "adamw", *rates)
    for group in optimizers[-1].param_groups:
        group |= ADAM
    fit_config = FitConfig.of(
        config,
        label="grpo",
        total_steps=settings.rollouts * settings.updates,
        compute_dtype=world.compute_dtype,
        validation_unit="(minus the held-out score)" if config.game is None else "(share of lines lost)",
    )
    memory = memory_line(world, longest, config.checkpoint_activations)
    run.begin(_inputs(config, tokenizer))
    _print_plan(console, config, policy, prompts, fit_config, memory)
    data = {path.name: sha256([path]) for path in config.prompts}

    def write_policy(directory: Path, tokens: int) -> None:
        origin = lineage("grpo", config, config.model, data, tokenizer.fingerprint(), tokens)
        save_policy(directory, policy, tokenizer, origin, list(world.eos_ids), config.model, lora)

    def evaluate(step: int) -> Metrics:
        if config.game is not None:
            return play_figures(world, prompts.train)
        held = prompts.held[: config.evaluation_prompts]
        figures, table = held_out_figures(world, held, config.evaluation_samples)
        for row in table:
            run.log("samples", {"step": step, **row})
        say(console, sample_lines(step, table[:3]))
        return figures

    def idle(number: int, figures: Metrics) -> None:
        equal = f"mean score {figures['score']:g}; no step taken"
        say(console, f"roll-out {number:,}: no group of {figures['sampled_groups']:g} has a signal, {equal}")

    stops: list[float] = []
    steps = grpo_steps(world, prompts.train, stops.append, idle)
    loss, measure = partial(grpo_loss, settings=settings), evaluate if prompts.held or config.game else None
    saved = read_weights if lora is None else read_adapter
    how = (fit_config, run, write_policy, measure, policy, saved)
    done = fit(policy, optimizers, steps, loss, *how, ranks=ranks, reads_model=True)
    if not ranks.leads:
        return
    if stops:
        say(console, f"stopped: a KL of {stops[0]:.2f} nats a completion is above --stop-kl {config.stop_kl}")
    with new_directory(run.model, overwrite=True) as directory:
        write_policy(directory, done["tokens"])
    write_json(run.directory / "summary.json", _summary(run, policy, done, prompts, stops))
    say(console, f"the trained {'adapter' if lora else 'model'} is {run.model}")


def _prompts(config: Config, tokenizer: Tokenizer, room: int) -> Prompts:
    if config.game is None:
        return read_split(config.prompts, tokenizer, config.plain, room, config.validation_share)
    if config.prompts or config.reward:
        raise UserError(f"--game {config.game} has its own prompts and reward: leave --prompts, --reward out")
    return game_prompts(tokenizer, config.plain, room, config.game)


def _world(
    config: Config,
    lora: LoRA | None,
    tokenizer: Tokenizer,
    policy: CausalLM,
    settings: Settings,
    longest: int,
) -> World:
    """The models and the rewards."""
    device = pick_device(config.device)
    dtype = pick_compute_dtype(device, config.compute)
    kinds = (tokenizer, config.reward_as_text, device, dtype, longest)
    rewards = [] if config.game else read_specs(config.reward, *kinds)
    frozen = None
    if lora is None:
        frozen = load_model(config.model).to(device).requires_grad_(False)
    else:
        add_lora(policy, lora, torch.Generator().manual_seed(config.seed))
    ends = end_ids(tokenizer, config.plain)
    return World(policy, frozen, tokenizer, ends, rewards, settings, dtype, config.decode_rows)


def _inputs(config: Config, tokenizer: Tokenizer) -> dict[str, str]:
    files = {"the prompts": config.prompts, "the model": sorted(config.model.glob("*.safetensors"))}
    files["the reward"] = reward_files(config.reward)
    return {"the tokenizer": tokenizer.fingerprint(), **{name: sha256(files[name]) for name in files}}


def _summary(
    run: Run, policy: CausalLM, done: dict[str, Any], prompts: Prompts, stops: list[float]
) -> dict[str, Any]:
    state: Any = next((saved.state["data"] for saved in reversed(run.checkpoints())), {})
    return {
        "stage": "grpo",
        "parameters": policy.num_parameters(),
        **done,
        **prompts.counts(),
        "groups": state.get("groups", 0),
        "groups_without_signal": state.get("without_signal", 0),
        "empty_completions": {"count": state.get("empty", 0), "first": state.get("empty_first", [])},
        "stopped_at_kl": stops[0] if stops else None,
        **last_evaluation(run),
    }


def _print_plan(
    console: Console, config: Config, policy: CausalLM, prompts: Prompts, plan: FitConfig, memory: str
) -> None:
    muon = f"Muon, peak rate {config.matrix_lr:.3g}, and " if config.matrix_lr else ""
    say(
        console,
        f"{prompts}\n{config.rollouts:,} roll-outs of {config.batch_prompts:,} groups of {config.samples:,} "
        f"completions, {plan.total_steps:,} steps; rewards: {', '.join(config.reward) or 'self-play'}\n"
        f"{parameter_line(policy)}; {muon}AdamW, peak rate {config.adam_lr:.3g}; {plan.execution}\n{memory}",
    )
