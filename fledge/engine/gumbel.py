"""Gumbel noise: a sample of several without replacement is the largest of noisy log-probabilities.

Shape suffixes: K running beams, V vocabulary.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def given_maximum(noisy_KV: Tensor, maximum_K1: Tensor) -> Tensor:
    """Gumbel variables of each row, moved so that their maximum is a given number: -log(exp(-maximum) -
    exp(-present maximum) + exp(-noisy)), without overflow."""
    present_K1 = noisy_KV.amax(-1, keepdim=True)
    v_KV = maximum_K1 - noisy_KV + torch.log1p(-torch.exp(noisy_KV - present_K1))
    return maximum_K1 - v_KV.clamp(min=0) - torch.log1p(torch.exp(-v_KV.abs()))


def gumbel(seed: int, number: int, position: int, shape: tuple[int, ...]) -> Tensor:
    """Standard Gumbel noise (fp64), the same for the same arguments on every machine."""
    digest = hashlib.sha256(f"beams/{seed}/{number}/{position}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    uniform = torch.rand(shape, dtype=torch.float64, generator=generator).clamp(min=1e-300)
    return -torch.log(-torch.log(uniform))
