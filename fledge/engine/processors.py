"""What happens to scores before a token is chosen: pure batched functions with one parameter a row.

A neutral parameter (bias 0, penalty 1 or 0, k = every token, p = 1) leaves a row exactly as it is, so a row's
result never depends on which settings its neighbours use.

Shape suffixes: B rows, V vocabulary, T tokens of the longest row, N (row, id) pairs,
W words of 32 bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

# The smallest divisor: below it a temperature would round to zero in fp32.
_MIN_TEMPERATURE = 1e-30
# A top-k that keeps every token.
EVERY = 2**31 - 1


def add_bias(logits_BV: Tensor, rows_N: Tensor, ids_N: Tensor, values_N: Tensor) -> Tensor:
    """Add a value to the score of each pair (a pair comes once); -inf bans it."""
    return logits_BV.index_put((rows_N, ids_N), logits_BV[rows_N, ids_N] + values_N)


def keep_only(logits_BV: Tensor, rows_N: Tensor, ids_N: Tensor) -> Tensor:
    """In each row that has pairs, set every other score to -inf."""
    removed_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
    removed_BV[rows_N] = True
    removed_BV[rows_N, ids_N] = False
    return logits_BV.masked_fill(removed_BV, -math.inf)


def penalise_repetition(logits_BV: Tensor, ids_BT: Tensor, lengths_B: Tensor, penalty_B: Tensor) -> Tensor:
    """Divide positive scores of the ids that a row has already by its penalty, multiply negative ones
    (Keskar et al. 2019). Row b's ids are the first `lengths_B[b]` (>= 1) of `ids_BT`."""
    real_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) < lengths_B[:, None]
    ids_BT = torch.where(real_BT, ids_BT, ids_BT[:, :1])  # an id twice is written twice, with one value
    scores_BT, penalty_B1 = logits_BV.gather(1, ids_BT), penalty_B[:, None]
    return logits_BV.scatter(
        1, ids_BT, torch.where(scores_BT < 0, scores_BT * penalty_B1, scores_BT / penalty_B1)
    )


def penalise_counts(
    logits_BV: Tensor,
    ids_BT: Tensor,
    starts_B: Tensor,
    lengths_B: Tensor,
    presence_B: Tensor,
    frequency_B: Tensor,
) -> Tensor:
    """Subtract `presence` from every id that a row has made, and `frequency` times how often it was made
    (OpenAI's definition). What a row has made are its ids from `starts_B[b]` to `lengths_B[b]`."""
    index_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    made_BT = (index_T >= starts_B[:, None]) & (index_T < lengths_B[:, None])
    ids_BT = torch.where(made_BT, ids_BT, 0)
    counts_BV = torch.zeros_like(logits_BV).scatter_add(1, ids_BT, made_BT.to(logits_BV.dtype))
    return logits_BV - frequency_B[:, None] * counts_BV - presence_B[:, None] * (counts_BV > 0)


def ban(logits_BV: Tensor, rows_N: Tensor, ids_N: Tensor) -> Tensor:
    """Set the scores of the pairs to -inf."""
    return logits_BV.index_put((rows_N, ids_N), logits_BV.new_tensor(-math.inf))


def apply_mask(logits_BV: Tensor, words_BW: Tensor) -> Tensor:
    """Set the score of every id to -inf whose bit, v % 32 of word v // 32 (int32), is 0."""
    shifts = torch.arange(8, dtype=torch.uint8, device=words_BW.device)
    bits_BV = ((words_BW.view(torch.uint8)[..., None] >> shifts) & 1).flatten(1)[:, : logits_BV.shape[1]]
    return logits_BV.masked_fill(bits_BV == 0, -math.inf)


def apply_temperature(logits_BV: Tensor, temperature_B: Tensor) -> Tensor:
    """Divide by the temperature (> 0), after a shift that keeps the quotient from overflowing."""
    shifted_BV = logits_BV - logits_BV.amax(-1, keepdim=True)
    return shifted_BV / temperature_B.clamp(min=_MIN_TEMPERATURE)[:, None]


def apply_top_k(logits_BV: Tensor, k_B: Tensor) -> Tensor:
    """Set all but the k highest scores of each row to -inf (scores equal to the k-th all stay)."""
    k_B = k_B.clamp(max=logits_BV.shape[1])
    highest_BK = logits_BV.topk(int(k_B.max()), dim=-1).values
    return logits_BV.masked_fill(logits_BV < highest_BK.gather(1, k_B[:, None] - 1), -math.inf)


def apply_top_p(logits_BV: Tensor, p_B: Tensor) -> Tensor:
    """Keep the fewest most probable tokens of each row whose probabilities sum to p or more
    (Holtzman et al. 2020), at least one; the rest become -inf."""
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    probs_BV = sorted_BV.softmax(-1)
    mass_before_BV = probs_BV.cumsum(-1) - probs_BV
    remove_BV = (mass_before_BV >= p_B[:, None]) & (p_B < 1)[:, None]
    remove_BV[:, 0] = False
    return logits_BV.masked_fill(remove_BV.scatter(1, order_BV, remove_BV), -math.inf)


def apply_min_p(logits_BV: Tensor, min_p_B: Tensor) -> Tensor:
    """Keep the tokens whose probability is at least `min_p` times that of the most probable one
    (Nguyen et al. 2024); the rest become -inf."""
    least_B1 = logits_BV.amax(-1, keepdim=True) + min_p_B.log()[:, None]
    return logits_BV.masked_fill(logits_BV < least_B1, -math.inf)


def draw(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """One token id a row (B,) by inverting softmax's cumulative distribution at `uniform_B` in [0, 1)."""
    cdf_BV = logits_BV.softmax(-1).cumsum(-1, dtype=torch.float64)
    total_B1 = cdf_BV[:, -1:]
    below = torch.nextafter(total_B1, torch.zeros_like(total_B1))
    # The first id whose cumulative probability exceeds the target always has a probability above zero.
    return torch.searchsorted(cdf_BV, torch.minimum(uniform_B[:, None] * total_B1, below), right=True)[:, 0]


def without(logits_BV: Tensor, rejected: Mapping[int, Tensor]) -> Tensor:
    """In the rows of `rejected`, the scores of what softmax's probabilities have more than these (V,): what
    is drawn from where a draft's proposal was not kept (Leviathan et al. 2023, section 2.3)."""
    rows = list(rejected)
    p_NV = logits_BV[rows].softmax(-1)
    more_NV = (p_NV - torch.stack([rejected[row] for row in rows])).clamp(min=0)
    # Nothing is left where both are the same up to rounding.
    more_NV = torch.where(more_NV.sum(-1, keepdim=True) > 0, more_NV, p_NV)
    return logits_BV.index_put((torch.tensor(rows, device=logits_BV.device),), more_NV.log())
