"""From scores to a chosen token: temperature, top-k, top-p, then one seeded draw a row.

The functions are batched, their parameters are tensors with one value a row, and their order is that
of `transformers`. A row's randomness comes from its own generator, so what a row draws depends on
its seed and number alone, never on its neighbours.

Shape suffixes: B rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fledge.errors import UserError
from fledge.types import SamplingParams

# The smallest divisor: below it a temperature would round to zero in fp32.
_MIN_TEMPERATURE = 1e-30
# A top-k that keeps every token.
_EVERY = 2**31 - 1


def validate(params: SamplingParams) -> None:
    """Raise UserError for a value that means nothing."""
    if not (math.isfinite(params.temperature) and params.temperature >= 0):
        raise UserError(f"temperature {params.temperature} is not a number >= 0; 0 is greedy")
    if params.top_k is not None and params.top_k < 1:
        raise UserError(f"top_k {params.top_k} is below 1; leave it out to consider every token")
    if params.top_p is not None and not 0 < params.top_p <= 1:
        raise UserError(f"top_p {params.top_p} is not in (0, 1]; 1 keeps every token")
    if params.max_tokens < 1:
        raise UserError(f"max_tokens {params.max_tokens} is below 1")
    if "" in params.stop:
        raise UserError("a stop string is empty; it would end every answer before its first character")


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


def draw(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """One token id a row (B,) by inverting softmax's cumulative distribution at `uniform_B` in [0, 1)."""
    cdf_BV = logits_BV.softmax(-1).cumsum(-1, dtype=torch.float64)
    total_B1 = cdf_BV[:, -1:]
    below = torch.nextafter(total_B1, torch.zeros_like(total_B1))
    # The first id whose cumulative probability exceeds the target always has a probability above zero.
    return torch.searchsorted(cdf_BV, torch.minimum(uniform_B[:, None] * total_B1, below), right=True)[:, 0]


def generator_for(seed: int, row: int) -> torch.Generator:
    """The random numbers of one request: row `row` of a call with `seed`."""
    digest = hashlib.sha256(f"sampling/{seed}/{row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


class Sampler:
    """Chooses the next token of every row of a batch; rows leave by `select`."""

    def __init__(self, params: Sequence[SamplingParams], rows: Sequence[int], device: torch.device) -> None:
        """`params` has one entry a row; `rows` are the rows' numbers in the whole request."""
        self.params = list(params)
        self.generators = [generator_for(p.seed, row) for p, row in zip(params, rows, strict=True)]
        self.device = device
        self._gather()

    def _gather(self) -> None:
        """One parameter tensor a setting; None for a setting that no row uses."""
        self.greedy_B = self._tensor([p.temperature == 0 for p in self.params], torch.bool)
        self.all_greedy = all(p.temperature == 0 for p in self.params)
        self.temperature_B = self._tensor([p.temperature or 1.0 for p in self.params], torch.float32)
        top_k, top_p = [p.top_k for p in self.params], [p.top_p or 1.0 for p in self.params]
        self.top_k_B = self._tensor([k or _EVERY for k in top_k], torch.int64) if any(top_k) else None
        self.top_p_B = self._tensor(top_p, torch.float32) if min(top_p) < 1 else None

    def _tensor(self, values: Sequence[float | bool], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only the rows at these places of the batch, in this order."""
        self.params = [self.params[i] for i in rows]
        self.generators = [self.generators[i] for i in rows]
        self._gather()

    def __call__(self, logits_BV: Tensor) -> Tensor:
        """The chosen ids (B,) for raw fp32 scores; rows of temperature 0 take the highest score."""
        best_B = logits_BV.argmax(-1)
        if self.all_greedy:
            return best_B
        warped_BV = apply_temperature(logits_BV, self.temperature_B)
        if self.top_k_B is not None:
            warped_BV = apply_top_k(warped_BV, self.top_k_B)
        if self.top_p_B is not None:
            warped_BV = apply_top_p(warped_BV, self.top_p_B)
        uniform_B = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in self.generators])
        return torch.where(self.greedy_B, best_B, draw(warped_BV, uniform_B.to(self.device)))
