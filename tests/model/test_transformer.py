"""The model: what its parts compute, and that batching and packing change nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fledge.model.transformer as transformer
from fledge.model.config import ModelConfig
from fledge.model.rope import RopeScaling
from fledge.model.transformer import CausalLM, RMSNorm, attend, rotary_angles, rotate
from fledge.types import pad_rows

# "windows" is qwen2 with a window of 3 in every second layer, and a rope that depends on the length.
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "windows"]
ROWS = [[5, 6, 7, 8, 9, 10, 11], [12], [3, 3, 4, 1]]


def config_of(family: str, tied: bool = True) -> ModelConfig:
    if family == "windows":
        types = ("sliding_attention", "full_attention", "sliding_attention")
        scaling = RopeScaling("dynamic", 2.0)
        config = ModelConfig("qwen2", 64, 32, 48, 3, 4, 2, 8, 64, tie_word_embeddings=tied)
        return replace(config, sliding_window=3, layer_types=types, rope_scaling=scaling)
    return ModelConfig(family, 64, 32, 48, 3, 4, 2, 8, 64, tie_word_embeddings=tied)


def random_model(family: str, tied: bool = True) -> CausalLM:
    """Weights large enough that every part of the model shows in its scores."""
    model = CausalLM(config_of(family, tied))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3, generator=generator)
    return model.eval()


def full(model: CausalLM, row: list[int]) -> Tensor:
    return model(torch.tensor([row]))[0]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_packed_segments_equal_separate_rows(family: str) -> None:
    model = random_model(family)
    packed = torch.tensor([[token for row in ROWS for token in row] + [0, 0]])
    segments = torch.tensor([[i for i, row in enumerate(ROWS) for _ in row] + [-1, -1]])
    logits_TV = model(packed, segments)[0]
    start = 0
    for row in ROWS:
        expected = full(model, row)
        torch.testing.assert_close(logits_TV[start : start + len(row)], expected, atol=1e-4, rtol=1e-4)
        start += len(row)


@torch.no_grad()
def test_a_window_is_what_is_seen() -> None:
    """With one layer a token sees the window's tokens; each layer more carries window - 1 from before."""
    config = ModelConfig(
        "mistral", 64, 32, 48, 2, 4, 2, 8, 64, sliding_window=3, layer_types=("sliding_attention",) * 2
    )
    model = CausalLM(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.3, generator=generator)
    row = list(range(10, 20))
    scores = full(model, row)[9]
    for changed in range(10):
        other = full(model, [*row[:changed], 50, *row[changed + 1 :]])[9]
        assert bool((other - scores).abs().max() > 1e-6) == (changed >= 9 - 2 * 2), changed


@torch.no_grad()
def test_a_later_token_changes_no_earlier_score() -> None:
    model = random_model("qwen3")
    first, second = full(model, [1, 2, 3, 4, 5]), full(model, [1, 2, 3, 50, 60])
    torch.testing.assert_close(first[:3], second[:3], atol=1e-5, rtol=0)
    assert (first[3:] - second[3:]).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_both_attention_kernels_agree(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(family)
    longer = [[*row, b] for b, row in enumerate(ROWS, start=1)]
    lengths_B = torch.tensor([len(row) for row in ROWS])
    results = []
    for keys in (512, 0):
        monkeypatch.setattr(transformer, "EXPLICIT_ATTENTION_KEYS", keys)
        logits_BTV, rows_B = model(pad_rows(longer, 0)), torch.arange(len(ROWS))
        results.append(torch.stack([logits_BTV[rows_B, lengths_B - 1], logits_BTV[rows_B, lengths_B]]))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


def test_rms_norm_by_hand() -> None:
    norm = RMSNorm(2, eps=0.0)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0]))
    # rms of (3, 4) is sqrt(12.5)
    expected = torch.tensor([3.0, 8.0]) / math.sqrt(12.5)
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])), expected)
    assert norm(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_rotation_by_hand_and_only_distance_counts() -> None:
    config = config_of("llama")
    x = torch.zeros(1, 1, 1, 8)
    x[..., 1] = 1.0  # the second pair (1, 5) turns by position * theta^(-2/8)
    turned = rotate(x, *rotary_angles(config, torch.tensor([[3]])))[0, 0, 0]
    angle = 3 * 10_000 ** (-2 / 8)
    assert turned[1].item() == pytest.approx(math.cos(angle), abs=1e-6)
    assert turned[5].item() == pytest.approx(math.sin(angle), abs=1e-6)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))

    def product(m: int, n: int) -> float:
        q_at = rotate(q, *rotary_angles(config, torch.tensor([[m]])))
        return (q_at * rotate(k, *rotary_angles(config, torch.tensor([[n]])))).sum().item()

    assert product(5, 2) == pytest.approx(product(45, 42), abs=1e-4)
    assert abs(product(5, 2) - product(5, 4)) > 1e-3


def test_attention_by_hand() -> None:
    # Equal scores: the mean of the visible values; heads 0 and 1 share the first key-value head.
    q = torch.zeros(1, 4, 2, 2)
    k = torch.randn(1, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    v = torch.tensor([[[[1.0, 0.0], [3.0, 2.0]], [[10.0, 0.0], [30.0, 20.0]]]])
    visible = torch.tensor([[True, False], [True, True]])[None, None]
    out = attend(q, k, v, visible)
    one, ten = [[1.0, 0.0], [2.0, 1.0]], [[10.0, 0.0], [20.0, 10.0]]
    assert out.tolist() == [[one, one, ten, ten]]


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_blocks_are_the_identity_and_repeatable(family: str) -> None:
    models = [CausalLM(config_of(family, tied=False)) for _ in range(2)]
    for model in models:
        model.init_weights(torch.Generator().manual_seed(3))
    model = models[0]
    ids = torch.tensor([[1, 2, 3]])
    expected = model.lm_head(model.model.norm(model.model.embed_tokens(ids)))
    torch.testing.assert_close(model(ids), expected)
    hidden = model.model.layers[0].mlp.gate_proj.weight
    assert hidden.std().item() == pytest.approx(32**-0.5, rel=0.1)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("tied", [True, False])
def test_number_of_parameters_by_hand(tied: bool) -> None:
    attention = 32 * 4 * 8 * 2 + 32 * 2 * 8 * 2 + 2 * 8
    block = attention + 3 * 32 * 48 + 2 * 32
    embeddings = 64 * 32 * (1 if tied else 2)
    assert CausalLM(config_of("qwen3", tied)).num_parameters() == 3 * block + embeddings + 32
