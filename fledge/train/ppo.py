"""Proximal policy optimisation: the steps that learn from roll-outs, their loss, and held-out figures.

Shape suffixes: B rows (roll-outs), T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fledge.engine.text import terminal_safe
from fledge.model.transformer import CausalLM
from fledge.train.actor_critic import ActorCritic, Critic
from fledge.train.experience import (
    PPOBatch,
    Settings,
    State,
    World,
    experience_of,
    final_scores,
)
from fledge.train.losses import Term, forward_of
from fledge.train.memory import Setup, check_memory_here, estimate, trained_share
from fledge.train.parallel import ALONE, Ranks
from fledge.train.ppo_losses import adapted_beta, k3, masked_mean, policy_loss, value_loss
from fledge.train.pretraining_mix import PretrainingMix, TextBatch
from fledge.train.prompts import EncodedPrompt, prompts_at
from fledge.train.rollout import kl_figures, length_figures, micro_batches, minibatches, padded
from fledge.train.steps import Metrics, Step, Steps, own_batches
from fledge.types import RewardFunction


def ppo_steps(
    world: World,
    prompts: Sequence[EncodedPrompt],
    mix: PretrainingMix | None,
    stopped: Callable[[float], None],
) -> Steps:
    """Roll-outs, each learned from in `epochs` passes of `minibatches` steps; a save may follow the last of
    them. `stopped` hears the KL that ended it, if one did."""
    settings = world.settings

    def steps(
        first: int, saved: dict[str, Any], _metrics: Metrics | None
    ) -> Generator[Step, Metrics | None, None]:
        state = State(**saved) if saved else State(settings.beta)
        for number in range(first // settings.updates, settings.rollouts):
            chosen = prompts_at(prompts, number, settings.batch_prompts, settings.seed)
            rollouts = world.play(chosen, 2, number)
            lengths = [len(rollout.input_ids) for rollout in rollouts]
            plan = [
                world.ranks.even(list(micro_batches(minibatch, lengths, settings.micro_batch_tokens)))
                for epoch in range(settings.epochs)
                for minibatch in minibatches(
                    len(rollouts), settings.minibatches, [settings.seed, 3, number, epoch]
                )
            ]
            first_reads = [part for parts in plan[: settings.minibatches] for part in parts]
            found = experience_of(world, rollouts, first_reads, state)
            kl = found.figures["kl"]
            if settings.stop_kl is not None and kl > settings.stop_kl:
                stopped(kl)
                return
            state.note_empty(rollouts)
            if settings.kl_target is not None:
                state.beta = adapted_beta(
                    state.beta, kl, settings.kl_target, len(rollouts), settings.kl_horizon
                )
            for update, parts in enumerate(plan):
                shown = [found.figures if update == i == 0 else {} for i in range(len(parts))]
                batches = own_batches(world.ranks, list(map(found.batch, parts, shown)))
                if mix is not None:
                    texts = mix.batches(number * settings.updates + update)
                    batches += own_batches(world.ranks, texts)
                is_last = update == len(plan) - 1
                yield Step(batches, may_save=is_last, state=vars(state).copy() if is_last else {})

    return steps


def ppo_loss(actor: ActorCritic, batch: PPOBatch | TextBatch, settings: Settings) -> dict[str, Term]:
    """Clipped policy and value losses of roll-outs (means over their tokens), or the cross-entropy of text.

    Reported beside them: `loss`, the sum of the first two as they are weighted; the mean of rho = pi / pi_old
    (`ratio`) and of |rho - 1| (`ratio_distance`); the KL between the two (`kl_step`: k3); the entropy; the
    shares of tokens for which clipping changed the loss."""
    if isinstance(batch, TextBatch):
        nll_BT = forward_of(actor.policy)(batch.input_ids, None)
        return {"text_loss": Term(nll_BT.sum(), per="text_tokens", weight=settings.ptx_weight)}
    mask_BT, said = batch.rows.mask, actor(batch.rows)
    policy_BT = policy_loss(said.logps, batch.old_logps, batch.advantages, settings.clip)
    value_BT = value_loss(said.values, batch.old_values, batch.returns, settings.value_clip)

    def total(x_BT: Tensor) -> Tensor:
        return torch.where(mask_BT, x_BT, 0.0).sum()

    policy, value = total(policy_BT), total(value_BT)
    terms = {
        "loss": Term((policy + settings.value_weight * value).detach(), per="tokens", weight=0.0),
        "policy_loss": Term(policy, per="tokens"),
        "value_loss": Term(value, per="tokens", weight=settings.value_weight),
    }
    logps_BT, ratio_BT = said.logps.detach(), (said.logps.detach() - batch.old_logps).exp()
    unclipped_BT = (said.values.detach() - batch.returns).square() / 2
    figures = {
        "ratio": ratio_BT,
        "ratio_distance": (ratio_BT - 1).abs(),
        "clip_fraction": (policy_BT > -batch.advantages * ratio_BT).float(),
        "value_clip_fraction": (value_BT > unclipped_BT).float(),
        "entropy": said.entropy,
        "kl_step": k3(logps_BT, batch.old_logps),
    }
    terms |= {name: Term(total(x_BT.detach()), per="tokens", weight=0.0) for name, x_BT in figures.items()}
    for name, number in batch.figures.items():
        terms[name] = Term(torch.tensor(number, dtype=torch.float64), per="rollouts", weight=0.0)
    return terms


# Held-out prompts.


def held_out_figures(
    world: World, prompts: Sequence[EncodedPrompt], gold: RewardFunction | None
) -> tuple[Metrics, list[dict[str, Any]]]:
    """Figures of roll-outs on held-out prompts, with the same random numbers each time, and a row for each of
    them. `validation` is minus the mean of the gold rewards, or of the scores where there is no gold rule."""
    settings = world.settings
    rollouts = world.play(prompts, 5)
    raw = world.judge(world.reward, rollouts)
    scores = {"score": final_scores(raw, rollouts, settings.missing_eos_score)}
    if gold is not None:
        scores["gold"] = world.judge(gold, rollouts)
    rows = padded(rollouts)
    parts = list(micro_batches(range(len(rollouts)), rows.lengths.tolist(), settings.micro_batch_tokens))
    said, ref_BT = world.read(rows, parts)
    means = {name: math.fsum(values) / len(values) for name, values in scores.items()}
    entropy = float(masked_mean(said.entropy, rows.mask))
    kl = kl_figures(said.logps, ref_BT, rows.mask)
    figures = {**means, **kl, **length_figures(rollouts), "entropy": entropy}
    table = [
        {
            "prompt": rollout.messages[-1].get("content"),
            "text": rollout.completion,
            "ended": rollout.ended,
            **{name: values[i] for name, values in scores.items()},
        }
        for i, rollout in enumerate(rollouts)
    ]
    named = {f"validation_{name}": value for name, value in figures.items()}
    return {"validation": -means.get("gold", means["score"]), **named}, table


def sample_lines(step: int, table: Sequence[dict[str, Any]], characters: int = 160) -> str:
    """Some held-out prompts with their completions and scores, for the console."""
    lines = [f"step {step:,}:"]
    for row in table:
        numbers = ", ".join(f"{name} {row[name]:.2f}" for name in ("score", "gold") if name in row)
        texts = (" ".join(terminal_safe(str(row[name] or "")).split()) for name in ("prompt", "text"))
        asked, said = (text if len(text) <= characters else f"{text[:characters]}..." for text in texts)
        lines.append(f"  {asked} -> {said}  [{numbers}{'' if row['ended'] else ', cut off'}]")
    return "\n".join(lines)


def step_setup(
    policy: CausalLM,
    completions: int,
    minibatches: int,
    micro_batch_tokens: int,
    longest: int,
    compute_dtype: torch.dtype,
    checkpointed: bool,
    ranks: Ranks = ALONE,
) -> Setup:
    """What decides how much memory a step takes, of roll-outs of so many completions, with rows of at most
    `longest` tokens."""
    rows = max(1, micro_batch_tokens // longest)
    completions = -(-completions // ranks.count)
    return Setup(
        rows=min(rows, -(-completions // minibatches)),
        row_tokens=longest,
        optimizer="adamw",
        compute_dtype=compute_dtype,
        checkpointed=checkpointed,
        segments=False,
        accumulates=rows * minibatches < completions,
        on_cpu=policy.model.embed_tokens.weight.device.type == "cpu",
        trained_share=trained_share(policy),
        ranks=ranks.count,
        neighbours=ranks.neighbours,
    )


def memory_line(world: World, longest: int, checkpointed: bool) -> str:
    """A line about what training will take with rows of at most `longest` tokens; UserError if that is too
    much (see `check_memory`)."""
    policy, critic, settings = world.actor.policy, world.actor.critic, world.settings
    setup = step_setup(
        policy,
        settings.batch_prompts * settings.samples,
        settings.minibatches,
        settings.micro_batch_tokens,
        longest,
        world.compute_dtype,
        checkpointed,
        world.ranks,
    )
    size = sum(parameter.numel() for parameter in policy.parameters())
    other = 4.0 * size  # the reference, or the policy with its adapter merged, to sample from
    if isinstance(critic, Critic):  # no scores over the vocabulary, but its embeddings
        config, share = critic.trunk.config, trained_share(critic)
        own = estimate(replace(config, vocab_size=1), replace(setup, trained_share=share), 0.0)
        other += own.total + (4.0 + 12.0 * share) * config.vocab_size * config.hidden_size
    return check_memory_here(policy.config, setup, world.device, size, other)
