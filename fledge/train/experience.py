"""What a policy experiences: roll-outs, what they are worth, and what was expected of them.

Shape suffixes: B rows (roll-outs), T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fledge.config import Dataclass, check_at_least
from fledge.errors import UserError
from fledge.tokenizer.bpe import Tokenizer
from fledge.train.actor_critic import ActorCritic, Read, Reference
from fledge.train.parallel import ALONE, Ranks
from fledge.train.ppo_losses import (
    explained_variance,
    generalised_advantages,
    token_rewards,
    whiten,
)
from fledge.train.prompts import EncodedPrompt
from fledge.train.rollout import (
    EmptyCompletions,
    Padded,
    gap_figures,
    kl_figures,
    length_figures,
    padded,
    play,
    read_in_parts,
    seed_of,
)
from fledge.train.steps import Metrics
from fledge.types import RewardFunction, Rollout, SamplingParams


def check_finite(settings: Dataclass) -> None:
    """Raise UserError, naming the flag, for the first number that is infinite or none."""
    for name, value in vars(settings).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name.replace('_', '-')} {value}: must be a finite number")


def check_above_0(settings: Dataclass, *names: str) -> None:
    """Raise UserError, naming the flag, for the first of these settings that is set and not above 0."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be above 0")


@dataclass(frozen=True)
class Settings:
    """The algorithm's numbers (see `fledge/stages/ppo.py`)."""

    rollouts: int
    batch_prompts: int
    samples: int
    max_tokens: int
    temperature: float
    epochs: int
    minibatches: int
    micro_batch_tokens: int
    beta: float
    kl_target: float | None
    kl_horizon: float
    stop_kl: float | None
    gamma: float
    lam: float
    clip: float
    value_clip: float
    value_weight: float
    missing_eos_score: float
    normalise_rewards: bool
    ptx_weight: float
    seed: int

    def __post_init__(self) -> None:
        """Raises UserError on numbers that make no sense, by the names of their flags."""
        check_at_least(self, 0, "seed", "beta", "lam", "value_weight", "ptx_weight")
        check_at_least(self, 1, "rollouts", "batch_prompts", "samples", "max_tokens", "epochs")
        check_at_least(self, 1, "minibatches", "micro_batch_tokens")
        check_finite(self)
        check_above_0(
            self, "temperature", "kl_target", "kl_horizon", "stop_kl", "gamma", "clip", "value_clip"
        )
        for name in ("gamma", "lam"):
            if getattr(self, name) > 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at most 1")
        if self.minibatches > self.batch_prompts * self.samples:
            raise UserError(
                f"--minibatches {self.minibatches}: more than the {self.batch_prompts * self.samples} "
                "completions of a roll-out"
            )

    @property
    def updates(self) -> int:
        """Optimizer steps for each roll-out."""
        return self.epochs * self.minibatches

    def sampling(self, *numbers: int) -> SamplingParams:
        """Plain sampling at the temperature, with random numbers of its own for each `numbers`."""
        seed = seed_of(self.seed, *numbers)
        return SamplingParams(self.temperature, max_tokens=self.max_tokens, n=self.samples, seed=seed)


# Roll-outs and what they are worth.


@dataclass(frozen=True)
class World:
    """All that roll-outs are made and judged with."""

    actor: ActorCritic
    reference: Reference
    tokenizer: Tokenizer
    eos_ids: Sequence[int]
    reward: RewardFunction
    settings: Settings
    compute_dtype: torch.dtype
    decode_rows: int = 64
    ranks: Ranks = ALONE

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        return self.actor.policy.model.embed_tokens.weight.device

    def play(self, prompts: Sequence[EncodedPrompt], *numbers: int) -> list[Rollout]:
        """Roll-outs by the policy as it is now."""
        how = (self.eos_ids, self.decode_rows, self.compute_dtype, self.tokenizer)
        return play(self.actor.policy, *how, prompts, self.settings.sampling(*numbers), self.ranks)

    def judge(self, reward: RewardFunction, rollouts: Sequence[Rollout]) -> list[float]:
        """What a reward function gives; each rank judges a part."""
        return self.ranks.spread(lambda part, _first: reward(list(part)), rollouts)

    def read(self, rows: Padded, parts: Sequence[Sequence[int]]) -> tuple[Read, Tensor]:
        """What policy, value function and reference say of each row, in micro-batches `parts`."""
        how = (self.device, self.compute_dtype, lambda b: (*self.actor(b), self.reference(b)))
        found = read_in_parts(rows, parts, *how, self.ranks)
        return Read(*found[:3]), found[3]


@dataclass
class State(EmptyCompletions):
    """What goes on from one roll-out to the next; a checkpoint holds it."""

    beta: float
    count: int = 0
    """Of scores seen; with their mean and sum of squared distances from it (Welford 1962)."""
    mean: float = 0.0
    squares: float = 0.0

    def note(self, scores: Sequence[float]) -> None:
        """Take scores into the running mean and variance."""
        for score in scores:
            self.count += 1
            delta = score - self.mean
            self.mean += delta / self.count
            self.squares += delta * (score - self.mean)

    @property
    def std(self) -> float:
        """Of all scores seen; 1 before there are two different ones."""
        return math.sqrt(self.squares / self.count) if self.squares > 0 else 1.0


@dataclass
class PPOBatch:
    """A micro-batch of roll-outs, with what was known of each token when it was made; all (B, T)."""

    rows: Padded
    old_logps: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor
    figures: Metrics = field(default_factory=dict)
    """Of the whole roll-out, for the log; the first batch has them."""

    def to(self, device: torch.device) -> PPOBatch:
        """The same batch on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if name != "figures"}
        return PPOBatch(**moved, figures=self.figures)

    def num_tokens(self) -> int:
        """How many tokens are read; padding is none."""
        return int(self.rows.lengths.sum())

    def denominators(self) -> dict[str, int]:
        """What losses are averaged over, known before any forward pass."""
        return {"tokens": int(self.rows.mask.sum()), "rollouts": int(bool(self.figures))}


def final_scores(found: Sequence[float], rollouts: Sequence[Rollout], missing: float) -> list[float]:
    """The scores, *set* to `missing` for completions that did not end: a penalty alone could leave a long one
    worth its while."""
    return [score if one.ended else missing for score, one in zip(found, rollouts, strict=True)]


@dataclass
class Experience:
    """A roll-out that was read and judged: nothing of it changes while it is learned from."""

    rollouts: list[Rollout]
    scores: list[float]
    """The reward function's, with `missing_eos_score` in place."""
    rows: Padded
    said: Read
    advantages: Tensor
    returns: Tensor
    figures: Metrics

    def batch(self, part: Sequence[int], figures: Metrics) -> PPOBatch:
        """Some of its rows as a micro-batch."""
        rows = self.rows.rows(part)
        columns = (self.said.logps, self.said.values, self.advantages, self.returns)
        logps, values, advantages, returns = (x[list(part), : rows.mask.shape[1]] for x in columns)
        return PPOBatch(rows, logps, values, advantages, returns, figures)


def experience_of(
    world: World, rollouts: list[Rollout], parts: Sequence[Sequence[int]], state: State
) -> Experience:
    """Judge and read roll-outs, in the micro-batches in which they are learned from first. Raises UserError
    if the reward function is `checked` and fails, or the sampler is too far from what is trained."""
    settings = world.settings
    raw = world.judge(world.reward, rollouts)
    scores, given = final_scores(raw, rollouts, settings.missing_eos_score), raw
    if settings.normalise_rewards:
        state.note([score for score, one in zip(raw, rollouts, strict=True) if one.ended])
        given = [(score - state.mean) / state.std for score in raw]
    given = final_scores(given, rollouts, settings.missing_eos_score)
    rows = padded(rollouts)
    said, ref_BT = world.read(rows, parts)
    rewards_BT = token_rewards(said.logps, ref_BT, rows.mask, torch.tensor(given), state.beta)
    raw_BT = generalised_advantages(rewards_BT, said.values, rows.mask, settings.gamma, settings.lam)
    returns_BT = torch.where(rows.mask, raw_BT + said.values, 0.0)
    figures = {
        "score": math.fsum(scores) / len(scores),
        **kl_figures(said.logps, ref_BT, rows.mask),
        **length_figures(rollouts),
        "beta": state.beta,
        "reward": float(rewards_BT.sum(1).mean()),
        "value_explained": explained_variance(said.values, returns_BT, rows.mask),
        **gap_figures(rollouts, said.logps, rows.mask),
    }
    return Experience(rollouts, scores, rows, said, whiten(raw_BT, rows.mask), returns_BT, figures)
