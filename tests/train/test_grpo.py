"""GRPO: where it begins, that dividing a step changes nothing, what is left out, and where it leads."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fledge.errors import UserError
from fledge.model.lora import LoRA, add_lora
from fledge.model.transformer import CausalLM
from fledge.rewards.verifiers import Reward
from fledge.run import Run
from fledge.train.groups import GroupBatch, Settings, State, World, sampled_groups
from fledge.train.grpo import grpo_loss, grpo_steps, held_out_figures
from fledge.train.grpo_losses import group_advantages
from fledge.train.loop import fit
from fledge.train.optim import make_optimizers
from fledge.train.plan import FitConfig
from fledge.train.rollout import padded
from fledge.train.steps import Metrics, Step
from fledge.types import Rollout

from .test_ppo import PROMPTS, TOKENIZER, answers_of, asked, length_reward, objective_value, tiny

SETTINGS = Settings(
    rollouts=2, batch_prompts=6, samples=3, max_tokens=5, temperature=1.0, advantage="grpo", average=None,
    epochs=2, minibatches=3, micro_batch_tokens=10_000, resample=0, beta=0.1, clip=0.2, clip_high=None,
    stop_kl=None, missing_eos_score=None, seed=0,
)  # fmt: skip


def rewards_of(function: Any, weight: float = 1.0, name: str = "f") -> list[Reward]:
    return [Reward(name, weight, function)]


def world_of(
    settings: Settings = SETTINGS,
    lora: bool = False,
    dtype: torch.dtype = torch.float32,
    rewards: list[Reward] | None = None,
) -> World:
    policy, frozen = tiny(0), None if lora else tiny(0)
    if lora:
        add_lora(policy, LoRA(2, 4.0), torch.Generator().manual_seed(0))
    return World(policy, frozen, TOKENIZER, [0, 1], rewards or rewards_of(length_reward), settings, dtype)


def steps_of(world: World, state: dict[str, Any] | None = None, first: int = 0, idle: Any = None) -> Any:
    return grpo_steps(world, PROMPTS, lambda _kl: None, idle or (lambda *_: None))(first, state or {}, None)


def figures_of(world: World, step: Step) -> tuple[dict[str, float], list[Tensor]]:
    """The figures and gradients of a step."""
    counts: dict[str, int] = {}
    for batch in step.batches:
        for per, count in batch.denominators().items():
            counts[per] = counts.get(per, 0) + count
    world.policy.zero_grad()
    sums: dict[str, float] = {}
    for batch in step.batches:
        with torch.autocast("cpu", world.compute_dtype, enabled=world.compute_dtype != torch.float32):
            terms = grpo_loss(world.policy, batch, world.settings)  # type: ignore[arg-type]
        objective_value(terms, counts).backward()  # type: ignore[no-untyped-call]
        for name, term in terms.items():
            sums[name] = sums.get(name, 0.0) + float(term.sum.detach()) / counts[term.per]
    return sums, [p.grad.clone() for p in world.policy.parameters() if p.grad is not None]


# Where it begins.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("micro_tokens", [10_000, 20])
def test_the_first_step_is_at_the_reference(dtype: torch.dtype, lora: bool, micro_tokens: int) -> None:
    """Ratio exactly 1 and KL exactly 0, however the step is divided and whatever is computed in."""
    world = world_of(replace(SETTINGS, micro_batch_tokens=micro_tokens, epochs=1), lora, dtype)
    step = next(steps_of(world))
    figures, gradients = figures_of(world, step)
    assert figures["ratio_distance"] == 0.0 and figures["ratio"] == pytest.approx(1.0, abs=1e-12)
    assert figures["kl"] == figures["kl_k3"] == figures["kl_step"] == figures["kl_loss"] == 0.0
    assert figures["clip_fraction"] == 0.0
    assert (len(step.batches) > 1) == (micro_tokens == 20)
    assert any(bool(gradient.any()) for gradient in gradients)


@pytest.mark.parametrize("average", ["tokens", "completions", "length", "whole"])
def test_a_step_can_be_divided(average: Any) -> None:
    """Micro-batches give the figures and gradients of the whole; the policy has moved, so clipping works."""
    found = []
    for micro_tokens in (10_000, 20):
        settings = replace(SETTINGS, micro_batch_tokens=micro_tokens, average=average, clip=0.02)
        world = world_of(settings)
        step = next(steps_of(world))
        with torch.no_grad():
            for parameter in world.policy.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        found.append((*figures_of(world, step), len(step.batches)))
    (big, gradients, one), (small, small_gradients, several) = found
    assert one == 1 < several
    assert big["clip_fraction"] > 0 and big["kl_loss"] > 0
    assert small == pytest.approx(big, rel=1e-4, abs=1e-6)
    for left, right in zip(gradients, small_gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-6)


# Roll-outs.


def odd_rows(rollouts: list[Rollout]) -> list[float]:
    """A signal only for prompts with an odd number."""
    return [sum(one.loss_mask) * float(int(one.messages[0]["content"] or 0) % 2) for one in rollouts]


def test_groups_without_signal_count_in_the_averages() -> None:
    """They have an advantage of 0, so that a step is the smaller the fewer groups have something to say."""
    world, state = world_of(rewards=rewards_of(odd_rows)), State()
    found = sampled_groups(world, PROMPTS, state)
    advantages_GS = found.advantages.view(-1, 3)
    is_odd = [int(one.messages[0]["content"] or 0) % 2 == 1 for one in found.rollouts[::3]]
    has_signal = advantages_GS.any(1)
    assert len(is_odd) == 6 and not any(has and not odd for has, odd in zip(has_signal, is_odd, strict=True))
    signals = int(has_signal.sum())
    assert 0 < signals < 6
    assert (state.draws, state.groups, state.without_signal) == (1, 6, 6 - signals)
    assert found.figures["without_signal"] == pytest.approx(1 - signals / 6)
    assert found.figures["sampled_groups"] == 6
    assert advantages_GS.sum(1).abs().max() < 1e-5


def test_a_step_is_as_much_smaller_as_groups_say_nothing() -> None:
    """Of two prompts one says nothing: the gradient is half of the other's alone."""
    settings = replace(SETTINGS, beta=0.0, average="completions")
    world = world_of(settings, rewards=rewards_of(odd_rows))
    found = []
    for prompts in (PROMPTS[1:2], [PROMPTS[1], PROMPTS[0]]):
        rollouts = world.play(prompts, 3, 4)
        advantages_GS = group_advantages(torch.tensor(odd_rows(rollouts)).view(-1, 3), "grpo")
        rows = padded(rollouts)
        logps_BT, _, ref_BT = world.read(rows, [range(len(rollouts))])
        places = torch.arange(len(rollouts))
        batch = GroupBatch(rows, places, logps_BT, ref_BT, advantages_GS.flatten(), {"score": 0.0})
        found.append(figures_of(world, Step([batch]))[1])
    for alone, beside in zip(*found, strict=True):
        torch.testing.assert_close(beside, alone / 2, rtol=1e-4, atol=1e-7)
    assert any(bool(gradient.any()) for gradient in found[0])


def test_others_are_sampled_in_their_place() -> None:
    """Until the batch is full, or as often as is allowed; never more groups than asked for."""
    settings = replace(SETTINGS, resample=20)
    world, state = world_of(settings, rewards=rewards_of(odd_rows)), State()
    found = sampled_groups(world, PROMPTS, state)
    assert len(found.rollouts) == 6 * 3 and 1 < state.draws < 20
    assert state.groups == found.figures["sampled_groups"] == 6 * state.draws
    state = State()
    few = sampled_groups(
        world_of(replace(settings, resample=1), rewards=rewards_of(odd_rows)), PROMPTS, state
    )
    assert state.draws == 2 and 0 < len(few.rollouts) <= 18
    assert [one.input_ids for one in few.rollouts] == [
        one.input_ids for one in found.rollouts[: len(few.rollouts)]
    ]


def test_a_rollout_without_any_signal_takes_no_step() -> None:
    """Its steps are empty, so the loop skips and counts them; its figures are told. There are as many steps
    as in any other, and a save may follow the last."""
    told: list[tuple[int, Metrics]] = []
    world = world_of(rewards=rewards_of(lambda rollouts: [1.0] * len(rollouts)))
    steps = list(steps_of(world, idle=lambda *said: told.append(said)))
    assert len(steps) == 2 * SETTINGS.updates and not any(step.batches for step in steps)
    assert [number for number, _ in told] == [1, 2]
    assert told[0][1]["score"] == 1.0 and told[0][1]["without_signal"] == 1.0
    assert steps[5].may_save and steps[5].state["without_signal"] == 6


def test_a_step_has_every_kept_completion_once_in_each_epoch() -> None:
    world = world_of()
    steps = list(steps_of(world))
    assert len(steps) == 2 * SETTINGS.updates
    kept = 3 * steps[5].state["groups"]
    for epoch in (steps[:3], steps[3:6]):
        assert sum(len(batch.places) for step in epoch for batch in step.batches) == kept > 3
    assert [step.may_save for step in steps] == [False] * 5 + [True] + [False] * 5 + [True]
    assert [bool(step.state) for step in steps] == [step.may_save for step in steps]


def test_completions_that_are_the_same_are_read_once() -> None:
    """Each still counts: losses, figures and gradients are those of a batch that holds all of them."""
    settings = replace(SETTINGS, batch_prompts=1, samples=24, max_tokens=1, epochs=1, minibatches=1)
    world = world_of(settings, rewards=rewards_of(lambda made: [float(one.input_ids[-1]) for one in made]))
    [step] = list(steps_of(replace(world, settings=replace(settings, rollouts=1), reads_once=True)))
    [batch] = step.batches
    assert len(batch.places) == 24 > len(batch.rows.lengths) == len(batch.rows.input_ids.unique(dim=0)) > 1
    every = replace(batch, rows=batch.rows.rows(batch.places.tolist()), places=torch.arange(24))
    assert batch.denominators() == every.denominators()
    (once, gradients), (all_of_them, others) = (figures_of(world, Step([one])) for one in (batch, every))
    assert once == pytest.approx(all_of_them, rel=1e-4, abs=1e-6)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_groups_without_signal_can_be_left_out() -> None:
    """Without sampling others: of the same groups those stay that say something."""
    world = world_of(rewards=rewards_of(odd_rows))
    whole = sampled_groups(world, PROMPTS, State())
    few = sampled_groups(replace(world, keeps_equal=False), PROMPTS, State())
    has_signal = whole.advantages.view(-1, 3).any(1)
    assert torch.equal(few.advantages.view(-1, 3), whole.advantages.view(-1, 3)[has_signal])
    assert 0 < len(few.rollouts) < len(whole.rollouts) and few.figures == whole.figures


def test_a_saved_state_goes_on_where_it_was() -> None:
    """The second roll-out is the same, whether the first one was made in this process or not."""
    settings = replace(SETTINGS, resample=2)
    rewards = rewards_of(odd_rows)
    steps = list(steps_of(world_of(settings, rewards=rewards)))
    again = next(steps_of(world_of(settings, rewards=rewards), steps[5].state, first=6))
    assert steps[5].state["draws"] > 1
    for one, other in zip(steps[6].batches, again.batches, strict=True):
        assert torch.equal(one.rows.input_ids, other.rows.input_ids)
        assert torch.equal(one.advantages, other.advantages)
        assert one.figures == other.figures


def test_several_rewards_are_summed_and_told_apart() -> None:
    ends = Reward("ends", -2.0, lambda rollouts: [float(one.ended) for one in rollouts])
    world = world_of(rewards=[*rewards_of(length_reward, 0.5, "length"), ends])
    rollouts = world.play(PROMPTS, 2, 7)
    columns = world.judge(rollouts)
    assert list(columns) == ["score", "score:length", "score:ends"]
    for i, one in enumerate(rollouts):
        assert columns["score"][i] == pytest.approx(0.5 * length_reward([one])[0] - 2.0 * one.ended)
    figures = sampled_groups(world, PROMPTS, State()).figures
    assert figures.keys() >= {"score", "score_std", "score:length", "score_std:length", "score:ends"}
    set_world = world_of(replace(SETTINGS, missing_eos_score=-9.0))
    scores = set_world.judge(rollouts)["score"]
    assert 0 < sum(one.ended for one in rollouts) < len(rollouts)
    assert all((score == -9.0) != one.ended for score, one in zip(scores, rollouts, strict=True))


def test_the_run_ends_at_a_kl() -> None:
    told: list[float] = []
    world = world_of(replace(SETTINGS, stop_kl=0.01))
    generator = grpo_steps(world, PROMPTS, told.append, lambda *_: None)(0, {}, None)
    taken = [next(generator), *(generator.send({}) for _ in range(5))]
    with torch.no_grad():
        for parameter in world.policy.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    with pytest.raises(StopIteration):
        generator.send({})
    assert len(taken) == 6 and len(told) == 1 and told[0] > 0.01


def test_held_out_figures() -> None:
    """At the reference the KL is 0; the same random numbers each time."""
    world = world_of()
    figures, table = held_out_figures(world, PROMPTS[:3], 4)
    assert figures["validation_kl"] == figures["validation_kl_k3"] == 0.0
    assert figures["validation"] == -figures["validation_score"]
    best = [max(row["score"] for row in table[i : i + 4]) for i in (0, 4, 8)]
    assert figures["validation_best"] == pytest.approx(sum(best) / 3)
    assert len(table) == 12 and set(table[0]) == {"prompt", "text", "ended", "score"}
    assert held_out_figures(world, PROMPTS[:3], 4) == (figures, table)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 1}, "--samples 1: must be at least 2; a completion is judged by others"),
        ({"temperature": 0.0}, "--temperature 0.0: must be above 0"),
        ({"beta": -0.1}, "--beta -0.1: must be at least 0"),
        ({"clip_high": 0.0}, "--clip-high 0.0: must be above 0"),
        ({"missing_eos_score": math.nan}, "--missing-eos-score nan: must be a finite number"),
        ({"minibatches": 19}, "--minibatches 19: more than the 18 completions of a roll-out"),
        ({"resample": -1}, "--resample -1: must be at least 0"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        replace(SETTINGS, **change)
    assert message in str(raised.value)


# Where it leads.

STRENGTHS = ((1, 2, 3, 4, 6), (5, 1, 1, 2, 1))
"""exp(reward) of the five answers to two prompts."""


@pytest.mark.slow
@pytest.mark.parametrize(("advantage", "average"), [("dr-grpo", "tokens"), ("rloo", "whole")])
def test_it_leads_to_the_optimum_in_closed_form(advantage: Any, average: Any, tmp_path: Path) -> None:
    """A bandit: two prompts, every token an answer that ends at once, rewards r known.

    The policy with the largest E_pi[r] - beta KL(pi || pi_0) is pi* = pi_0 exp(r / beta) / Z. Advantages that
    are not divided by a deviation maximise just that, with the price in the loss and its gradient that of the
    divergence: with beta = 1/2 it is pi_0 w^2 / Z. (dr-grpo's are (S - 1) / S of what they should be, so beta
    is too.)
    """
    S = 200
    beta = 0.5 * (S - 1) / S if advantage == "dr-grpo" else 0.5
    settings = replace(
        SETTINGS, rollouts=200, batch_prompts=2, samples=S, max_tokens=1, epochs=1, minibatches=2, beta=beta,
        advantage=advantage, average=average,
    )  # fmt: skip
    policy, frozen = (tiny(3, vocab=5, std=0.25) for _ in range(2))
    before = [answers_of(policy, [i]) for i in range(2)]

    def reward(rollouts: list[Rollout]) -> list[float]:
        return [math.log(STRENGTHS[one.input_ids[0]][one.input_ids[1]]) for one in rollouts]

    world = World(policy, frozen, TOKENIZER, range(5), rewards_of(reward), settings, torch.float32)
    run = Run.open(tmp_path / "run", "")
    run.begin({})
    prompts = [asked(i, [i]) for i in range(2)]
    plan = FitConfig(
        "toy",
        settings.rollouts * settings.updates,
        warmup_steps=5,
        decay_share=0.9,
        max_spike=1e9,
        evaluations=1,
    )
    optimizers = make_optimizers(policy, "adamw", 1.0, 0.01, 0.0)
    steps = grpo_steps(world, prompts, lambda _kl: None, lambda *_: None)
    loss = partial(grpo_loss, settings=settings)
    fit(policy, optimizers, steps, loss, plan, run, lambda _directory, _tokens: None, None, policy)
    for i, strengths in enumerate(STRENGTHS):
        best = before[i] * torch.tensor(strengths).double().square()
        best /= best.sum()
        assert (best / before[i] - 1).abs().max() > 0.5, "there is something to learn"
        assert answers_of(policy, [i]).tolist() == pytest.approx(best.tolist(), rel=0.05)


def test_the_model_that_samples_is_the_one_that_is_trained() -> None:
    """Adapters are merged into what samples: sampled log-probabilities are those of training."""
    world = world_of(lora=True)
    with torch.no_grad():
        for name, parameter in world.policy.named_parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(len(name))
                )
    figures, _ = figures_of(world, next(steps_of(world)))
    assert figures["sampler_gap_largest"] < 1e-4 and figures["kl_k3"] > 0.01
    assert isinstance(world.policy, CausalLM)
