"""Proximal policy optimisation of a language model: rewards, advantages and losses as pure functions.

pi is the policy, pi_0 the frozen reference; log-probabilities are nats. Tensors of tokens are (B, T): at
place t of row b is what belongs to the token predicted there; its value is what was expected before it was
made. Masks are True for tokens that the policy made; what stands elsewhere means nothing and changes nothing.
Shape suffixes: B rows (roll-outs), T tokens.

Schulman et al. 2016 (GAE), 2017 (PPO); Ziegler et al. 2019 and Ouyang et al. 2022 (for language models);
Huang et al. 2023, "The N implementation details of RLHF with PPO".
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The mean (scalar) over the mask."""
    return torch.where(mask_BT, x_BT, 0.0).sum() / mask_BT.sum()


def whiten(x_BT: Tensor, mask_BT: Tensor, eps: float = 1e-8) -> Tensor:
    """Shifted and scaled to mean 0 and variance 1 over the mask (variance of the population, plus eps); 0
    elsewhere."""
    mean = masked_mean(x_BT, mask_BT)
    variance = masked_mean((x_BT - mean).square(), mask_BT)
    return torch.where(mask_BT, (x_BT - mean) * (variance + eps).rsqrt(), 0.0)


def k1(logps_BT: Tensor, ref_logps_BT: Tensor) -> Tensor:
    """log (pi / pi_0): of tokens drawn from pi an unbiased estimate of KL(pi || pi_0) (Schulman 2020)."""
    return logps_BT - ref_logps_BT


def k3(logps_BT: Tensor, ref_logps_BT: Tensor) -> Tensor:
    """pi_0 / pi - 1 - log (pi_0 / pi): unbiased too, never below 0, and less scattered (Schulman 2020)."""
    log_ratio_BT = ref_logps_BT - logps_BT
    return torch.expm1(log_ratio_BT) - log_ratio_BT


def token_rewards(
    logps_BT: Tensor, ref_logps_BT: Tensor, mask_BT: Tensor, scores_B: Tensor, beta: float
) -> Tensor:
    """-beta log (pi / pi_0) for each token (k1), and a row's score for its last token besides (Ziegler et al.
    2019, eq. 2): the one that ends it, if it ended."""
    rewards_BT = torch.where(mask_BT, -beta * k1(logps_BT, ref_logps_BT), 0.0)
    rows_B = torch.arange(len(scores_B), device=scores_B.device)
    return rewards_BT.index_put((rows_B, last_places(mask_BT)), scores_B, accumulate=True)


def last_places(mask_BT: Tensor) -> Tensor:
    """Where each row's last token is that the policy made (B)."""
    places_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    return torch.where(mask_BT, places_T, 0).amax(1)


def generalised_advantages(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float
) -> Tensor:
    """GAE: A_t = delta_t + gamma lambda A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t (Schulman et al. 2016),
    over the policy's own tokens, whatever stands between them; behind the last, V and A are 0."""
    advantages_BT = torch.zeros_like(values_BT)
    next_B = advantage_B = torch.zeros_like(values_BT[:, 0])
    for t in reversed(range(values_BT.shape[1])):
        on_B, value_B = mask_BT[:, t], values_BT[:, t]
        found_B = rewards_BT[:, t] + gamma * next_B - value_B + gamma * lam * advantage_B
        advantage_B, next_B = torch.where(on_B, found_B, advantage_B), torch.where(on_B, value_B, next_B)
        advantages_BT[:, t] = torch.where(on_B, found_B, 0.0)
    return advantages_BT


def policy_loss(
    logps_BT: Tensor,
    old_logps_BT: Tensor,
    advantages_BT: Tensor,
    clip: float,
    clip_high: float | None = None,
) -> Tensor:
    """max(-A rho, -A clip(rho, 1 +- `clip`)), rho = pi / pi_old (Schulman et al. 2017, eq. 7); `clip_high` is
    an upper bound of its own (Yu et al. 2025, DAPO)."""
    ratio_BT = torch.exp(logps_BT - old_logps_BT)
    clipped_BT = ratio_BT.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    return torch.maximum(-advantages_BT * ratio_BT, -advantages_BT * clipped_BT)


def value_loss(values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, clip: float) -> Tensor:
    """max((V - R)^2, (clip(V, V_old +- `clip`) - R)^2) / 2 (Huang et al. 2023)."""
    clipped_BT = values_BT.clamp(old_values_BT - clip, old_values_BT + clip)
    return torch.maximum((values_BT - returns_BT).square(), (clipped_BT - returns_BT).square()) / 2


def explained_variance(values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor) -> float:
    """1 - Var(R - V) / Var(R) over the mask: 1 is perfect, 0 no better than a constant; 0 where all returns
    are the same."""
    returns_N, errors_N = returns_BT[mask_BT], (returns_BT - values_BT)[mask_BT]
    variance = float(returns_N.var(correction=0))
    return 1 - float(errors_N.var(correction=0)) / variance if variance > 0 else 0.0


def adapted_beta(beta: float, kl: float, target: float, sequences: int, horizon: float) -> float:
    """beta (1 + clip(KL / target - 1, +-0.2) n / horizon), KL in nats a sequence, n the sequences that were
    read since beta last changed (Ziegler et al. 2019, 2.2)."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * sequences / horizon)
