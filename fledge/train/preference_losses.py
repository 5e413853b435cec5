"""Losses of a reward model: pure functions from rewards and a batch to named sums (see `losses`).

Shape suffixes: B rows (completions), P pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fledge.data.comparisons import ComparisonBatch
from fledge.train.losses import Term

# Ids (B, T) and the place of each row's last token (B) -> rewards (B), in fp32.
RewardForward = Callable[[Tensor, Tensor], Tensor]


def pair_nll(better_P: Tensor, worse_P: Tensor, margin_P: Tensor) -> Tensor:
    """-log sigmoid(r_better - r_worse - margin): nats, under Bradley and Terry's model (1952), of what was
    chosen; the margin as in Touvron et al. 2023 (Llama 2)."""
    return -F.logsigmoid(better_P - worse_P - margin_P)


def preference_loss(forward: RewardForward, batch: ComparisonBatch, centring: float = 0.0) -> dict[str, Term]:
    """The mean over prompts of the mean `pair_nll` of all of a prompt's pairs (Ouyang et al. 2022: ties have
    none, and all completions of a prompt go through the model at once).

    `centring` is the weight of (r_better + r_worse)^2, averaged alike, which keeps rewards around 0
    (Eisenstein et al. 2023).
    """
    rewards_B = forward(batch.input_ids, batch.last)
    better_P, worse_P = rewards_B[batch.better], rewards_B[batch.worse]
    weight_P = batch.weight
    apart_P = better_P - worse_P
    terms = {
        "loss": Term((weight_P * pair_nll(better_P, worse_P, batch.margin)).sum(), per="prompts"),
        "accuracy": Term((weight_P * (apart_P > 0)).sum(), per="prompts", weight=0.0),
        "reward_gap": Term((weight_P * apart_P).sum(), per="prompts", weight=0.0),
    }
    if centring:
        off_centre_P = (better_P + worse_P).square()
        terms["centring"] = Term((weight_P * off_centre_P).sum(), per="prompts", weight=centring)
    return terms
