"""What a step asks of a GPU: without one on the `meta` device, which has shapes and no numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from fledge.device import autocast, use_fast_products
from fledge.model.config import ModelConfig
from fledge.model.transformer import CausalLM, attend
from fledge.train import steps
from fledge.train.loop import _accumulate, _metrics
from fledge.train.losses import forward_of, next_token_loss
from fledge.train.optim import make_optimizers
from fledge.train.parallel import ALONE
from fledge.train.rollout import Padded
from fledge.train.steps import on_device
from fledge.types import Batch

SHAPE = ModelConfig("qwen3", 300, 128, 192, 2, 4, 2, 32, 64)


def batch(device: str = "cpu", segments: bool = False) -> Batch:
    ids = torch.zeros(2, 33, dtype=torch.int64, device=device)
    mask = torch.ones(2, 33, dtype=torch.bool, device=device)
    return Batch(ids, mask, torch.zeros_like(ids) if segments else None)


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_forward_and_backward_where_nothing_is_computed(checkpointed: bool, segments: bool) -> None:
    """The path of every device but a CPU, with fused attention: each weight gets a gradient of its shape."""
    with torch.device("meta"):
        model = CausalLM(SHAPE)
    model.checkpoint_activations = checkpointed
    loss = next_token_loss(forward_of(model), batch("meta", segments))["loss"].sum
    assert loss.device.type == "meta"
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape
        assert parameter.grad.device.type == "meta"


def test_no_mask_is_made_where_the_kernel_knows_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask would keep a GPU from its fastest kernel, and be as large as the scores."""
    asked: list[bool] = []
    real = F.scaled_dot_product_attention

    def noted(*args: Tensor, **more: object) -> Tensor:
        asked.append("attn_mask" not in more and more["is_causal"] is True)
        return real(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    with torch.device("meta"):
        model = CausalLM(SHAPE)
    model(batch("meta").input_ids)
    assert asked == [True, True]


def test_the_order_without_a_mask_is_that_of_the_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 16, generator=generator) for heads in (4, 2, 2))
    causal = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    torch.testing.assert_close(attend(q, k, v, None), attend(q, k, v, causal), atol=1e-6, rtol=1e-5)


def test_batches_of_batches_go_to_a_device_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned memory needs a GPU; without it, what is left is that every tensor arrives, nested ones too."""
    moved: list[bool] = []

    def pinned(tensor: Tensor) -> Tensor:
        moved.append(True)
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pinned)
    rows = Padded(torch.zeros(2, 3), torch.ones(2, 2), torch.ones(2))
    there = steps._pinned_to(rows, torch.device("meta"))
    assert isinstance(there, Padded)
    assert {tensor.device.type for tensor in vars(there).values()} == {"meta"}
    assert len(moved) == 3
    assert steps._pinned_to(batch(), torch.device("meta")).segment_ids is None


def test_fp32_stays_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    for device, dtype in (("cpu", torch.bfloat16), ("cuda", torch.float32), ("cuda", torch.bfloat16)):
        use_fast_products(torch.device(device), dtype)
    assert asked == ["high"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_on_a_gpu_waits_for_it_once(optimizer: str) -> None:
    """Nothing in forward, backward and clipping waits for the GPU; the figures are read at the end."""
    device = torch.device("cuda")
    model = CausalLM(SHAPE)
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(device)
    optimizers = make_optimizers(model, optimizer, 0.02, 0.003, 0.0)  # type: ignore[arg-type]
    forward, found = forward_of(model), []
    for _ in range(8):
        counts = batch().denominators()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with autocast(device, torch.bfloat16):
                sums = _accumulate(forward, [batch(), batch()], next_token_loss, counts, device)
            norm = clip_grad_norm_(model.parameters(), 1.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.append(_metrics(sums, norm, ALONE)["loss"])
        for one in optimizers:
            one.step()
            one.zero_grad()
    assert found[-1] < found[0]
    assert on_device(batch(), device).input_ids.is_cuda
