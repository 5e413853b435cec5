"""PPO: where it begins, that dividing a step changes nothing, and where it leads."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fledge.data.prompts import Prompt
from fledge.errors import UserError
from fledge.model.config import ModelConfig
from fledge.model.heads import RewardModel
from fledge.model.lora import LoRA, add_lora
from fledge.model.transformer import CausalLM
from fledge.run import Run
from fledge.tokenizer.bpe import SMALLEST_VOCAB_SIZE, train_bpe
from fledge.train.actor_critic import ActorCritic, Critic, reference_of
from fledge.train.experience import Settings, State, World, experience_of, final_scores
from fledge.train.loop import fit
from fledge.train.losses import Term
from fledge.train.optim import make_optimizers
from fledge.train.plan import FitConfig
from fledge.train.ppo import held_out_figures, ppo_loss, ppo_steps
from fledge.train.pretraining_mix import read_mix
from fledge.train.prompts import EncodedPrompt
from fledge.train.rollout import micro_batches, padded
from fledge.train.steps import Step
from fledge.types import Rollout

TOKENIZER = train_bpe([], SMALLEST_VOCAB_SIZE)
SETTINGS = Settings(
    rollouts=2, batch_prompts=6, samples=2, max_tokens=5, temperature=1.0, epochs=2, minibatches=3,
    micro_batch_tokens=10_000, beta=0.1, kl_target=None, kl_horizon=1000.0, stop_kl=None, gamma=1.0, lam=0.95,
    clip=0.2, value_clip=0.2, value_weight=0.1, missing_eos_score=-1.0, normalise_rewards=False,
    ptx_weight=1.0, seed=0,
)  # fmt: skip


def tiny(seed: int, vocab: int = 12, std: float = 0.5) -> CausalLM:
    torch.manual_seed(seed)
    model = CausalLM(ModelConfig("qwen3", vocab, 16, 24, 1, 2, 2, 8, 32))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, std)
    return model


def asked(number: int, ids: list[int]) -> EncodedPrompt:
    return EncodedPrompt(Prompt([{"role": "user", "content": str(number)}], None, {}, f"file:{number}"), ids)


PROMPTS = [asked(i, [2 + i % 10] * (1 + i % 4)) for i in range(9)]


def length_reward(rollouts: list[Rollout]) -> list[float]:
    return [sum(one.loss_mask) / 2 + 0.1 * one.input_ids[-2] for one in rollouts]


def world_of(
    settings: Settings = SETTINGS,
    lora: bool = False,
    critic: bool = False,
    dtype: torch.dtype = torch.float32,
    reward: Any = length_reward,
) -> World:
    policy, frozen = tiny(0), None if lora else tiny(0)
    if lora:
        add_lora(policy, LoRA(2, 4.0), torch.Generator().manual_seed(0))
    value = Critic(RewardModel(tiny(1), torch.Generator().manual_seed(0)), 0.5) if critic else None
    actor = ActorCritic(policy, value, settings.temperature)
    return World(actor, reference_of(actor, frozen), TOKENIZER, [0, 1], reward, settings, dtype)


def objective_value(terms: dict[str, Term], counts: dict[str, int]) -> Tensor:
    """What the loop makes of a loss's terms."""
    return torch.stack([t.weight * t.sum / counts[t.per] for t in terms.values() if t.weight]).sum()


def figures_of(world: World, step: Step) -> tuple[dict[str, float], list[Tensor]]:
    """The figures and gradients of a step."""
    counts: dict[str, int] = {}
    for batch in step.batches:
        for per, count in batch.denominators().items():
            counts[per] = counts.get(per, 0) + count
    world.actor.zero_grad()
    sums: dict[str, float] = {}
    for batch in step.batches:
        with torch.autocast("cpu", world.compute_dtype, enabled=world.compute_dtype != torch.float32):
            terms = ppo_loss(world.actor, batch, world.settings)  # type: ignore[arg-type]
        objective_value(terms, counts).backward()  # type: ignore[no-untyped-call]
        for name, term in terms.items():
            sums[name] = sums.get(name, 0.0) + float(term.sum.detach()) / counts[term.per]
    return sums, [p.grad.clone() for p in world.actor.parameters() if p.grad is not None]


def steps_of(world: World, state: dict[str, Any] | None = None, first: int = 0) -> Any:
    return ppo_steps(world, PROMPTS, None, lambda _kl: None)(first, state or {}, None)


# Where it begins.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lora", "critic"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("micro_tokens", [10_000, 20])
def test_the_first_step_is_at_the_reference(
    dtype: torch.dtype, lora: bool, critic: bool, micro_tokens: int
) -> None:
    """Ratio exactly 1 and KL exactly 0, however the step is divided and whatever is computed in; in fp32 also
    the loss of a policy that has not moved: the mean of -A over its tokens."""
    world = world_of(replace(SETTINGS, micro_batch_tokens=micro_tokens, epochs=1), lora, critic, dtype)
    step = next(steps_of(world))
    figures, _ = figures_of(world, step)
    assert figures["ratio_distance"] == 0.0 and figures["ratio"] == pytest.approx(1.0, abs=1e-12)
    assert figures["kl"] == figures["kl_k3"] == figures["kl_step"] == 0.0
    assert figures["clip_fraction"] == figures["value_clip_fraction"] == 0.0
    assert (len(step.batches) > 1) == (micro_tokens == 20)
    mean = sum(float(b.advantages[b.rows.mask].sum()) for b in step.batches)
    tokens = sum(b.denominators()["tokens"] for b in step.batches)
    assert figures["policy_loss"] == pytest.approx(-mean / tokens, abs=1e-6)
    assert figures["score"] == pytest.approx(figures["reward"], rel=1e-5), "no KL to pay"


def test_a_step_can_be_divided() -> None:
    """Micro-batches give the figures and gradients of the whole; the policy has moved, so clipping works."""
    found = []
    for micro_tokens in (10_000, 20):
        world = world_of(replace(SETTINGS, micro_batch_tokens=micro_tokens), critic=True)
        step = next(steps_of(world))
        with torch.no_grad():
            for parameter in world.actor.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        found.append((*figures_of(world, step), len(step.batches)))
    (big, gradients, one), (small, small_gradients, several) = found
    assert one == 1 < several
    assert big["clip_fraction"] > 0 and big["value_clip_fraction"] > 0 and big["ratio_distance"] > 0.01
    assert small == pytest.approx(big, rel=1e-4, abs=1e-6)
    for left, right in zip(gradients, small_gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-6)


def test_the_value_function_begins_as_the_reward_model() -> None:
    """Its value before a token is the reward at the token before, with the offset."""
    reward = RewardModel(tiny(1), torch.Generator().manual_seed(0))
    rows = padded(world_of().play(PROMPTS[:3], 0))
    critic = Critic(reward, 0.5)
    ids = rows.input_ids[:, :-1]
    for place in range(ids.shape[1]):
        expected = reward(ids, torch.full((len(ids),), place)) + 0.5
        torch.testing.assert_close(critic(ids)[:, place], expected)
    assert {p.data_ptr() for p in critic.parameters()} == {p.data_ptr() for p in reward.parameters()}
    alone = ActorCritic(tiny(0), None, 1.0)
    assert isinstance(alone.critic, nn.Linear) and not alone(rows).values.any()


# Roll-outs.


def test_a_step_has_every_rollout_once_in_each_epoch() -> None:
    world = world_of()
    generator = steps_of(world)
    sizes, tokens = [], []
    for number in range(2 * SETTINGS.updates):
        step = next(generator) if number == 0 else generator.send({"loss": 0.0})
        sizes.append(sum(len(batch.rows.lengths) for batch in step.batches))
        tokens.append(sum(batch.denominators()["tokens"] for batch in step.batches))
        assert step.may_save == (number % SETTINGS.updates == SETTINGS.updates - 1)
        assert bool(step.state) == step.may_save
    assert sizes == [4] * 12
    assert sum(tokens[:3]) == sum(tokens[3:6])
    with pytest.raises(StopIteration):
        generator.send({"loss": 0.0})


def test_a_saved_state_goes_on_where_it_was() -> None:
    """The second roll-out is the same, whether the first one was made in this process or not."""
    settings = replace(SETTINGS, normalise_rewards=True, kl_target=1.0)
    generator = steps_of(world_of(settings))
    steps = [next(generator), *(generator.send({}) for _ in range(11))]
    again = next(steps_of(world_of(settings), steps[5].state, first=6))
    for one, other in zip(steps[6].batches, again.batches, strict=True):
        assert torch.equal(one.rows.input_ids, other.rows.input_ids)
        assert torch.equal(one.advantages, other.advantages)
        assert one.figures == other.figures and one.figures["beta"] != settings.beta
    assert steps[5].state["count"] > 0


def test_a_completion_without_an_end_has_the_score_that_is_set() -> None:
    """Set, not lowered: however good it was."""
    world = world_of(replace(SETTINGS, missing_eos_score=-3.0, normalise_rewards=True))
    rollouts = world.play(PROMPTS, 7)
    assert 0 < sum(one.ended for one in rollouts) < len(rollouts)
    scores = final_scores([9.0] * len(rollouts), rollouts, -3.0)
    assert scores == [9.0 if one.ended else -3.0 for one in rollouts]
    rows = padded(rollouts)
    parts = list(micro_batches(range(len(rollouts)), rows.lengths.tolist(), 10_000))
    state = State(0.1)
    found = experience_of(world, rollouts, parts, state)
    assert state.count == sum(one.ended for one in rollouts), "what is set says nothing about the reward"
    raw = [score for score, one in zip(length_reward(rollouts), rollouts, strict=True) if one.ended]
    assert (state.mean, state.std) == pytest.approx((statistics.fmean(raw), statistics.pstdev(raw)))
    for row, one in enumerate(rollouts):
        given = (length_reward([one])[0] - state.mean) / state.std if one.ended else -3.0
        # With pi = pi_0 and values of 0, the first return is the score.
        first = int(rows.mask[row].int().argmax())
        last = int(rows.lengths[row]) - 2
        weights = 0.95 ** (last - first)
        assert found.returns[row, first].item() == pytest.approx(given * weights, rel=1e-4, abs=1e-5)


def test_the_running_mean_and_deviation() -> None:
    state, scores = State(0.1), [3.0, -1.0, 4.0, 1.5, 9.0]
    assert state.std == 1.0
    for part in (scores[:2], scores[2:]):
        state.note(part)
    assert (state.mean, state.std) == pytest.approx((statistics.fmean(scores), statistics.pstdev(scores)))


def test_beta_adapts_to_the_kl_that_was_measured() -> None:
    """At the reference the KL is 0, 20% below any target and more: beta falls by 0.2 * 12 / 1000."""
    generator = steps_of(world_of(replace(SETTINGS, kl_target=6.0)))
    steps = [next(generator), *(generator.send({}) for _ in range(6))]
    assert steps[0].batches[0].figures["beta"] == 0.1
    assert steps[6].batches[0].figures["beta"] == pytest.approx(0.1 * (1 - 0.2 * 12 / 1000))


def test_the_run_ends_at_a_kl() -> None:
    """Before anything more is learned; the KL is told."""
    settings, told = replace(SETTINGS, stop_kl=0.01), []
    world = world_of(settings)
    generator = ppo_steps(world, PROMPTS, None, told.append)(0, {}, None)
    taken = [next(generator), *(generator.send({}) for _ in range(5))]
    with torch.no_grad():
        for parameter in world.actor.policy.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    with pytest.raises(StopIteration):
        generator.send({})
    assert len(taken) == 6 and len(told) == 1 and told[0] > 0.01


def test_a_broken_reward_takes_no_step() -> None:
    def broken(_rollouts: list[Rollout]) -> list[float]:
        raise UserError("broken")

    with pytest.raises(UserError, match="broken"):
        next(steps_of(world_of(reward=broken)))


def test_a_sampler_of_another_distribution_is_refused() -> None:
    """Here one that is hotter than what is learned about."""
    world = world_of(replace(SETTINGS, temperature=3.0))
    world.actor.temperature = 1.0
    with pytest.raises(UserError, match="nats a token from those of training"):
        next(steps_of(world))


def test_held_out_figures() -> None:
    """At the reference the KL is 0; the same random numbers each time; gold decides where it is known."""
    world = world_of()
    figures, table = held_out_figures(world, PROMPTS[:3], None)
    assert figures["validation_kl"] == figures["validation_kl_k3"] == 0.0
    assert figures["validation"] == -figures["validation_score"]
    assert len(table) == 6 and set(table[0]) == {"prompt", "text", "ended", "score"}
    again, _ = held_out_figures(world, PROMPTS[:3], lambda rollouts: [2.0] * len(rollouts))
    assert again.pop("validation_gold") == 2.0 and again.pop("validation") == -2.0
    assert all(figures[name] == value for name, value in again.items())


def test_text_is_mixed_in(tmp_path: Path) -> None:
    """Its loss is a mean over its own tokens, whatever the roll-outs have; other rows in each step."""
    (tmp_path / "text.txt").write_text("abc\n<|endoftext|>\n" + "defghij " * 9)
    mix = read_mix([tmp_path / "text.txt"], TOKENIZER, rows=3, row_tokens=8, micro_tokens=16, seed=0)
    first, second = mix.batches(0), mix.batches(1)
    assert [tuple(batch.input_ids.shape) for batch in first] == [(2, 9), (1, 9)]
    assert first[0].input_ids[0, 0] == TOKENIZER.eos_id
    assert first[-1].input_ids[-1, -1] == second[0].input_ids[0, 0], "rows follow each other"
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(first, mix.batches(0), strict=True))
    (tmp_path / "none.txt").write_text(" ")
    with pytest.raises(UserError, match="holds no text"):
        read_mix([tmp_path / "none.txt"], TOKENIZER, 3, 8, 16, 0)

    policy = tiny(0, TOKENIZER.vocab_size)
    actor = ActorCritic(policy, None, 1.0)
    terms = [ppo_loss(actor, batch, replace(SETTINGS, ptx_weight=0.5)) for batch in first]
    counts = {"text_tokens": sum(batch.denominators()["text_tokens"] for batch in first)}
    assert counts == {"text_tokens": 24} and all(batch.denominators()["tokens"] == 0 for batch in first)
    ids = torch.cat([batch.input_ids for batch in first])
    expected = nn.functional.cross_entropy(policy(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    total = sum(float(objective_value(term, counts).detach()) for term in terms)
    assert total == pytest.approx(0.5 * float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "--temperature 0.0: must be above 0"),
        ({"beta": -0.1}, "--beta -0.1: must be at least 0"),
        ({"lam": 1.5}, "--lam 1.5: must be at most 1"),
        ({"gamma": 0.0}, "--gamma 0.0: must be above 0"),
        ({"stop_kl": math.inf}, "--stop-kl inf: must be a finite number"),
        ({"missing_eos_score": math.nan}, "--missing-eos-score nan: must be a finite number"),
        ({"minibatches": 13}, "--minibatches 13: more than the 12 completions of a roll-out"),
        ({"rollouts": 0}, "--rollouts 0: must be at least 1"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        replace(SETTINGS, **change)
    assert message in str(raised.value)


# Where it leads.

STRENGTHS = ((1, 2, 3, 4, 6), (5, 1, 1, 2, 1))
"""exp(reward) of the five answers to two prompts."""


def answers_of(model: CausalLM, prompt: Sequence[int]) -> Tensor:
    with torch.no_grad():
        return torch.softmax(model(torch.tensor([list(prompt)]))[0, -1].double(), -1)


@pytest.mark.slow
def test_it_leads_to_the_optimum_in_closed_form(tmp_path: Path) -> None:
    """A bandit: two prompts, every token an answer that ends at once, rewards r known.

    The policy with the largest E_pi[r] - beta KL(pi || pi_0) is pi* = pi_0 exp(r / beta) / Z (see the same
    test of DPO): with beta = 1/2 and exp(r) = w it is pi_0 w^2 / Z. There the token's whole reward,
    r - beta log (pi / pi_0), is the same for all answers, so nothing is left to learn.
    """
    settings = replace(
        SETTINGS, rollouts=120, batch_prompts=2, samples=100, max_tokens=1, epochs=4, minibatches=2, beta=0.5,
        value_weight=0.5,
    )  # fmt: skip
    policy, frozen = (tiny(3, vocab=5, std=0.25) for _ in range(2))
    actor = ActorCritic(policy, None, 1.0)
    before = [answers_of(policy, [i]) for i in range(2)]

    def reward(rollouts: list[Rollout]) -> list[float]:
        return [math.log(STRENGTHS[one.input_ids[0]][one.input_ids[1]]) for one in rollouts]

    world = World(actor, reference_of(actor, frozen), TOKENIZER, range(5), reward, settings, torch.float32)
    run = Run.open(tmp_path / "run", "")
    run.begin({})
    prompts = [asked(i, [i]) for i in range(2)]
    updates = settings.rollouts * settings.updates
    plan = FitConfig("toy", updates, warmup_steps=5, decay_share=0.9, max_spike=1e9, evaluations=1)
    optimizers = make_optimizers(actor, "adamw", 1.0, 0.01, 0.0)  # type: ignore[arg-type]
    steps = ppo_steps(world, prompts, None, lambda _kl: None)
    loss = partial(ppo_loss, settings=settings)
    fit(actor, optimizers, steps, loss, plan, run, lambda _directory, _tokens: None, None, actor)
    for i, strengths in enumerate(STRENGTHS):
        best = before[i] * torch.tensor(strengths).double().square()
        best /= best.sum()
        assert (best / before[i] - 1).abs().max() > 0.5, "there is something to learn"
        assert answers_of(policy, [i]).tolist() == pytest.approx(best.tolist(), rel=0.02)
