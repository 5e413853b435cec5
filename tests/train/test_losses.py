"""Losses: numbers by hand, and sums that the loop can divide."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fledge.train.losses import forward_of, next_token_loss, token_nll
from fledge.types import Batch


def test_nll_of_known_probabilities() -> None:
    logits = torch.tensor([[[0.5, 0.25, 0.125, 0.125], [0.1, 0.7, 0.1, 0.1]]]).log() + 3.0  # any constant
    nll = token_nll(logits, torch.tensor([[2, 1]]))
    assert nll.tolist() == [pytest.approx([math.log(8), -math.log(0.7)], abs=1e-6)]


def test_nll_is_fp32_and_stands_large_scores() -> None:
    logits = torch.tensor([[[1e4, 0.0, 0.0]]], dtype=torch.bfloat16)
    nll = token_nll(logits, torch.tensor([[1]]))
    assert nll.dtype == torch.float32
    assert nll.item() == pytest.approx(float(logits[0, 0, 0]))


def uniform(ids_BT: Tensor, segment_ids_BT: Tensor | None) -> Tensor:
    return torch.zeros(*ids_BT.shape, 10)


def test_only_targets_count() -> None:
    ids = torch.arange(10).view(2, 5)
    # The first token of a row is never predicted, whatever its mask.
    mask = torch.tensor([[True, True, False, True, False], [True, False, False, False, False]])
    (term,) = next_token_loss(forward_of(uniform), Batch(ids, mask)).values()
    assert (term.per, term.weight) == ("tokens", 1.0)
    assert term.sum.item() == pytest.approx(2 * math.log(10))
    assert Batch(ids, mask).denominators() == {"tokens": 2, "sequences": 2}


def test_position_t_predicts_token_t_plus_1() -> None:
    """A model that knows the next token loses nothing; segments reach it cut like the ids."""
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    segments = torch.tensor([[0, 0, 1, 1, 1]])

    def clairvoyant(ids_BT: Tensor, segment_ids_BT: Tensor | None) -> Tensor:
        assert ids_BT.tolist() == [[3, 1, 4, 1]]
        assert segment_ids_BT is not None
        assert segment_ids_BT.tolist() == [[0, 0, 1, 1]]
        return 100.0 * torch.nn.functional.one_hot(ids[:, 1:], 10).float()

    (term,) = next_token_loss(
        forward_of(clairvoyant), Batch(ids, torch.ones_like(ids, dtype=torch.bool), segments)
    ).values()
    assert term.sum.item() == 0.0
