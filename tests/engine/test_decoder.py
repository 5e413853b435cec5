"""The decoder against the model that it was made of: each family, piece by piece, in each type of weights."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

import fledge.engine.decoder
from fledge.engine import products
from fledge.engine.decoder import Decoder
from fledge.engine.engine import Engine
from fledge.engine.products import product
from fledge.errors import UserError
from fledge.model.config import SLIDING, ModelConfig
from fledge.model.lora import LoRA, add_lora
from fledge.model.rope import RopeScaling
from fledge.model.transformer import CausalLM

CONFIG = ModelConfig("llama", 64, 32, 48, 2, 4, 2, 8, 64)
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "mistral": {"model_type": "mistral", "sliding_window": 7, "layer_types": (SLIDING, SLIDING)},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 4},
    "qwen3": {"model_type": "qwen3", "sliding_window": 5, "layer_types": ("full_attention", SLIDING)},
    "dynamic": {"rope_scaling": RopeScaling("dynamic", 4.0), "max_position_embeddings": 16},
    "yarn": {"rope_scaling": RopeScaling("yarn", 4.0, original_max_position_embeddings=16)},
}
ROWS = [torch.arange(1, 31) % 61, (torch.arange(12) * 7 + 3) % 61, torch.tensor([5])]


def random_model(**changes: Any) -> CausalLM:
    model = CausalLM(dataclasses.replace(CONFIG, **changes)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            middle = float("norm" in name)
            parameter.normal_(middle, 0.25, generator=generator)
    return model


@torch.inference_mode()
def read_in_pieces(decoder: Decoder) -> list[torch.Tensor]:
    """The scores after each of the rows' tokens: pieces of 9, side by side, then each row's last alone."""
    cache = decoder.new_cache(len(ROWS), 30)
    scores: list[list[torch.Tensor]] = [[] for _ in ROWS]
    for start in range(0, 30, 9):
        pieces = [row[:-1][start : start + 9] for row in ROWS]
        lengths_B = torch.tensor([len(piece) for piece in pieces])
        ids_BT = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)
        hidden_BTC = decoder.extend(ids_BT, lengths_B, cache)
        for row, hidden_TC, length in zip(scores, hidden_BTC, lengths_B.tolist(), strict=True):
            row.append(decoder.logits(hidden_TC[:length]))
    logits_BV = decoder.step(torch.stack([row[-1] for row in ROWS]), cache)
    return [torch.cat([*row, last_V[None]]) for row, last_V in zip(scores, logits_BV, strict=True)]


@pytest.mark.parametrize("layouts", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_scores_are_the_models(case: str, layouts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not layouts:
        monkeypatch.setattr(products, "has_layouts", lambda dtype: False)
    model = random_model(**CASES[case])
    decoder = Decoder(model)
    for made_TV, row in zip(read_in_pieces(decoder), ROWS, strict=True):
        # A dynamic rope turns by the length of the sequence when a token was read.
        if case == "dynamic":
            row, made_TV = row[:9], made_TV[:9]
        with torch.no_grad():
            expected_TV = model(row[None])[0]
        torch.testing.assert_close(made_TV, expected_TV, atol=2e-5, rtol=1e-4)
        with torch.inference_mode():
            index_T = torch.arange(len(row))
            hidden_TC = decoder.hidden(row[None], index_T[None], (index_T[:, None] >= index_T)[None])[0]
            torch.testing.assert_close(decoder.logits(hidden_TC), expected_TV, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("layouts", [True, False])
def test_an_engine_reads_with_the_newest_weights(layouts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not layouts:
        monkeypatch.setattr(products, "has_layouts", lambda dtype: False)
    model = random_model()
    engine = Engine(model, [])
    engine.score([[1, 2, 3]])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert engine.score([[1, 2, 3]]) == [pytest.approx([-math.log(64)] * 2)]


def test_a_cache_of_fewer_bits_changes_little(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    plain = Engine(model, []).score([list(range(1, 31))])
    monkeypatch.setattr(fledge.engine.decoder, "cache_dtype", lambda _device, _dtype: torch.bfloat16)
    rounded = Engine(model, []).score([list(range(1, 31))])
    assert rounded != plain
    assert rounded == [pytest.approx(plain[0], abs=0.1)]


def test_adapters_are_not_passed_over() -> None:
    model = random_model()
    add_lora(model, LoRA(2, 4.0), torch.Generator())
    with pytest.raises(UserError, match="merge them first"):
        Engine(model, []).score([[1, 2]])


# What rounding a weight may cost: half a unit in the last place (fp16 has 11 bits, bf16 8, and there inputs
# and results are rounded too).
@pytest.mark.parametrize(
    ("dtype", "step"), [(torch.float32, 1e-6), (torch.float16, 2**-11), (torch.bfloat16, 2**-7)]
)
def test_products_in_each_type(dtype: torch.dtype, step: float) -> None:
    generator = torch.Generator().manual_seed(0)
    first_OI, second_OI = torch.randn(48, 64, generator=generator), torch.randn(16, 64, generator=generator)
    biases = [torch.randn(48, generator=generator), torch.randn(16, generator=generator)]
    for rows in (1, 3, 40):
        x_NI = torch.randn(rows, 64, generator=generator)
        whole_OI = torch.cat([first_OI, second_OI])
        expected_NO = x_NI @ whole_OI.T + torch.cat(biases)
        made_NO = product([first_OI, second_OI], biases, dtype)(x_NI)
        rounded_too = 2**-8 * expected_NO.abs() if dtype == torch.bfloat16 else 0.0
        bound_NO = step * (x_NI.abs() @ whole_OI.abs().T) + rounded_too + step + 1e-5
        assert ((made_NO.float() - expected_NO).abs() <= bound_NO).all()


def test_weights_that_fp16_cannot_hold() -> None:
    with pytest.raises(UserError, match=r"weight of 70,000 .*take bf16 or fp32"):
        product([torch.full((4, 4), 70_000.0)], [None], torch.float16)
