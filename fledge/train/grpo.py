"""Group-relative policy optimisation: the steps that learn from groups, their loss, and held-out figures.

Shape suffixes: B completions, U different ones, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch

from fledge.model.transformer import CausalLM
from fledge.train.groups import GroupBatch, Groups, Settings, State, World, sampled_groups, score_figures
from fledge.train.grpo_losses import kl_term, policy_term
from fledge.train.losses import Term
from fledge.train.memory import check_memory_here
from fledge.train.ppo import step_setup
from fledge.train.ppo_losses import k3, masked_mean
from fledge.train.prompts import EncodedPrompt
from fledge.train.rollout import (
    gap_figures,
    kl_figures,
    length_figures,
    micro_batches,
    minibatches,
    padded,
    policy_scores,
    same_rows,
)
from fledge.train.steps import Metrics, Step, Steps, own_batches
from fledge.types import Rollout


def grpo_steps(
    world: World,
    prompts: Sequence[EncodedPrompt],
    stopped: Callable[[float], None],
    idle: Callable[[int, Metrics], None],
) -> Steps:
    """Roll-outs, each learned from in `epochs` passes of `minibatches` steps; a save may follow the last of
    them. `stopped` hears the KL that ended it, if one did; `idle` the number (from 1) and figures of a
    roll-out in which no group had a signal: its steps are empty."""
    settings = world.settings

    def steps(
        first: int, saved: dict[str, Any], _metrics: Metrics | None
    ) -> Generator[Step, Metrics | None, None]:
        state = State(**saved)
        for number in range(first // settings.updates, settings.rollouts):
            found = sampled_groups(world, prompts, state)
            made = found.rollouts
            same = same_rows(made) if world.reads_once else [[i] for i in range(len(made))]
            different = [made[numbers[0]] for numbers in same]
            plan = [world.ranks.even(parts) for parts in _plan(settings, different, number)]
            batch, figures = _experience(world, found, same, plan[: settings.minibatches])
            if settings.stop_kl is not None and figures.get("kl", 0.0) > settings.stop_kl:
                stopped(figures["kl"])
                return
            if not found.rollouts:
                idle(number + 1, figures)
            for update, parts in enumerate(plan):
                shown = [figures if update == i == 0 else {} for i in range(len(parts))]
                is_last = update == len(plan) - 1
                state_now = vars(state).copy() if is_last else {}
                batches = own_batches(world.ranks, list(map(batch, parts, shown)))
                yield Step(batches, is_last, state_now, figures if update == 0 else {})

    return steps


def _plan(settings: Settings, rollouts: Sequence[Rollout], number: int) -> list[list[list[int]]]:
    """The micro-batches of each update; there are always as many updates, if need be empty ones."""
    lengths = [len(rollout.input_ids) for rollout in rollouts]
    plan: list[list[list[int]]] = []
    for epoch in range(settings.epochs):
        seed = [settings.seed, 3, number, epoch]
        parts = minibatches(len(rollouts), settings.minibatches, seed) if rollouts else []
        plan += [list(micro_batches(rows, lengths, settings.micro_batch_tokens)) for rows in parts]
        plan += [[] for _ in range(settings.minibatches - len(parts))]
    return plan


def _experience(
    world: World,
    found: Groups,
    same: Sequence[Sequence[int]],
    first_updates: Sequence[Sequence[Sequence[int]]],
) -> tuple[Callable[[Sequence[int], Metrics], GroupBatch], Metrics]:
    """What was said of the roll-outs before anything is learned, as a function that makes micro-batches, and
    all figures. They are read in the micro-batches in which they are learned from first; of each list of
    `same` ones only the first is read."""
    if not found.rollouts:
        return lambda _part, _figures: GroupBatch(*[torch.empty(0)] * 5), found.figures  # type: ignore[arg-type]
    rows = padded([found.rollouts[numbers[0]] for numbers in same])
    parts = [part for update in first_updates for part in update]
    logps_UT, _, ref_UT = world.read(rows, parts)

    def batch(part: Sequence[int], figures: Metrics) -> GroupBatch:
        few, copies = rows.rows(part), [(i, number) for i, row in enumerate(part) for number in same[row]]
        chosen, width = [part[i] for i, _ in copies], few.mask.shape[1]
        advantages_B = found.advantages[[number for _, number in copies]]
        places_B = torch.tensor([i for i, _ in copies])
        return GroupBatch(
            few, places_B, logps_UT[chosen, :width], ref_UT[chosen, :width], advantages_B, figures
        )

    row_of = {number: row for row, numbers in enumerate(same) for number in numbers}
    places = [row_of[number] for number in range(len(found.rollouts))]
    logps_BT, mask_BT = logps_UT[places], rows.mask[places]
    kl = kl_figures(logps_BT, ref_UT[places], mask_BT)
    return batch, {**found.figures, **kl, **gap_figures(found.rollouts, logps_BT, mask_BT)}


def grpo_loss(policy: CausalLM, batch: GroupBatch, settings: Settings) -> dict[str, Term]:
    """The clipped loss, and the KL to the reference with its price.

    Reported beside them: `loss`, their sum; the mean of rho = pi / pi_old (`ratio`) and of |rho - 1|
    (`ratio_distance`) over tokens; the KL between the two (`kl_step`: k3); the entropy; the share of tokens
    for which clipping changed the loss."""
    mask_BT, old_BT = batch.mask, batch.old_logps
    logps_BT, entropy_BT = (x[batch.places] for x in policy_scores(policy, batch.rows, settings.temperature))
    mean, most = settings.mean, settings.max_tokens
    high = settings.clip if settings.clip_high is None else settings.clip_high
    loss, clipped_BT = policy_term(
        logps_BT, old_BT, batch.advantages, mask_BT, mean, (settings.clip, high), most
    )
    kl = kl_term(logps_BT, old_BT, batch.ref_logps, mask_BT, mean, most, settings.beta)
    whole = (loss.sum + settings.beta * kl.sum).detach()
    terms = {"loss": Term(whole, per=loss.per, weight=0.0), "policy_loss": loss, "kl_loss": kl}
    known_BT = logps_BT.detach()
    ratio_BT = (known_BT - old_BT).exp()
    figures = {
        "ratio": ratio_BT,
        "ratio_distance": (ratio_BT - 1).abs(),
        "clip_fraction": clipped_BT.float(),
        "entropy": entropy_BT,
        "kl_step": k3(known_BT, old_BT),
    }
    for name, x_BT in figures.items():
        terms[name] = Term(torch.where(mask_BT, x_BT, 0.0).sum(), per="tokens", weight=0.0)
    for name, number in batch.figures.items():
        terms[name] = Term(torch.tensor(number, dtype=torch.float64), per="rollouts", weight=0.0)
    return terms


# Held-out prompts.


def held_out_figures(
    world: World, prompts: Sequence[EncodedPrompt], samples: int
) -> tuple[Metrics, list[dict[str, Any]]]:
    """Figures of completions of held-out prompts, with the same random numbers each time, and a row for each
    of them. `validation` is minus the mean score; `best` is the mean of each prompt's best."""
    rollouts = world.play(prompts, samples, 5)
    columns = world.judge(rollouts)
    rows = padded(rollouts)
    most = world.settings.micro_batch_tokens
    parts = list(micro_batches(range(len(rollouts)), rows.lengths.tolist(), most))
    logps_BT, entropy_BT, ref_BT = world.read(rows, parts)
    figures = {
        **score_figures(columns),
        **kl_figures(logps_BT, ref_BT, rows.mask),
        **length_figures(rollouts),
        "entropy": float(masked_mean(entropy_BT, rows.mask)),
    }
    if samples > 1:
        figures["best"] = float(torch.tensor(columns["score"]).view(-1, samples).amax(1).mean())
    table = [
        {
            "prompt": rollout.messages[-1].get("content"),
            "text": rollout.completion,
            "ended": rollout.ended,
            **{name: values[i] for name, values in columns.items()},
        }
        for i, rollout in enumerate(rollouts)
    ]
    named = {f"validation_{name}": value for name, value in figures.items()}
    return {"validation": -figures["score"], **named}, table


def memory_line(world: World, longest: int, checkpointed: bool) -> str:
    """A line about what training will take with rows of at most `longest` tokens; UserError if that is too
    much (see `check_memory`)."""
    settings = world.settings
    completions = settings.batch_prompts * settings.samples
    sizes = (completions, settings.minibatches, settings.micro_batch_tokens, longest)
    setup = step_setup(world.policy, *sizes, world.compute_dtype, checkpointed, world.ranks)
    size = sum(parameter.numel() for parameter in world.policy.parameters())
    # Besides: the reference, or the policy with its adapter merged, to sample from.
    return check_memory_here(world.policy.config, setup, world.device, size, 4.0 * size)
