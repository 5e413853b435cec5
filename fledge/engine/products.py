"""Matrix products with weights that stay as they are: laid out once for the processor, and then only read.

On a CPU a product with few rows takes as long as its weights take to come from memory. oneDNN's own layout
is read at nearly the full bandwidth where the plain one leaves half of it (`bench/generate.py`), and with
many rows it is up to twice as fast; two bytes a weight are half the way of four.

Shape suffixes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.engine.quantized import int4_product, int8_product
from fledge.errors import UserError

# (N, I) of any float type -> (N, O).
Product = Callable[[Tensor], Tensor]

# What a user calls the types that weights can be held in.
WeightsName = Literal["fp32", "bf16", "fp16"]
WEIGHTS: dict[WeightsName, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

# What weights are rounded to beyond that, for speed alone.
QuantizeName = Literal["int8", "int4"]
QUANTIZED: dict[QuantizeName, torch.dtype] = {
    "int8": torch.int8,
    "int4": torch.int4,  # type: ignore[attr-defined]  # PyTorch's stubs lack it
}


def weights_type(weights: WeightsName, quantize: QuantizeName | None) -> torch.dtype:
    """What a user wants weights held in; UserError for both ways of rounding at once."""
    if quantize is None:
        return WEIGHTS[weights]
    if weights != "fp32":
        raise UserError("--quantize and --weights are two ways to round weights; give one of them")
    return QUANTIZED[quantize]


# The number of rows that oneDNN lays weights out for: good for one row as for hundreds.
_LAYOUT_ROWS = 16


def product(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], dtype: torch.dtype | None = None
) -> Product:
    """x -> [x @ w.T + b for each (w, b)], side by side; weights are held in `dtype` (None: their own).

    bf16: inputs are rounded to it too. fp16 on an x86 CPU: only weights are rounded, inputs and sums fp32.
    int8 and int4 (`quantized.py`) are for a CPU. Raises UserError for weights that fp16 cannot hold.
    """
    with torch.inference_mode():
        dtype = dtype or weights[0].dtype
        if dtype in QUANTIZED.values() and weights[0].device.type != "cpu":
            raise UserError(
                "--quantize is for a CPU, whose kernels it uses; leave it out, or take --device cpu"
            )
        if weights[0].device.type != "cpu":
            return _plain(weights, biases, dtype)
        weight_OI = torch.cat(list(weights)) if len(weights) > 1 else weights[0].detach()
        bias_O = None if biases[0] is None else torch.cat([bias for bias in biases if bias is not None])
        if dtype in QUANTIZED.values():
            quantized = int8_product if dtype == torch.int8 else int4_product
            return quantized(weight_OI, None if bias_O is None else bias_O.float())
        if dtype == torch.float16:
            return _in_fp16(weight_OI, bias_O)
        if not has_layouts(dtype):
            return _plain([weight_OI], [bias_O], dtype)
        bias_O = None if bias_O is None else bias_O.to(dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.to(dtype), _LAYOUT_ROWS)
        linear = torch.ops.mkldnn._linear_pointwise
        return lambda x_NI: linear(x_NI.to(dtype), packed, bias_O, "none", [], "")


@cache
def has_layouts(dtype: torch.dtype) -> bool:
    """Whether this PyTorch and CPU have oneDNN's products of a type; they are private, so they are tried."""
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(torch.eye(32, dtype=dtype), _LAYOUT_ROWS)
        x = torch.arange(32, dtype=dtype)[None]
        return torch.equal(torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""), x)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False


def _plain(weights: Sequence[Tensor], biases: Sequence[Tensor | None], dtype: torch.dtype) -> Product:
    """Without a layout, and without a copy where the type stays."""
    pairs = [
        (weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype))
        for weight, bias in zip(weights, biases, strict=True)
    ]
    if len(pairs) == 1:
        return lambda x_NI: F.linear(x_NI.to(dtype), *pairs[0])
    return lambda x_NI: torch.cat([F.linear(x_NI.to(dtype), *pair) for pair in pairs], dim=-1)


def _in_fp16(weight_OI: Tensor, bias_O: Tensor | None) -> Product:
    """FBGEMM's: weights are widened to fp32 on the way."""
    largest = float(weight_OI.abs().max())
    if largest > torch.finfo(torch.float16).max:
        raise UserError(f"fp16 cannot hold a weight of {largest:,.0f} in size; take bf16 or fp32")
    try:
        packed = torch.ops.quantized.linear_prepack_fp16(
            weight_OI.float(), None if bias_O is None else bias_O.float()
        )
    except (AttributeError, NotImplementedError, RuntimeError):  # no x86
        return _plain([weight_OI], [bias_O], torch.float16)
    return lambda x_NI: torch.ops.quantized.linear_dynamic_fp16(x_NI.float(), packed)
