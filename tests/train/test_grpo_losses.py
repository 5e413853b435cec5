"""Losses of group-relative policy optimisation: TRL's numbers, and their properties."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fledge.model.checkpoint import load_model
from fledge.train.groups import GroupBatch, Settings
from fledge.train.grpo import grpo_loss
from fledge.train.grpo_losses import (
    Advantage,
    Mean,
    group_advantages,
    have_signal,
    kl_term,
    mean_of,
    policy_term,
    term_of,
)
from fledge.train.rollout import Padded, policy_scores
from fledge.types import pad_rows

GOLDEN = Path(__file__).parents[1] / "golden"
NUMBERS: dict[str, Any] = json.loads((GOLDEN / "grpo" / "losses.json").read_text())
REWARDS = torch.tensor(NUMBERS["rewards"], dtype=torch.float64)
ROWS = [
    (prompt, completion)
    for prompt, group in zip(NUMBERS["prompts"], NUMBERS["completions"], strict=True)
    for completion in group
]
# TRL's loss types: dapo's mean is over a whole generation batch, bnpo's over a micro-batch; here one.
MEANS: dict[str, Mean] = {"grpo": "completions", "bnpo": "tokens", "dapo": "tokens", "dr_grpo": "length"}


def settings_of(
    advantage: Advantage, mean: Mean | None, beta: float, clip: float, high: float | None
) -> Settings:
    return Settings(
        rollouts=1, batch_prompts=3, samples=3, max_tokens=NUMBERS["most_tokens"], temperature=1.0,
        advantage=advantage, average=mean, epochs=1, minibatches=1, micro_batch_tokens=1000, resample=0,
        beta=beta, clip=clip, clip_high=high, stop_kl=None, missing_eos_score=None, seed=0,
    )  # fmt: skip


def golden_rows() -> Padded:
    rows = [prompt + completion for prompt, completion in ROWS]
    mask = pad_rows([[0] * (len(p) - 1) + [1] * len(c) for p, c in ROWS], 0).bool()
    return Padded(pad_rows(rows, 0), mask, torch.tensor([len(row) for row in rows]))


def placed(numbers: list[list[float]], mask: Tensor) -> Tensor:
    """TRL's numbers for completions at the places of whole rows (B, T)."""
    out = torch.zeros(mask.shape)
    for row, (prompt, completion) in enumerate(ROWS):
        first = len(prompt) - 1
        out[row, first : first + len(completion)] = torch.tensor(numbers[row][: len(completion)])
    return out


@pytest.mark.parametrize("case", NUMBERS["cases"], ids=range(len(NUMBERS["cases"])))
def test_a_step_is_trls(case: dict[str, Any]) -> None:
    """From fixed completions and rewards to loss and gradients, as TRL's trainers have them."""
    theirs = case["settings"]
    rloo = theirs["trainer"] == "RLOOTrainer"
    kind: Advantage = "rloo" if rloo else "dr-grpo" if theirs["loss_type"] == "dr_grpo" else "grpo"
    mean = None if rloo else MEANS[theirs["loss_type"]]
    settings = settings_of(kind, mean, theirs["beta"], theirs["epsilon"], theirs.get("epsilon_high"))
    advantages = group_advantages(REWARDS, kind).flatten().float()
    assert advantages.tolist() == pytest.approx(case["advantages"], rel=1e-5, abs=1e-7)
    assert 1 - have_signal(REWARDS).float().mean().item() == pytest.approx(case["without_signal"])

    policy, rows = load_model(GOLDEN / "dpo" / "policy"), golden_rows()
    logps = policy_scores(policy, rows, 1.0)[0]
    torch.testing.assert_close(logps.detach(), placed(case["logps"], rows.mask), rtol=1e-5, atol=1e-5)
    old, ref = (placed(case[name], rows.mask) for name in ("old_logps", "ref_logps"))
    batch = GroupBatch(rows, torch.arange(len(rows.lengths)), old, ref, advantages)
    counts = batch.denominators()
    terms = grpo_loss(policy, batch, settings)
    found = {name: float(term.sum.detach()) / counts[term.per] for name, term in terms.items()}
    assert found["loss"] == pytest.approx(case["loss"], rel=1e-4, abs=1e-6)
    assert found["entropy"] == pytest.approx(case["entropy"], rel=1e-5)
    assert case["clip_fraction"] > 0, "the case would say less"
    if not rloo:
        assert found["clip_fraction"] == pytest.approx(case["clip_fraction"], rel=1e-5)
    if theirs["beta"] and mean == "tokens":
        assert found["kl_loss"] == pytest.approx(case["kl"], rel=1e-4)
    loss = torch.stack([t.weight * t.sum / counts[t.per] for t in terms.values() if t.weight]).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    norms = {name: float(p.grad.norm()) for name, p in policy.named_parameters() if p.grad is not None}
    assert norms == pytest.approx(case["gradient_norms"], rel=2e-4, abs=1e-6)


def test_the_fraction_of_clipped_completions_is_trls() -> None:
    """RLOO's ratio belongs to a completion, and TRL's share is of completions."""
    for case in NUMBERS["cases"]:
        theirs = case["settings"]
        if theirs["trainer"] == "RLOOTrainer":
            mask = golden_rows().mask
            logps, old = placed(case["logps"], mask), placed(case["old_logps"], mask)
            clip = (theirs["epsilon"], theirs.get("epsilon_high", theirs["epsilon"]))
            _, clipped = policy_term(logps, old, torch.tensor(case["advantages"]), mask, "whole", clip, 7)
            assert clipped[:, 0].float().mean().item() == pytest.approx(case["clip_fraction"])


# Properties.

groups = st.lists(st.lists(st.floats(-5, 5), min_size=4, max_size=4), min_size=1, max_size=3)


@given(groups)
def test_advantages_by_their_definitions(rewards: list[list[float]]) -> None:
    tensor = torch.tensor(rewards, dtype=torch.float64)
    for row, group in enumerate(rewards):
        mean, std = statistics.fmean(group), statistics.stdev(group)
        for column, reward in enumerate(group):
            others = statistics.fmean(group[:column] + group[column + 1 :])
            for kind, expected in (
                ("grpo", (reward - mean) / (std + 1e-4)),
                ("dr-grpo", reward - mean),
                ("rloo", reward - others),
            ):
                found = group_advantages(tensor, kind)[row, column].item()  # type: ignore[arg-type]
                assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_equal_rewards_are_no_signal() -> None:
    rewards = torch.tensor([[0.1, 0.1, 0.1], [0.0, 0.0, 1e-9], [1.0, 1.0, 1.0]], dtype=torch.float64)
    assert have_signal(rewards).tolist() == [False, True, False]
    for kind in ("grpo", "dr-grpo", "rloo"):
        assert not group_advantages(rewards[[2]], kind).any()  # type: ignore[arg-type]


MASK = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()


def test_means_by_hand() -> None:
    """Completions of 3, 1 and 5 tokens that say 1, 2 and 3 each."""
    x = torch.tensor([1.0, 2.0, 3.0])[:, None].expand(3, 5)
    noise = torch.where(MASK, x, torch.nan)
    expected = {"tokens": 20 / 9, "completions": 6 / 3, "length": 20 / 10 / 3, "whole": 20 / 3}
    for mean, value in expected.items():
        term = term_of(noise, MASK, mean, 10)  # type: ignore[arg-type]
        assert float(term.sum) / {"tokens": 9, "completions": 3}[term.per] == pytest.approx(value)
    assert [mean_of(kind, None) for kind in ("grpo", "dr-grpo", "rloo")] == ["tokens", "length", "whole"]
    assert mean_of("rloo", "tokens") == "tokens"


def test_the_upper_bound_of_a_ratio_is_its_own() -> None:
    """A good token that became 25% likelier learns under 1.28, not under 1.2; a bad one at 0.75 never."""
    logps = torch.log(torch.tensor([[1.25], [0.75]])).requires_grad_()
    mask, old = torch.ones(2, 1, dtype=torch.bool), torch.zeros(2, 1)
    for high, learns in ((0.2, False), (0.28, True)):
        term, clipped = policy_term(logps, old, torch.tensor([1.0, -1.0]), mask, "tokens", (0.2, high), 1)
        (gradient,) = torch.autograd.grad(term.sum, logps)
        assert gradient[:, 0].tolist() == pytest.approx([-1.25 if learns else 0.0, 0.0])
        assert clipped[:, 0].tolist() == [not learns, True]


@pytest.mark.parametrize("mean", ["tokens", "completions", "length", "whole"])
def test_at_the_old_policy_it_is_the_policy_gradient(mean: Mean) -> None:
    """Where the ratio is 1 the gradient is that of -A log pi, averaged in the same way (Williams 1992)."""
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(3, 5, generator=generator)
    advantages = torch.tensor([0.5, -1.0, 2.0])
    logps = old.clone().requires_grad_()
    term, clipped = policy_term(logps, old, advantages, MASK, mean, (0.2, 0.2), 10)
    (gradient,) = torch.autograd.grad(term.sum, logps)
    again = old.clone().requires_grad_()
    (expected,) = torch.autograd.grad(term_of(-advantages[:, None] * again, MASK, mean, 10).sum, again)
    torch.testing.assert_close(gradient, expected)
    assert not clipped.any()


def test_the_gradient_of_the_kl_is_that_of_the_divergence() -> None:
    """Over all tokens there are, weighted as the old policy draws them: the term is KL(pi || pi_0), and so is
    its gradient, wherever pi is."""
    generator = torch.Generator().manual_seed(1)
    scores, old, ref = (torch.randn(1, 30, generator=generator, dtype=torch.float64) for _ in range(3))
    old, ref = old.log_softmax(-1), ref.log_softmax(-1)

    def gradient_of(divergence: Any) -> tuple[float, Tensor]:
        own = scores.clone().requires_grad_()
        value = divergence(own.log_softmax(-1))
        return value.item(), torch.autograd.grad(value, own)[0]

    def sampled(logps: Tensor) -> Tensor:
        columns = [x.T for x in (logps, old, ref)]  # each token a row, of one place
        ones = torch.ones(30, 1, dtype=torch.bool)
        each = [kl_term(*(c[[i]] for c in columns), ones[[i]], "tokens", 1, 1.0).sum for i in range(30)]
        return (old.exp()[0] * torch.stack(each)).sum()

    value, gradient = gradient_of(sampled)
    exact, expected = gradient_of(lambda logps: (logps.exp() * (logps - ref)).sum())
    assert value == pytest.approx(exact)
    torch.testing.assert_close(gradient, expected)
