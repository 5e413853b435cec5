"""Losses: pure functions from a model's output and a batch to named sums.

A loss never divides. It returns sums with the name of what each is a sum over; the loop knows the
denominators of the whole step before the first forward pass, so gradient accumulation and data
parallelism give what one big batch would.

Shape suffixes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from fledge.types import Batch

# Ids and segments of the inputs -> logits (B, T, V).
Forward = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Term:
    """A sum over tokens, sequences or pairs. Weight 0: only reported."""

    sum: Tensor
    per: str
    weight: float = 1.0


def token_nll(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Negative log-probability (B, T) of each target in nats, in fp32."""
    return F.cross_entropy(logits_BTV.float().transpose(1, 2), targets_BT, reduction="none")


def next_token_loss(forward: Forward, batch: Batch) -> dict[str, Term]:
    """Cross-entropy of the batch's targets: pretraining and supervised fine-tuning."""
    segments = None if batch.segment_ids is None else batch.segment_ids[:, :-1]
    nll_BT = token_nll(forward(batch.input_ids[:, :-1], segments), batch.input_ids[:, 1:])
    return {"loss": Term((nll_BT * batch.loss_mask[:, 1:]).sum(), per="tokens")}
