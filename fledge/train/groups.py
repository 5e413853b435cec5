"""Groups of completions: what a policy makes of prompts, and which of it is better than the rest.

Shape suffixes: G groups (prompts), S samples of a group, B rows (completions), T tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fledge.config import check_at_least
from fledge.errors import UserError
from fledge.model.transformer import CausalLM
from fledge.rewards.verifiers import Reward
from fledge.tokenizer.bpe import Tokenizer
from fledge.train.experience import check_above_0, check_finite, final_scores
from fledge.train.grpo_losses import Advantage, Mean, group_advantages, have_signal, mean_of
from fledge.train.parallel import ALONE, Ranks
from fledge.train.prompts import EncodedPrompt, prompts_at
from fledge.train.rollout import (
    EmptyCompletions,
    Padded,
    length_figures,
    play,
    policy_scores,
    read_in_parts,
    reference_scores,
    seed_of,
)
from fledge.train.steps import Metrics
from fledge.types import Rollout, SamplingParams


@dataclass(frozen=True)
class Settings:
    """The algorithm's numbers (see `fledge/stages/grpo.py`)."""

    rollouts: int
    batch_prompts: int
    samples: int
    max_tokens: int
    temperature: float
    advantage: Advantage
    average: Mean | None
    epochs: int
    minibatches: int
    micro_batch_tokens: int
    resample: int
    beta: float
    clip: float
    clip_high: float | None
    stop_kl: float | None
    missing_eos_score: float | None
    seed: int

    def __post_init__(self) -> None:
        """Raises UserError on numbers that make no sense, by the names of their flags."""
        check_at_least(self, 0, "seed", "beta", "resample")
        check_at_least(self, 1, "rollouts", "batch_prompts", "max_tokens", "epochs", "minibatches")
        check_at_least(self, 1, "micro_batch_tokens")
        check_finite(self)
        check_above_0(self, "temperature", "clip", "clip_high", "stop_kl")
        if self.samples < 2:
            raise UserError(f"--samples {self.samples}: must be at least 2; a completion is judged by others")
        if self.minibatches > self.batch_prompts * self.samples:
            raise UserError(
                f"--minibatches {self.minibatches}: more than the {self.batch_prompts * self.samples} "
                "completions of a roll-out"
            )

    @property
    def updates(self) -> int:
        """Optimizer steps for each roll-out."""
        return self.epochs * self.minibatches

    @property
    def mean(self) -> Mean:
        """How a step's loss is averaged."""
        return mean_of(self.advantage, self.average)


# Roll-outs and what they are worth.


@dataclass(frozen=True)
class World:
    """All that roll-outs are made and judged with."""

    policy: CausalLM
    frozen: CausalLM | None
    """The reference; None: it is the policy without its adapter."""
    tokenizer: Tokenizer
    eos_ids: Sequence[int]
    rewards: Sequence[Reward]
    settings: Settings
    compute_dtype: torch.dtype
    decode_rows: int = 64
    ranks: Ranks = ALONE
    judges_apart: bool = True
    """Whether each rank judges a part of the roll-outs; a reward that plays itself needs all at once."""
    keeps_equal: bool = True
    """Whether groups without signal count in the averages."""
    reads_once: bool = False
    """Whether completions that are the same are read once, in the same step; only where a step has many
    different ones: else it depends on chance how many completions a step has, and each counts the more the
    fewer they are."""

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        return self.policy.model.embed_tokens.weight.device

    def play(self, prompts: Sequence[EncodedPrompt], samples: int, *numbers: int) -> list[Rollout]:
        """Completions by the policy as it is now, `samples` for each prompt, one group after the other."""
        settings = self.settings
        seed = seed_of(settings.seed, *numbers)
        params = SamplingParams(settings.temperature, max_tokens=settings.max_tokens, n=samples, seed=seed)
        how = (self.eos_ids, self.decode_rows, self.compute_dtype, self.tokenizer)
        return play(self.policy, *how, prompts, params, self.ranks)

    def judge(self, rollouts: list[Rollout]) -> dict[str, list[float]]:
        """The `score` of each: the weighted sum of all rewards, or what is set where it did not end; with
        several rewards, by `score:` and its name, each of them without its weight."""
        columns = {f"score:{reward.name}": self._rewards(reward, rollouts) for reward in self.rewards}
        weights = [reward.weight for reward in self.rewards]
        rows = zip(*columns.values(), strict=True)
        scores = [sum(w * r for w, r in zip(weights, row, strict=True)) for row in rows]
        if (missing := self.settings.missing_eos_score) is not None:
            scores = final_scores(scores, rollouts, missing)
        return {"score": scores, **(columns if len(columns) > 1 else {})}

    def _rewards(self, reward: Reward, rollouts: list[Rollout]) -> list[float]:
        if not self.judges_apart:
            return list(reward.function(rollouts))
        return self.ranks.spread(lambda part, _first: reward.function(list(part)), rollouts)

    def read(self, rows: Padded, parts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Log-probabilities and entropies by the policy, log-probabilities by the reference (B, T)."""

        def read(batch: Padded) -> tuple[Tensor, Tensor, Tensor]:
            temperature = self.settings.temperature
            ref_BT = reference_scores(self.policy, self.frozen, batch, temperature)
            return *policy_scores(self.policy, batch, temperature), ref_BT

        return read_in_parts(rows, parts, self.device, self.compute_dtype, read, self.ranks)


@dataclass
class State(EmptyCompletions):
    """What goes on from one roll-out to the next; a checkpoint holds it."""

    draws: int = 0
    """How often prompts were drawn."""
    groups: int = 0
    without_signal: int = 0
    """Groups whose rewards were all equal."""


@dataclass
class GroupBatch:
    """A micro-batch of completions. Those that are the same are read once: `rows` has no row twice."""

    rows: Padded
    places: Tensor
    """(B): where each completion stands in `rows`."""
    old_logps: Tensor
    """(B, T), as is `ref_logps`."""
    ref_logps: Tensor
    advantages: Tensor
    """(B)."""
    figures: Metrics = field(default_factory=dict)
    """Of the whole roll-out, for the log; the first batch has them."""

    def to(self, device: torch.device) -> GroupBatch:
        """The same batch on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if name != "figures"}
        return GroupBatch(**moved, figures=self.figures)

    @property
    def mask(self) -> Tensor:
        """(B, T): True where the policy made the token."""
        return self.rows.mask[self.places]

    def num_tokens(self) -> int:
        """How many tokens are read; padding is none."""
        return int(self.rows.lengths.sum())

    def denominators(self) -> dict[str, int]:
        """What losses are averaged over, known before any forward pass."""
        tokens, rows = int(self.mask.sum()), len(self.places)
        return {"tokens": tokens, "completions": rows, "rollouts": int(bool(self.figures))}


@dataclass
class Groups:
    """Groups to learn from, at most `batch_prompts`, none if none has a signal; figures of all sampled."""

    rollouts: list[Rollout]
    advantages: Tensor
    """(B); 0 in a group without signal."""
    figures: Metrics


def sampled_groups(world: World, prompts: Sequence[EncodedPrompt], state: State) -> Groups:
    """Sample groups and judge them. With `resample` others are sampled in the place of those without signal
    (dynamic sampling, Yu et al. 2025). Without it these stay in the averages, if the world `keeps_equal`, so
    that a step is the smaller the less a roll-out says: else the few right answers of a weak model would move
    it as far as many do."""
    settings, size = world.settings, world.settings.samples
    sampled: list[Rollout] = []
    columns: dict[str, list[float]] = {}
    kept: list[int] = []
    while (
        len(kept) < settings.batch_prompts
        and len(sampled) <= settings.resample * settings.batch_prompts * size
    ):
        chosen = prompts_at(prompts, state.draws, settings.batch_prompts, settings.seed)
        rollouts = world.play(chosen, size, 2, state.draws)
        for name, values in world.judge(rollouts).items():
            columns.setdefault(name, []).extend(values)
        first = len(sampled) // size
        scores_GS = torch.tensor(columns["score"], dtype=torch.float64).view(-1, size)
        kept += [first + i for i, has in enumerate(have_signal(scores_GS[first:]).tolist()) if has]
        sampled += rollouts
        state.draws += 1
    groups, signals = len(sampled) // size, len(kept)
    if kept and not settings.resample and world.keeps_equal:
        kept = list(range(groups))
    kept = kept[: settings.batch_prompts]
    places = [group * size + i for group in kept for i in range(size)]
    advantages_GS = group_advantages(scores_GS, settings.advantage)[kept].float()
    state.groups, state.without_signal = state.groups + groups, state.without_signal + groups - signals
    state.note_empty(sampled)
    figures = {
        **score_figures(columns),
        "without_signal": 1 - signals / groups,
        "sampled_groups": float(groups),
        **length_figures(sampled),
    }
    return Groups([sampled[place] for place in places], advantages_GS.flatten(), figures)


def score_figures(columns: dict[str, list[float]]) -> Metrics:
    """Mean and standard deviation (of the population) of each column of scores."""
    found = {}
    for name, values in columns.items():
        head, _, rest = name.partition(":")
        found[name] = statistics.fmean(values)
        found[f"{head}_std{':' if rest else ''}{rest}"] = statistics.pstdev(values)
    return found
