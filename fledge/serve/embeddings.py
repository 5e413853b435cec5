"""Texts as vectors: the mean of a model's last hidden states, of length 1.

Shape suffixes: B rows, T tokens, C model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fledge.engine.engine import Engine
from fledge.model.ngram import NgramModel
from fledge.serve.errors import ApiError
from fledge.types import pad_rows


@torch.inference_mode()
def embed(engine: Engine, rows: Sequence[Sequence[int]]) -> list[list[float]]:
    """A vector of each row of ids: the trunk's output (behind its last norm) averaged over the row, scaled to
    length 1: the product of two is their cosine similarity. Raises ApiError for an n-gram model."""
    if isinstance(engine.model, NgramModel):
        raise ApiError(400, "an n-gram model has no embeddings", "model", "wrong_model")
    ids_BT = pad_rows(rows, 0).to(engine.device)
    lengths_B = torch.tensor([len(row) for row in rows], device=engine.device)
    index_T = torch.arange(ids_BT.shape[1], device=engine.device)
    hidden_BTC = engine.decoder().hidden(ids_BT, index_T[None], (index_T[:, None] >= index_T[None])[None])
    real_BT1 = (index_T < lengths_B[:, None])[:, :, None]
    mean_BC = hidden_BTC.float().masked_fill(~real_BT1, 0.0).sum(1) / lengths_B[:, None]
    vectors_BC = mean_BC / mean_BC.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    if not bool(vectors_BC.isfinite().all()):
        raise ApiError(
            500, "the model's states are not numbers: its weights are damaged", code="broken_model"
        )
    vectors: list[list[float]] = vectors_BC.tolist()
    return vectors
