"""More tokens for a trained model."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor, nn

from fledge.model.transformer import CausalLM

# Standard deviation of a new row's noise, as a share of the old rows' in that dimension.
NOISE = 0.01


@torch.no_grad()
def add_token_rows(model: CausalLM, new_ids: Collection[int], generator: torch.Generator) -> None:
    """Give the ids rows in the embedding and, where it is not tied, in the head, which grow if they must.

    A new row is the mean of the rows of all other ids that the model has, plus a little noise, so that
    no two are the same. With the mean a new token gets at most about the average probability, and the
    others' scores mean what they meant; a random row may win everywhere (J. Hewitt 2021, "Initializing
    New Word Embeddings for Pretrained Language Models"). Ids between that have no token are treated alike.
    """
    old = model.config.vocab_size
    rows = sorted({*new_ids, *range(old, max(new_ids, default=0) + 1)})
    if not rows:
        return
    size = max(old, rows[-1] + 1)
    embedding, head = model.model.embed_tokens, model.lm_head
    weight = _with_rows(embedding.weight, rows, size, generator)
    tied = model.config.tie_word_embeddings
    head.weight = weight if tied else _with_rows(head.weight, rows, size, generator)
    embedding.weight = weight
    embedding.num_embeddings = head.out_features = size
    model.config = replace(model.config, vocab_size=size)


def _with_rows(weight_VC: Tensor, rows: list[int], size: int, generator: torch.Generator) -> nn.Parameter:
    is_kept = torch.ones(len(weight_VC), dtype=torch.bool)
    is_kept[[row for row in rows if row < len(weight_VC)]] = False
    kept = weight_VC[is_kept.to(weight_VC.device)].float()
    noise = torch.randn(len(rows), weight_VC.shape[1], generator=generator).to(kept.device)
    out = weight_VC.new_empty(size, weight_VC.shape[1])
    out[: len(weight_VC)] = weight_VC
    out[rows] = (kept.mean(0) + NOISE * kept.std(0) * noise).to(out.dtype)
    return nn.Parameter(out, requires_grad=weight_VC.requires_grad)
