"""Group-relative policy optimisation: advantages and losses as pure functions.

pi is the policy, pi_old the one that sampled, pi_0 the frozen reference; log-probabilities are nats. Masks
are True for tokens that the policy made; what stands elsewhere changes nothing.
Shape suffixes: G groups (prompts), S samples of a group, B rows (completions), T tokens.

Shao et al. 2024 (GRPO), Yu et al. 2025 (DAPO), Liu et al. 2025 (Dr. GRPO), Ahmadian et al. 2024 (RLOO).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fledge.train.losses import Term
from fledge.train.ppo_losses import k3, policy_loss

Advantage = Literal["grpo", "dr-grpo", "rloo"]
Mean = Literal["tokens", "completions", "length", "whole"]


def group_advantages(rewards_GS: Tensor, kind: Advantage) -> Tensor:
    """How much better than its group a completion is (G, S), at least two in a group.

    grpo: (r - mean) / (std + 1e-4), sample standard deviation; dr-grpo: r - mean, so that groups count alike
    whatever their spread; rloo: r - the mean of the others, an unbiased baseline: dr-grpo's S / (S - 1)-fold.
    """
    centred_GS = rewards_GS - rewards_GS.mean(1, keepdim=True)
    if kind == "grpo":
        return centred_GS / (rewards_GS.std(1, keepdim=True) + 1e-4)
    if kind == "dr-grpo":
        return centred_GS
    others_GS = (rewards_GS.sum(1, keepdim=True) - rewards_GS) / (rewards_GS.shape[1] - 1)
    return rewards_GS - others_GS


def have_signal(rewards_GS: Tensor) -> Tensor:
    """Which groups tell good from bad (G): those whose rewards are not all equal."""
    return rewards_GS.amax(1) > rewards_GS.amin(1)


def mean_of(kind: Advantage, mean: Mean | None) -> Mean:
    """How a step's loss is averaged: as asked for, or as the paper of the advantage has it (grpo: DAPO's)."""
    defaults: dict[Advantage, Mean] = {"grpo": "tokens", "dr-grpo": "length", "rloo": "whole"}
    return mean or defaults[kind]


def term_of(x_BT: Tensor, mask_BT: Tensor, mean: Mean, most_tokens: int, weight: float = 1.0) -> Term:
    """Tokens' numbers as the sum that becomes a mean over the step.

    tokens: over all its tokens (DAPO); completions: over each completion's tokens, then over completions
    (GRPO as published: tokens of long ones count less); length: their sum in a completion divided by
    `most_tokens` (Dr. GRPO: no token's weight depends on a length); whole: their sum.
    """
    sums_B = torch.where(mask_BT, x_BT, 0.0).sum(1)
    if mean == "completions":
        sums_B = sums_B / mask_BT.sum(1).clamp(min=1)
    elif mean == "length":
        sums_B = sums_B / most_tokens
    return Term(sums_B.sum(), per="tokens" if mean == "tokens" else "completions", weight=weight)


def policy_term(
    logps_BT: Tensor,
    old_logps_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    mean: Mean,
    clip: tuple[float, float],
    most_tokens: int,
) -> tuple[Term, Tensor]:
    """The clipped loss -min(A rho, A clip(rho, 1 - clip[0], 1 + clip[1])), and where clipping changed it
    (B, T). rho = pi / pi_old of each token; with `whole` that of the completion, one number for all of its
    tokens (RLOO: the completion is one action)."""
    if mean == "whole":
        logps_B, old_B = (torch.where(mask_BT, x_BT, 0.0).sum(1) for x_BT in (logps_BT, old_logps_BT))
        loss_B = policy_loss(logps_B, old_B, advantages_B, *clip)
        clipped_B = loss_B.detach() > -advantages_B * torch.exp(logps_B.detach() - old_B)
        return Term(loss_B.sum(), per="completions"), clipped_B[:, None].expand_as(mask_BT)
    loss_BT = policy_loss(logps_BT, old_logps_BT, advantages_B[:, None], *clip)
    unclipped_BT = -advantages_B[:, None] * torch.exp(logps_BT.detach() - old_logps_BT)
    return term_of(loss_BT, mask_BT, mean, most_tokens), loss_BT.detach() > unclipped_BT


def kl_term(
    logps_BT: Tensor,
    old_logps_BT: Tensor,
    ref_logps_BT: Tensor,
    mask_BT: Tensor,
    mean: Mean,
    most_tokens: int,
    beta: float,
) -> Term:
    """The price of distance to pi_0, rho k3 of each token, averaged as the policy's loss is. Weighted by
    rho = pi / pi_old it is the KL of pi and not of pi_old, and so is its gradient: that of k3 alone, at
    pi = pi_old, is the gradient of KL(pi_0 || pi) (DeepSeek-V3.2, 2025)."""
    ratio_BT = torch.exp(logps_BT - old_logps_BT)
    return term_of(ratio_BT * k3(logps_BT, ref_logps_BT), mask_BT, mean, most_tokens, beta)
