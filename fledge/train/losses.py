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

# Ids and segments of whole rows (B, T + 1) -> nats (B, T) of every token but the first, in fp32.
# The loop compiles it as one function, so that scores over the vocabulary need not exist in memory as such.
Forward = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Term:
    """A sum over tokens, sequences or pairs. Weight 0: only reported."""

    sum: Tensor
    per: str
    weight: float = 1.0


def token_nll(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Negative log-probability (B, T) of each target in nats, in fp32."""
    nll_N = F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction="none")
    return nll_N.view(targets_BT.shape)


def forward_of(model: Callable[[Tensor, Tensor | None], Tensor]) -> Forward:
    """The `Forward` of a model that returns logits."""

    def forward(input_ids_BT: Tensor, segment_ids_BT: Tensor | None) -> Tensor:
        segments = None if segment_ids_BT is None else segment_ids_BT[:, :-1]
        return token_nll(model(input_ids_BT[:, :-1], segments), input_ids_BT[:, 1:])

    return forward


def next_token_loss(forward: Forward, batch: Batch) -> dict[str, Term]:
    """Cross-entropy of the batch's targets: pretraining and supervised fine-tuning."""
    nll_BT = forward(batch.input_ids, batch.segment_ids)
    return {"loss": Term((nll_BT * batch.loss_mask[:, 1:]).sum(), per="tokens")}
