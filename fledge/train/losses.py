"""Losses: pure functions from a model's output and a batch to named sums.

A loss never divides. It returns sums with the name of what each is a sum over; the loop knows the
denominators of the whole step before the first forward pass, so gradient accumulation and data
parallelism give what one big batch would.

Shape suffixes: B rows, T tokens, N tokens of all rows, C model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.device import autocast
from fledge.model.transformer import CausalLM
from fledge.types import Batch

# Ids and segments of whole rows (B, T + 1) -> nats (B, T) of every token but the first, in fp32.
# The loop compiles it as one function, so that scores over the vocabulary need not exist in memory as such.
Forward = Callable[[Tensor, Tensor | None], Tensor]

# Scores (tokens x vocabulary) that may exist at once; more are made chunk by chunk. See docs/memory.md.
WHOLE_SCORES = 2**27
CHUNK_SCORES = 2**25


TokenNll = Callable[[Tensor, Tensor, Tensor], Tensor]


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


def chunked_token_nll(hidden_BTC: Tensor, head_VC: Tensor, targets_BT: Tensor) -> Tensor:
    """`token_nll` of the scores `hidden @ head.T`, of which never more than `CHUNK_SCORES` exist.

    The backward pass makes them again, so that the head costs a third more.
    """
    kind = hidden_BTC.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_BTC.dtype
    nll_N: Tensor = _ChunkedNll.apply(hidden_BTC.flatten(0, 1), head_VC, targets_BT.flatten(), dtype)  # type: ignore[no-untyped-call]
    return nll_N.view(targets_BT.shape)


class _ChunkedNll(torch.autograd.Function):
    """(N, C), (V, C), (N,) -> (N,): log-sum-exp of a token's scores minus its target's, in fp32."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NC: Tensor, head_VC: Tensor, targets_N: Tensor, dtype: torch.dtype
    ) -> Tensor:
        lse_N = torch.empty(len(targets_N), dtype=torch.float32, device=hidden_NC.device)
        nll_N = torch.empty_like(lse_N)
        for span, scores_nV, _ in _score_chunks(hidden_NC.to(dtype), head_VC.to(dtype)):
            target_n, best_n1 = (
                scores_nV.gather(1, targets_N[span, None])[:, 0],
                scores_nV.amax(1, keepdim=True),
            )
            lse_N[span] = scores_nV.sub_(best_n1).exp_().sum(1).log_() + best_n1[:, 0]
            nll_N[span] = lse_N[span] - target_n
        ctx.save_for_backward(hidden_NC, head_VC, targets_N, lse_N)
        ctx.dtype = dtype
        return nll_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_NC, head_VC, targets_N, lse_N = ctx.saved_tensors
        d_hidden_NC = torch.empty_like(hidden_NC) if ctx.needs_input_grad[0] else None
        d_head_VC = torch.zeros_like(head_VC) if ctx.needs_input_grad[1] else None
        low_NC, low_VC = hidden_NC.to(ctx.dtype), head_VC.to(ctx.dtype)
        for span, scores_nV, low_nV in _score_chunks(low_NC, low_VC):
            # The gradient of a score is its probability, less one for the target.
            scores_nV.sub_(lse_N[span, None]).exp_()
            scores_nV.scatter_add_(1, targets_N[span, None], torch.full_like(scores_nV[:, :1], -1.0))
            low_nV.copy_(scores_nV.mul_(grad_N[span, None]))
            with torch.autocast(hidden_NC.device.type, enabled=False):
                if d_hidden_NC is not None:
                    d_hidden_NC[span] = low_nV @ low_VC
                if d_head_VC is not None and ctx.dtype == head_VC.dtype:
                    d_head_VC.addmm_(low_nV.T, low_NC[span])
                elif d_head_VC is not None:  # the sum over chunks in the weights' own type
                    d_head_VC += low_nV.T @ low_NC[span]
        return d_hidden_NC, d_head_VC, None, None


def _score_chunks(hidden_NC: Tensor, head_VC: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some tokens after the other: which, their scores (n, V) in fp32, and as much room in the type of the
    products. The memory is the same each time: freed and taken anew, it would not fit into its own gap."""
    N, V = len(hidden_NC), len(head_VC)
    size = min(N, max(1, CHUNK_SCORES // V))
    scores_nV = hidden_NC.new_empty(size, V, dtype=torch.float32)
    low_nV = scores_nV if hidden_NC.dtype == torch.float32 else hidden_NC.new_empty(size, V)
    for first in range(0, N, size):
        n = min(size, N - first)
        with torch.autocast(hidden_NC.device.type, enabled=False):
            torch.mm(hidden_NC[first : first + n], head_VC.T, out=low_nV[:n])
        scores_nV[:n].copy_(low_nV[:n])
        yield slice(first, first + n), scores_nV[:n], low_nV[:n]


def forward_of(model: CausalLM) -> Forward:
    """The `Forward` of a model; where all scores at once would be too many, they are made in chunks."""
    # The compiler would see that the backward pass makes the same scores again, and keep them.
    disable: Callable[[TokenNll], TokenNll] = torch.compiler.disable
    chunked = disable(chunked_token_nll)

    def forward(input_ids_BT: Tensor, segment_ids_BT: Tensor | None) -> Tensor:
        segments_BT = None if segment_ids_BT is None else segment_ids_BT[:, :-1]
        targets_BT = input_ids_BT[:, 1:]
        if targets_BT.numel() * model.config.vocab_size <= WHOLE_SCORES:
            return token_nll(model(input_ids_BT[:, :-1], segments_BT), targets_BT)
        hidden_BTC = model.hidden_rows(input_ids_BT[:, :-1], segments_BT)
        return chunked(hidden_BTC, model.lm_head.weight, targets_BT)

    return forward


@torch.no_grad()
def mean_loss(model: CausalLM, batches: Iterable[Batch], compute_dtype: torch.dtype) -> float:
    """Nats per target over all batches."""
    device = model.model.embed_tokens.weight.device
    total, tokens, forward = torch.zeros((), device=device), 0, forward_of(model)
    for batch in batches:
        with autocast(device, compute_dtype):
            total += next_token_loss(forward, batch.to(device))["loss"].sum
        tokens += batch.denominators()["tokens"]
    return float(total) / tokens


def next_token_loss(forward: Forward, batch: Batch) -> dict[str, Term]:
    """Cross-entropy of the batch's targets: pretraining and supervised fine-tuning."""
    nll_BT = forward(batch.input_ids, batch.segment_ids)
    return {"loss": Term((nll_BT * batch.loss_mask[:, 1:]).sum(), per="tokens")}
