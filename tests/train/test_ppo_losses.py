"""Losses of proximal policy optimisation: TRL's numbers, and their properties."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fledge.engine.engine import Engine
from fledge.model.checkpoint import load_model, load_reward_model
from fledge.tokenizer.bpe import SMALLEST_VOCAB_SIZE, train_bpe
from fledge.train.actor_critic import ActorCritic, Critic
from fledge.train.ppo_losses import (
    adapted_beta,
    explained_variance,
    generalised_advantages,
    k1,
    k3,
    last_places,
    masked_mean,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)
from fledge.train.rollout import Padded
from fledge.types import SamplingParams, pad_rows

from ..models import chain_model

GOLDEN = Path(__file__).parents[1] / "golden" / "ppo"
NUMBERS: dict[str, Any] = json.loads((GOLDEN / "losses.json").read_text())
PROMPTS, RESPONSES, FUNCTIONS = NUMBERS["prompts"], NUMBERS["responses"], NUMBERS["functions"]
WIDTH = len(RESPONSES[0])


# TRL's numbers. Its tensors hold the responses alone; here a place belongs to a token of the whole row.


def placed(numbers: list[list[Any]], like: Tensor) -> Tensor:
    """A tensor of responses at the places of whole rows (B, T); nothing anywhere else."""
    out = torch.zeros(like.shape, dtype=like.dtype)
    for row, (prompt, values) in enumerate(zip(PROMPTS, numbers, strict=True)):
        out[row, len(prompt) - 1 : len(prompt) - 1 + WIDTH] = torch.tensor(values, dtype=like.dtype)
    return out


def golden_rows(case: dict[str, Any]) -> tuple[Padded, Tensor]:
    """Roll-outs that TRL learned from, with the mask of their tokens and that of their values: TRL counts the
    value behind the end too."""
    rows = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    ids = pad_rows(rows, 0)
    none = torch.zeros(len(rows), ids.shape[1] - 1, dtype=torch.bool)
    masks = [
        placed([[not out for out in row] for row in case[name]], none)
        for name in ("padding_mask", "padding_mask_p1")
    ]
    return Padded(ids, masks[0], torch.tensor([len(row) for row in rows])), masks[1]


def close(found: Tensor, expected: list[list[float]], mask: Tensor) -> None:
    torch.testing.assert_close(found[mask], placed(expected, found)[mask], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", NUMBERS["cases"], ids=range(len(NUMBERS["cases"])))
def test_a_step_is_trls(case: dict[str, Any]) -> None:
    """From two models and fixed roll-outs to loss and gradients, each part as `PPOTrainer.train` had it."""
    settings = case["settings"]
    actor = ActorCritic(
        load_model(GOLDEN / "policy"), Critic(load_reward_model(GOLDEN / "value"), 0.0), temperature=1.0
    )
    rows, value_mask = golden_rows(case)
    mask = rows.mask
    said = actor(rows)
    close(said.logps, case["new_logprobs"], mask)
    close(said.values, case["vpred"], value_mask)

    old_logps, ref = (placed(case[name], said.logps.detach()) for name in ("logprobs", "ref_logprobs"))
    old_values = placed(case["values"], said.values.detach())
    close(k1(old_logps, ref), case["kl"], mask)
    scores = torch.tensor(case["scores"])
    rewards = token_rewards(old_logps, ref, mask, torch.zeros(len(scores)), settings["kl_coef"])
    # TRL gives the score one place behind the token that ends a completion, if there is room.
    rewards[torch.arange(len(scores)), last_places(value_mask)] += scores
    close(rewards, case["rewards"], value_mask)

    raw = generalised_advantages(rewards, old_values, value_mask, settings["gamma"], settings["lam"])
    returns = raw + old_values
    close(returns, case["returns"], value_mask)
    count = int(mask.sum())
    whitened = whiten(raw, mask)
    close(whitened * math.sqrt((count - 1) / count), case["advantages"], mask)  # TRL's is Bessel-corrected

    advantages = placed(case["advantages"], raw)
    policy = masked_mean(policy_loss(said.logps, old_logps, advantages, settings["cliprange"]), mask)
    value = masked_mean(value_loss(said.values, old_values, returns, settings["cliprange_value"]), value_mask)
    assert policy.item() == pytest.approx(case["pg_loss"], rel=1e-5, abs=1e-6)
    assert value.item() == pytest.approx(case["vf_loss"], rel=1e-5)
    loss = policy + settings["vf_coef"] * value
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    assert case["clipped"] > 0 and case["value_clipped"] > 0, "the case would say less"

    loss.backward()
    policy_norms = {n: float(p.grad.norm()) for n, p in actor.policy.named_parameters() if p.grad is not None}
    assert policy_norms == pytest.approx(case["policy_gradient_norms"], rel=1e-4, abs=1e-6)
    critic = actor.critic
    value_norms = {
        n.removeprefix("trunk."): float(p.grad.norm())
        for n, p in critic.named_parameters()
        if p.grad is not None
    }
    assert value_norms == pytest.approx(case["value_gradient_norms"], rel=1e-4, abs=1e-6)


def test_masked_means_and_whitening_are_trls() -> None:
    values, mask = torch.tensor(FUNCTIONS["values"]), torch.tensor(FUNCTIONS["mask"])
    assert masked_mean(values, mask).item() == pytest.approx(FUNCTIONS["mean"], rel=1e-6)
    count = int(mask.sum())
    theirs = torch.tensor(FUNCTIONS["whitened"])[mask]
    torch.testing.assert_close(whiten(values, mask)[mask] * math.sqrt((count - 1) / count), theirs)


def test_completions_are_cut_where_trl_cuts_them() -> None:
    """A policy that would go on is stopped behind the stop id, which belongs to the completion."""
    tokenizer = train_bpe([], SMALLEST_VOCAB_SIZE)
    stop = FUNCTIONS["stop_id"]
    for response, expected in zip(FUNCTIONS["responses"], FUNCTIONS["truncated"], strict=True):
        start = 100
        chain = dict(itertools.pairwise([start, *response]))
        engine = Engine(chain_model(tokenizer, chain).eval(), [stop])
        (made,) = engine.generate([[start]], SamplingParams(0.0, max_tokens=len(response)))
        ids = [*made.ids, made.stop_token.id] if made.stop_token else made.ids
        assert ids == [token for token in expected if token], "TRL pads with 0"


# Properties.


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


MASK = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 1, 1]]).bool()


def test_nothing_outside_the_mask_counts() -> None:
    """Neither prompts, nor what tools answered in between, nor padding; whatever stands there."""
    logps, ref, values = (numbers(4, 5, seed=seed) for seed in range(3))
    scores, junk = numbers(4, seed=5), torch.where(MASK, 0.0, torch.nan)

    def outcome(noise: Tensor) -> tuple[Tensor, Tensor]:
        rewards = token_rewards(logps + noise, ref, MASK, scores, 0.1)
        found = generalised_advantages(rewards, values + noise, MASK, 0.9, 0.8)
        return found, whiten(found + noise, MASK)

    for one, other in zip(outcome(torch.zeros(4, 5)), outcome(junk), strict=True):
        assert torch.equal(one, other) and not one[~MASK].any()


def test_rewards_by_hand() -> None:
    """-beta log (pi / pi_0) each, and the score at the last token made: the third, second, last, last."""
    logps, ref = torch.full((4, 5), -1.0), torch.full((4, 5), -3.0)
    rewards = token_rewards(logps, ref, MASK, torch.tensor([1.0, 2.0, 3.0, 4.0]), 0.25)
    expected = torch.where(MASK, -0.5, 0.0)
    for row, (place, score) in enumerate(zip([3, 2, 4, 4], [1.0, 2.0, 3.0, 4.0], strict=True)):
        expected[row, place] += score
    assert torch.equal(rewards, expected)


def test_advantages_with_lambda_1_are_returns_minus_values() -> None:
    """Then A_t = (all rewards from t on) - V_t (Schulman et al. 2016, eq. 18); with lambda 0, delta_t."""
    rewards, values = torch.where(MASK, numbers(4, 5), 0.0), numbers(4, 5, seed=1)
    ahead = rewards.flip(1).cumsum(1).flip(1)
    found = generalised_advantages(rewards, values, MASK, 1.0, 1.0)
    torch.testing.assert_close(found, torch.where(MASK, ahead - values, 0.0))
    short = generalised_advantages(rewards, values, MASK, 0.5, 0.0)
    # Row 3 has a gap: the value that follows place 1 is that of place 3.
    assert short[3, 1].item() == pytest.approx((rewards[3, 1] + 0.5 * values[3, 3] - values[3, 1]).item())
    assert short[3, 4].item() == pytest.approx((rewards[3, 4] - values[3, 4]).item())


def test_whitened_numbers_have_mean_0_and_variance_1_of_the_population() -> None:
    found = whiten(7 + 3 * numbers(4, 5), MASK)[MASK]
    assert found.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert found.var(correction=0).item() == pytest.approx(1.0, abs=1e-5)
    assert whiten(torch.full((4, 5), 2.0), MASK).abs().max() == 0.0, "all the same: nothing to learn"


@given(st.floats(-3, 3), st.floats(-2, 2), st.sampled_from([0.1, 0.2]))
def test_the_policy_loss_is_the_lower_bound(log_ratio: float, advantage: float, clip: float) -> None:
    """-min(rho A, clip(rho) A); no gradient pulls a ratio further out of its range."""
    logp = torch.tensor(log_ratio, dtype=torch.float64, requires_grad=True)
    zero, value = torch.zeros((), dtype=torch.float64), torch.tensor(advantage, dtype=torch.float64)
    loss = policy_loss(logp, zero, value, clip)
    ratio = math.exp(log_ratio)
    bound = min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)
    assert loss.item() == pytest.approx(-bound, rel=1e-9, abs=1e-12)
    loss.backward()
    assert logp.grad is not None
    if (advantage > 0 and ratio > 1 + clip) or (advantage < 0 and ratio < 1 - clip):
        assert logp.grad.item() == 0.0
    elif 1 - clip < ratio < 1 + clip:
        assert logp.grad.item() == pytest.approx(-ratio * advantage, rel=1e-9, abs=1e-12)


def test_the_value_loss_by_hand() -> None:
    """V = 1, V_old = 0, R = 0.5, clip 0.2: the clipped value 0.2 is 0.3 off, the free one 0.5."""
    one, zero, half = (torch.tensor(x) for x in (1.0, 0.0, 0.5))
    assert value_loss(one, zero, half, 0.2).item() == pytest.approx(0.125)
    assert value_loss(one, zero, torch.tensor(2.0), 0.2).item() == pytest.approx(1.8**2 / 2)


def test_estimators_of_the_kl_divergence() -> None:
    """Their means over all tokens, weighted as the policy draws them, are the divergence itself."""
    policy, reference = (numbers(50, seed=s).double().log_softmax(0) for s in (0, 1))
    exact = float((policy.exp() * (policy - reference)).sum())
    for estimate in (k1, k3):
        mean = float((policy.exp() * estimate(policy, reference)).sum())
        assert mean == pytest.approx(exact, rel=1e-9)
    assert (k3(policy, reference) >= 0).all() and (k1(policy, reference) < 0).any()
    assert k1(policy, policy).abs().max() == k3(policy, policy).abs().max() == 0.0


def test_beta_follows_the_divergence() -> None:
    """By hand: twice the target is cut to +20%, times 64 of 1,000 sequences."""
    assert adapted_beta(0.1, 12.0, 6.0, 64, 1000) == pytest.approx(0.1 * (1 + 0.2 * 0.064))
    assert adapted_beta(0.1, 0.0, 6.0, 64, 1000) == pytest.approx(0.1 * (1 - 0.2 * 0.064))
    assert adapted_beta(0.1, 6.6, 6.0, 100, 1000) == pytest.approx(0.1 * 1.01)
    assert adapted_beta(0.1, 6.0, 6.0, 64, 1000) == 0.1


def test_explained_variance() -> None:
    returns = numbers(4, 5)
    assert explained_variance(returns, returns, MASK) == pytest.approx(1.0)
    assert explained_variance(torch.full((4, 5), 3.0), returns, MASK) == pytest.approx(0.0, abs=1e-6)
    assert explained_variance(-returns, returns, MASK) == pytest.approx(-3.0, rel=1e-5)
    assert explained_variance(returns, torch.ones(4, 5), MASK) == 0.0
