"""The decoder against the model that it was made of: each family, piece by piece, in each type of weights;
and its cache: rows of different lengths, padding, copies."""

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
from fledge.model.config import FULL, SLIDING, ModelConfig
from fledge.model.kv_cache import KVCache
from fledge.model.lora import LoRA, add_lora
from fledge.model.rope import RopeScaling
from fledge.model.transformer import CausalLM
from fledge.types import pad_rows

CONFIG = ModelConfig("llama", 64, 32, 48, 2, 4, 2, 8, 64)
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "mistral": {"model_type": "mistral", "sliding_window": 7, "layer_types": (SLIDING, SLIDING)},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 4},
    "qwen3": {"model_type": "qwen3", "sliding_window": 5, "layer_types": (FULL, SLIDING)},
    "dynamic": {"rope_scaling": RopeScaling("dynamic", 4.0), "max_position_embeddings": 16},
    "yarn": {"rope_scaling": RopeScaling("yarn", 4.0, original_max_position_embeddings=16)},
    "windows": {
        **{"model_type": "qwen2", "num_hidden_layers": 3, "sliding_window": 3},
        **{"layer_types": (SLIDING, FULL, SLIDING), "rope_scaling": RopeScaling("dynamic", 2.0)},
    },
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


# Prompts that a dynamic rope of 16 positions reads as any other.
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [3, 3, 4, 1]]
LENGTHS_B = torch.tensor([len(prompt) for prompt in PROMPTS])


def full(model: CausalLM, row: list[int]) -> torch.Tensor:
    """The model's scores (T, V) of a row that is read whole."""
    scores_TV: torch.Tensor = model(torch.tensor([row]))[0]
    return scores_TV


def read(decoder: Decoder, rows: list[list[int]], lengths_B: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """The scores (B, V) after each row's last token; what stands behind it is padding."""
    hidden_BTC = decoder.extend(pad_rows(rows, 0), lengths_B, cache)
    return decoder.logits(hidden_BTC[torch.arange(len(rows)), lengths_B - 1])


def assert_close(made: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_a_prompt_and_steps_equal_the_full_forward(case: str) -> None:
    model = random_model(**CASES[case])
    decoder = Decoder(model)
    continuation = [[20, 21, 22, 23], [24, 25, 26, 27], [28, 29, 30, 31]]
    cache = decoder.new_cache(len(PROMPTS), 16)
    logits_BV = read(decoder, PROMPTS, LENGTHS_B, cache)
    for step in range(4):
        for b, row in enumerate(PROMPTS):
            assert_close(logits_BV[b], full(model, row + continuation[b][:step])[-1])
        logits_BV = decoder.step(torch.tensor([c[step] for c in continuation]), cache)


# A dynamic rope beyond its positions turns by the length when a token was read.
@pytest.mark.parametrize("case", [name for name in CASES if name != "dynamic"])
@torch.inference_mode()
def test_reading_in_pieces_equals_reading_at_once(case: str) -> None:
    model = random_model(**CASES[case])
    decoder = Decoder(model)
    row = list(range(10, 30))
    cache = decoder.new_cache(1, len(row))  # not a slot too many
    hidden = []
    for piece in (row[:7], row[7:8], row[8:]):
        hidden.append(decoder.extend(torch.tensor([piece]), torch.tensor([len(piece)]), cache)[0])
    assert_close(decoder.logits(torch.cat(hidden)), full(model, row))


@torch.inference_mode()
def test_a_row_of_a_batch_has_the_dynamic_rope_of_its_own_length() -> None:
    decoder = Decoder(random_model(**CASES["dynamic"]))
    long, short = list(range(60)), list(range(20))
    alone_BV = read(decoder, [short], torch.tensor([20]), decoder.new_cache(1, 60))
    batch_BV = read(decoder, [short, long], torch.tensor([20, 60]), decoder.new_cache(2, 60))
    torch.testing.assert_close(batch_BV[0], alone_BV[0], atol=1e-4, rtol=0)


@torch.inference_mode()
def test_padding_past_the_end_of_the_cache_does_not_touch_its_last_slot() -> None:
    model = random_model(**CASES["qwen3"])
    decoder = Decoder(model)
    long, short = list(range(10, 17)), [40, 41]
    cache = decoder.new_cache(2, 8)
    read(decoder, [long, short], torch.tensor([7, 2]), cache)
    # The first row gets its last token, in the last slot, and three pads beyond it.
    more = [[17, 0, 0, 0], [42, 43, 44, 45]]
    logits_BV = read(decoder, more, torch.tensor([1, 4]), cache)
    assert_close(logits_BV[0], full(model, [*long, 17])[-1])
    assert_close(logits_BV[1], full(model, short + more[1])[-1])


@torch.inference_mode()
def test_cache_rows_fork_leave_and_go_back() -> None:
    model = random_model()
    decoder = Decoder(model)
    cache = decoder.new_cache(len(PROMPTS), 16)
    read(decoder, PROMPTS, LENGTHS_B, cache)
    copy = cache.fork()
    decoder.step(torch.tensor([60, 61, 62]), cache)  # does not reach the copy
    decoder.step(torch.tensor([50, 51, 52]), copy)  # nor this the cache
    logits_BV = decoder.step(torch.tensor([9, 8, 7]), cache)
    for b, (row, token) in enumerate(zip(PROMPTS, [9, 8, 7], strict=True)):
        assert_close(logits_BV[b], full(model, [*row, 60 + b, token])[-1])
    cache.truncate(LENGTHS_B)
    copy.truncate(LENGTHS_B)
    chosen = copy.select(torch.tensor([2, 0, 2]))
    for c, order in ((cache, [0, 1, 2]), (chosen, [2, 0, 2])):
        logits_BV = decoder.step(torch.tensor([9, 8, 7]), c)
        for b, (row, token) in enumerate(zip(order, [9, 8, 7], strict=True)):
            assert_close(logits_BV[b], full(model, [*PROMPTS[row], token])[-1])


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


@pytest.mark.parametrize("inputs", [32, 40, 96])
@pytest.mark.parametrize("outputs", [16, 65, 192])
def test_products_with_rounded_weights(inputs: int, outputs: int) -> None:
    """A weight is off by half a step, an input of int8 too, one of int4 by half a unit of bf16."""
    generator = torch.Generator().manual_seed(inputs)
    weight_OI = torch.randn(outputs, inputs, generator=generator)
    bias_O = torch.randn(outputs, generator=generator)
    weight_OI[3] = 0.0
    x_NI = torch.randn(5, inputs, generator=generator) * torch.tensor([[1.0], [1e-3], [50.0], [0.0], [2.0]])
    expected_NO = x_NI @ weight_OI.T + bias_O
    for dtype, steps in ((torch.int8, 254), (torch.int4, 15)):
        multiply = product([weight_OI], [bias_O], dtype)
        # int8 has one scale for an output, int4 one for 32 weights, at most twice the greatest wide.
        half_step_O1 = 2 * weight_OI.abs().amax(1, keepdim=True) / steps / 2
        input_steps = 254 if torch.cpu._is_vnni_supported() else 126
        largest_N1 = x_NI.abs().amax(1, keepdim=True)
        of_inputs_NI = largest_N1 / input_steps if dtype == torch.int8 else x_NI.abs() * 2**-8
        bound_NO = x_NI.abs().sum(1, keepdim=True) * half_step_O1.T * 1.05
        bound_NO = bound_NO + (of_inputs_NI.expand_as(x_NI) @ (weight_OI.abs() + half_step_O1).T) * 1.05
        if dtype == torch.int4:  # offsets, scales and the result are bf16
            bound_NO = bound_NO + 2**-7 * (
                x_NI.abs() @ weight_OI.abs().amax(1, keepdim=True).expand_as(weight_OI).T
            )
        made_NO = multiply(x_NI)
        assert ((made_NO - expected_NO).abs() <= bound_NO + 1e-5).all()
        # A row's result does not depend on its neighbours.
        for i in range(len(x_NI)):
            torch.testing.assert_close(multiply(x_NI[i : i + 1])[0], made_NO[i], atol=0, rtol=2**-7)


def test_rounded_weights_keep_what_a_model_says() -> None:
    model = random_model()
    ids = list(range(1, 31))
    (exact,) = Engine(model, []).score([ids])
    errors = []
    for dtype in (torch.int8, torch.int4):
        (rounded,) = Engine(model, [], compute_dtype=dtype).score([ids])
        errors.append(sum(abs(a - b) for a, b in zip(exact, rounded, strict=True)) / len(exact))
    assert 0 < errors[0] < 0.1 and errors[0] < errors[1] < 0.5


def test_a_damaged_row_stays_damaged_in_int8() -> None:
    multiply = product([torch.ones(16, 32)], [None], torch.int8)
    x_NI = torch.ones(2, 32)
    x_NI[0, 3] = math.nan
    made_NO = multiply(x_NI)
    assert made_NO[0].isnan().all() and torch.allclose(made_NO[1], torch.full((16,), 32.0))


def test_weights_that_fp16_cannot_hold() -> None:
    with pytest.raises(UserError, match=r"weight of 70,000 .*take bf16 or fp32"):
        product([torch.full((4, 4), 70_000.0)], [None], torch.float16)
