"""Losses: numbers by hand, and sums that the loop can divide."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fledge.train.losses
from fledge.device import can_compile
from fledge.model.config import ModelConfig
from fledge.model.transformer import CausalLM
from fledge.train.losses import chunked_token_nll, forward_of, next_token_loss, token_nll
from fledge.types import Batch

compiles = pytest.mark.skipif(not can_compile()[0], reason="no C++ compiler")


def test_nll_of_known_probabilities() -> None:
    logits = torch.tensor([[[0.5, 0.25, 0.125, 0.125], [0.1, 0.7, 0.1, 0.1]]]).log() + 3.0  # any constant
    nll = token_nll(logits, torch.tensor([[2, 1]]))
    assert nll.tolist() == [pytest.approx([math.log(8), -math.log(0.7)], abs=1e-6)]


def test_nll_is_fp32_and_stands_large_scores() -> None:
    logits = torch.tensor([[[1e4, 0.0, 0.0]]], dtype=torch.bfloat16)
    nll = token_nll(logits, torch.tensor([[1]]))
    assert nll.dtype == torch.float32
    assert nll.item() == pytest.approx(float(logits[0, 0, 0]))


class Scorer(nn.Module):
    """Takes a model's place: scores that a test makes."""

    def __init__(self, vocab_size: int, scores: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.scores = scores

    def forward(self, ids_BT: Tensor, segment_ids_BT: Tensor | None) -> Tensor:
        return self.scores(ids_BT, segment_ids_BT)


def test_only_targets_count() -> None:
    uniform = Scorer(10, lambda ids_BT, segment_ids_BT: torch.zeros(*ids_BT.shape, 10))
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

    forward = forward_of(Scorer(10, clairvoyant))
    (term,) = next_token_loss(forward, Batch(ids, torch.ones_like(ids, dtype=torch.bool), segments)).values()
    assert term.sum.item() == 0.0


VOCAB_SIZE, TOKENS = 300, 4 * 31


def gradients(
    monkeypatch: pytest.MonkeyPatch,
    chunk_tokens: int | None,
    tied: bool = True,
    bf16: bool = False,
    checkpointed: bool = False,
    compiled: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a small model, with scores whole or of so many tokens at once."""
    monkeypatch.setattr(fledge.train.losses, "WHOLE_SCORES", 10**9 if chunk_tokens is None else 0)
    monkeypatch.setattr(fledge.train.losses, "CHUNK_SCORES", VOCAB_SIZE * (chunk_tokens or 0))
    config = ModelConfig("qwen3", VOCAB_SIZE, 32, 48, 2, 2, 1, 16, 64, tie_word_embeddings=tied)
    model = CausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1, generator=generator)
    model.checkpoint_activations = checkpointed
    ids = torch.randint(VOCAB_SIZE, (4, 32), generator=generator)
    mask = torch.rand(4, 32, generator=generator) < 0.5
    forward = forward_of(model)
    if compiled:
        torch.compiler.reset()
        forward = torch.compile(forward, dynamic=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = next_token_loss(forward, Batch(ids, mask, torch.zeros_like(ids)))["loss"].sum / 60
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(
    ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]], tolerance: float
) -> None:
    """Losses, and gradients by the length of their difference."""
    torch.testing.assert_close(ours[0], theirs[0], atol=tolerance, rtol=tolerance)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in ours[1].items():
        assert gradient.dtype == torch.float32
        assert (gradient - theirs[1][name]).norm() <= tolerance * theirs[1][name].norm(), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk_tokens", [1, 37, TOKENS, 10 * TOKENS])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, tied: bool, chunk_tokens: int) -> None:
    whole = gradients(monkeypatch, None, tied)
    assert_same(gradients(monkeypatch, chunk_tokens, tied), whole, 1e-6)


def test_chunks_in_bf16_are_as_good_as_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = gradients(monkeypatch, None)
    whole, chunked = gradients(monkeypatch, None, bf16=True), gradients(monkeypatch, 37, bf16=True)
    assert_same(chunked, whole, 0.01)
    for name, gradient in exact[1].items():  # neither nearer to fp32 than the other, but for chance
        off_whole, off_chunked = ((made[1][name] - gradient).norm() for made in (whole, chunked))
        assert off_chunked < 1.2 * off_whole


def test_chunks_with_nothing_to_learn_in_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen head, and scores that nobody differentiates."""
    monkeypatch.setattr(fledge.train.losses, "CHUNK_SCORES", 50)
    hidden = torch.randn(2, 5, 4, requires_grad=True)
    head, targets = torch.randn(10, 4), torch.randint(10, (2, 5))
    chunked_token_nll(hidden, head, targets).sum().backward()
    expected = token_nll(hidden @ head.T, targets)
    (gradient,) = torch.autograd.grad(expected.sum(), hidden)
    torch.testing.assert_close(hidden.grad, gradient)
    with torch.no_grad():
        torch.testing.assert_close(chunked_token_nll(hidden, head, targets), expected)


@pytest.mark.parametrize("bf16", [False, True])
def test_checkpointed_activations_change_no_bit(monkeypatch: pytest.MonkeyPatch, bf16: bool) -> None:
    assert_same(
        gradients(monkeypatch, None, bf16=bf16, checkpointed=True),
        gradients(monkeypatch, None, bf16=bf16),
        0.0,
    )


@compiles
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # of the compiler itself
@pytest.mark.parametrize("chunk_tokens", [None, 37])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_compiled_it_is_the_same(
    monkeypatch: pytest.MonkeyPatch, chunk_tokens: int | None, checkpointed: bool, bf16: bool
) -> None:
    made = gradients(monkeypatch, chunk_tokens, bf16=bf16, checkpointed=checkpointed, compiled=True)
    assert_same(made, gradients(monkeypatch, None, bf16=bf16), 0.02 if bf16 else 2e-6)


def test_scores_over_a_large_vocabulary_never_exist_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor that any operation makes is larger than a chunk of scores, or the head."""
    monkeypatch.setattr(fledge.train.losses, "WHOLE_SCORES", 0)
    monkeypatch.setattr(fledge.train.losses, "CHUNK_SCORES", 7 * 1000)
    hidden = torch.randn(4, 16, 8, requires_grad=True)
    head, targets = torch.randn(1000, 8, requires_grad=True), torch.randint(1000, (4, 16))
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (made if isinstance(made, tuple) else [made]) if t is not None)
            return made

    with Sizes():
        chunked_token_nll(hidden, head, targets).sum().backward()
    assert 7 * 1000 in sizes
    assert max(sizes) <= 8 * 1000
