"""`fledge ppo`: from an assistant and a reward to one that earns more of it and stays what it was."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from rich.console import Console

from fledge.config import check_at_least, to_toml
from fledge.device import ComputeName, DeviceName, pick_compute_dtype, pick_device
from fledge.errors import UserError
from fledge.files import new_directory, sha256, write_json
from fledge.model.checkpoint import load_model, read_weights
from fledge.model.lora import TARGETS, LoRA, add_lora, lora_of, parameter_line, read_adapter
from fledge.model.transformer import CausalLM
from fledge.rewards.specs import read_specs, reward_files, reward_model_of
from fledge.rewards.verifiers import weighted_sum
from fledge.run import Run, lineage
from fledge.tokenizer.bpe import Tokenizer
from fledge.train.actor_critic import (
    ActorCritic,
    critic_of,
    load_policy,
    read_trained,
    reference_of,
    save_critic,
)
from fledge.train.experience import Settings, World
from fledge.train.loop import fit, last_evaluation
from fledge.train.optim import make_optimizers
from fledge.train.parallel import Ranks, joined
from fledge.train.plan import FitConfig
from fledge.train.ppo import held_out_figures, memory_line, ppo_loss, ppo_steps, sample_lines
from fledge.train.pretraining_mix import read_mix
from fledge.train.progress import say
from fledge.train.prompts import Prompts, end_ids, read_split
from fledge.train.saving import save_policy
from fledge.train.steps import Metrics
from fledge.types import RewardFunction


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train an assistant by reinforcement learning from a reward (PPO), close to what it was."""

    model: Path
    """Model directory to start from; as it is now, it is also the reference."""
    prompts: tuple[Path, ...]
    """JSONL or Parquet files of {"prompt"} or {"messages"}; other fields are for the reward function."""
    reward: tuple[str, ...]
    """A reward model's directory, `file.py:function` or a verifier; several are summed, as in 0.9*exact."""
    reward_as_text: bool = False
    """Let the reward model read conversations as text, in its own template: for another tokenizer."""
    gold: str | None = None
    """A second reward, only measured on held-out prompts: what the first one is meant to stand for."""
    out: Path = Path("runs/ppo")
    """Run directory; the same command again resumes it."""
    plain: bool = False
    """Continue prompts as plain texts, to the end of the document: for a base model."""
    rollouts: int = 100
    """How many times to sample completions and learn from them."""
    batch_prompts: int = 64
    """Prompts of a roll-out."""
    samples: int = 1
    """Completions for each of them."""
    max_tokens: int = 128
    """Longest completion; prompts that leave less room in the model's context are left out."""
    temperature: float = 1.0
    """Randomness of the sampling; log-probabilities are taken at the same one."""
    epochs: int = 4
    """How often each roll-out is learned from."""
    minibatches: int = 4
    """Optimizer steps of an epoch."""
    micro_batch_tokens: int = 16_384
    """Most tokens in memory at once, padding included; larger minibatches are accumulated."""
    decode_rows: int = 64
    """Most completions that are sampled at once."""
    beta: float = 0.05
    """Price of a nat of KL to the reference, in units of the reward."""
    kl_target: float | None = None
    """KL (nats a completion) that beta is adapted to; by default it stays as it is."""
    kl_horizon: float = 10_000.0
    """Completions over which beta adapts."""
    stop_kl: float | None = None
    """Stop when the KL of a roll-out (nats a completion) is above this."""
    gamma: float = 1.0
    """Discount of later rewards."""
    lam: float = 0.95
    """Lambda of generalised advantage estimation."""
    clip: float = 0.2
    """How far a token's probability ratio may move before its gradient stops."""
    value_clip: float = 0.2
    """How far a value may move from the old one before its gradient stops."""
    value_weight: float = 0.1
    """Weight of the value function's loss."""
    value: Literal["auto", "reward", "policy"] = "auto"
    """The value function begins as the reward model, or as 0 on the policy's trunk; auto: where it can."""
    missing_eos_score: float = -1.0
    """Score of a completion that does not end within --max-tokens."""
    normalise_rewards: bool = False
    """Shift and scale scores by the running mean and deviation of all so far."""
    ptx: tuple[Path, ...] = ()
    """Text files to go on learning from beside the reward (PPO-ptx), as of `fledge pretrain`."""
    ptx_weight: float = 1.0
    """Weight of that text's loss (mean nats a token)."""
    ptx_rows: int = 8
    """Its rows in each step."""
    ptx_row_tokens: int = 256
    """Tokens of a row, at most the model's context."""
    adam_lr: float = 3e-5
    """AdamW's peak learning rate; models of a billion parameters want a tenth of the default."""
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
    with joined(config.device) as ranks:
        _train(config, ranks)


def _train(config: Config, ranks: Ranks) -> None:
    console = Console(stderr=True, quiet=not ranks.leads)
    check_at_least(config, 1, "decode_rows", "ptx_rows", "ptx_row_tokens", "evaluation_prompts")
    settings = Settings(**{field.name: getattr(config, field.name) for field in fields(Settings)})
    lora = lora_of(config.lora_rank, config.lora_alpha, config.lora_targets)
    tokenizer = Tokenizer.load(config.model)
    run = Run.open(config.out, to_toml(replace(config, overwrite=False)), config.overwrite, ranks.leads)
    if run.finished:
        say(console, f"{config.out}: finished already; the model is {run.model}")
        return
    loaded = (tokenizer, config.plain, pick_device(config.device), config.checkpoint_activations)
    policy = load_policy(config.model, *loaded)
    context = policy.config.max_position_embeddings
    kinds = (tokenizer, config.plain, context - config.max_tokens, config.validation_share)
    prompts = read_split(config.prompts, *kinds)
    longest = prompts.longest + config.max_tokens
    world, gold = _world(config, lora, tokenizer, policy, settings, longest)
    world = replace(world, ranks=ranks)
    mix = None
    if config.ptx:
        sizes = (config.ptx_rows, min(config.ptx_row_tokens, context), config.micro_batch_tokens)
        mix = read_mix(config.ptx, tokenizer, *sizes, config.seed)
    model = cast(CausalLM, world.actor)  # all that is asked of it is its parameters
    optimizers = make_optimizers(model, "adamw", 1.0, config.adam_lr, config.weight_decay)
    for group in optimizers[0].param_groups:
        group["eps"] = 1e-5  # Huang et al. 2023
    fit_config = _fit_config(config, settings, world.compute_dtype)
    memory = memory_line(world, longest, config.checkpoint_activations)
    run.begin(_inputs(config, tokenizer))
    _print_plan(console, config, world.actor, prompts, fit_config, memory)
    data = {path.name: sha256([path]) for path in config.prompts}

    def write_policy(directory: Path, tokens: int) -> None:
        origin = lineage("ppo", config, config.model, data, tokenizer.fingerprint(), tokens)
        save_policy(directory, policy, tokenizer, origin, list(world.eos_ids), config.model, lora)

    def write_checkpoint(directory: Path, tokens: int) -> None:
        write_policy(directory, tokens)
        save_critic(directory, world.actor)

    def evaluate(step: int) -> Metrics:
        figures, table = held_out_figures(world, prompts.held[: config.evaluation_prompts], gold)
        for row in table:
            run.log("samples", {"step": step, **row})
        say(console, sample_lines(step, table[:3]))
        return figures

    stops: list[float] = []
    steps = ppo_steps(world, prompts.train, mix, stops.append)
    loss, measure = partial(ppo_loss, settings=settings), evaluate if prompts.held else None
    saved = partial(read_trained, read_policy=read_weights if lora is None else read_adapter)
    how = (fit_config, run, write_checkpoint, measure, model, saved)
    done = fit(model, optimizers, steps, loss, *how, ranks=ranks, reads_model=True)
    if not ranks.leads:
        return
    if stops:
        say(console, f"stopped: a KL of {stops[0]:.2f} nats a completion is above --stop-kl {config.stop_kl}")
    with new_directory(run.model, overwrite=True) as directory:
        write_policy(directory, done["tokens"])
    write_json(run.directory / "summary.json", _summary(run, policy, done, prompts, stops))
    say(console, f"the aligned {'adapter' if lora else 'model'} is {run.model}")


def _world(
    config: Config,
    lora: LoRA | None,
    tokenizer: Tokenizer,
    policy: CausalLM,
    settings: Settings,
    longest: int,
) -> tuple[World, RewardFunction | None]:
    """The models and the reward, and the gold reward if there is one."""
    device = pick_device(config.device)
    dtype = pick_compute_dtype(device, config.compute)
    kinds = (tokenizer, config.reward_as_text, device, dtype, longest)
    reward = weighted_sum(read_specs(config.reward, *kinds))
    gold = None if config.gold is None else weighted_sum(read_specs([config.gold], *kinds))
    generator = torch.Generator().manual_seed(config.seed)
    frozen = load_model(config.model).to(device).requires_grad_(False) if lora is None else None
    if lora is not None:
        add_lora(policy, lora, generator)
    critic, begins = None, _critic_begins_as(config)
    if begins is not None:
        critic = critic_of(begins, device, lora, generator, config.checkpoint_activations)
    actor = ActorCritic(policy, critic, config.temperature)
    ends, reference = end_ids(tokenizer, config.plain), reference_of(actor, frozen)
    return World(actor, reference, tokenizer, ends, reward, settings, dtype, config.decode_rows), gold


def _critic_begins_as(config: Config) -> Path | None:
    """The reward model that the value function begins as, if it does: it must read the policy's ids."""
    found = None if config.reward_as_text else reward_model_of(config.reward)
    if config.value == "reward" and found is None:
        raise UserError(
            "--value reward: needs a reward model that reads the policy's ids; use --value policy"
        )
    return None if config.value == "policy" else found


def _inputs(config: Config, tokenizer: Tokenizer) -> dict[str, str]:
    files = {"the prompts": config.prompts, "the model": sorted(config.model.glob("*.safetensors"))}
    files |= {"the reward": reward_files(config.reward), "the text": config.ptx}
    files["the gold reward"] = [] if config.gold is None else reward_files([config.gold])
    return {"the tokenizer": tokenizer.fingerprint(), **{name: sha256(files[name]) for name in files}}


def _fit_config(config: Config, settings: Settings, dtype: torch.dtype) -> FitConfig:
    return FitConfig.of(
        config,
        label="ppo",
        total_steps=config.rollouts * settings.updates,
        compute_dtype=dtype,
        validation_unit=f"(minus the held-out {'score' if config.gold is None else 'gold reward'})",
    )


def _summary(
    run: Run, policy: CausalLM, done: dict[str, Any], prompts: Prompts, stops: list[float]
) -> dict[str, Any]:
    state: Any = next((saved.state["data"] for saved in reversed(run.checkpoints())), {})
    return {
        "stage": "ppo",
        "parameters": policy.num_parameters(),
        **done,
        **prompts.counts(),
        "empty_completions": {"count": state.get("empty", 0), "first": state.get("empty_first", [])},
        "beta": state.get("beta"),
        "stopped_at_kl": stops[0] if stops else None,
        **last_evaluation(run),
    }


def _print_plan(
    console: Console, config: Config, actor: ActorCritic, prompts: Prompts, plan: FitConfig, memory: str
) -> None:
    begins = "as the reward model" if _critic_begins_as(config) else "as 0 on the policy's trunk"
    say(
        console,
        f"{prompts}\n{config.rollouts:,} roll-outs of {config.batch_prompts * config.samples:,} completions, "
        f"{plan.total_steps:,} steps; beta {config.beta:g}; the value function begins {begins}\n"
        f"{parameter_line(actor)}; AdamW, peak rate {config.adam_lr:.3g}; {plan.execution}\n{memory}",
    )
