"""Matrix products with weights of 8 and 4 bits, for a CPU: fewer bytes to read for each token.

`int8` rounds each output's weights to 255 steps, and each input row to as many: FBGEMM multiplies integers,
and has only kernels that do. An input row has a scale of its own, so its result does not depend on the rows
beside it. `int4` rounds weights only, to 16 steps between the least and the greatest of each group.

Shape suffixes: N rows, I inputs, O outputs, G groups of a row, K weights of a group.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.errors import UserError

# Weights that share a scale and an offset in int4 (the kernel's smallest), and what the outputs' number must
# be a multiple of.
GROUP_WEIGHTS = 32
OUTPUT_BLOCK = 64
# Steps of an input on each side of zero, and zero itself as an unsigned byte. Without VNNI two products of
# bytes are added in 16 bits: inputs of at most 127 cannot overflow them.
_VNNI_STEPS, _OTHER_STEPS = (127, 128), (63, 64)


def int8_product(weight_OI: Tensor, bias_O: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x -> x @ w.T + b, fp32. Raises UserError where PyTorch has no FBGEMM."""
    weight_OI = weight_OI.float()
    scale_O = (weight_OI.abs().amax(1) / 127).clamp(min=1e-12)
    rounded_OI = (weight_OI / scale_O[:, None]).round().to(torch.int8)
    try:
        packed = _packed(rounded_OI, scale_O)
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    except (AttributeError, NotImplementedError, RuntimeError):
        raise UserError(
            "--quantize int8: this processor or PyTorch has no such kernels; leave it out"
        ) from None
    steps, zero = _VNNI_STEPS if torch.cpu._is_vnni_supported() else _OTHER_STEPS

    def int8(x_NI: Tensor) -> Tensor:
        x_NI = x_NI.float()
        largest_N1 = x_NI.abs().amax(1, keepdim=True).clamp(min=1e-30)
        out_NO: Tensor = multiply(x_NI / largest_N1, 1 / steps, zero, packed).mul_(largest_N1)
        return out_NO if bias_O is None else out_NO + bias_O

    return int8


def _packed(rounded_OI: Tensor, scale_O: Tensor) -> torch.ScriptObject:
    """Integers as FBGEMM reads them. PyTorch warns that tensors with a scale will go."""
    zeros_O = torch.zeros(len(scale_O), dtype=torch.int64)
    engine = torch.backends.quantized.engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.quantized.engine = "fbgemm"
        try:
            whole = torch._make_per_channel_quantized_tensor(rounded_OI, scale_O.double(), zeros_O, 0)
            return torch.ops.quantized.linear_prepack(whole, None)  # type: ignore[no-any-return]
        finally:
            torch.backends.quantized.engine = engine


def int4_product(weight_OI: Tensor, bias_O: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x -> x @ w.T + b, fp32; x is rounded to bf16. Raises UserError where PyTorch has no such kernel."""
    outputs, inputs = weight_OI.shape
    extra_inputs = -inputs % GROUP_WEIGHTS
    padded_OI = F.pad(weight_OI.float(), (0, extra_inputs, 0, -outputs % OUTPUT_BLOCK))
    weight_OGK = padded_OI.view(len(padded_OI), -1, GROUP_WEIGHTS)
    least_OG, most_OG = weight_OGK.aminmax(dim=2)
    scale_OG = ((most_OG - least_OG) / 15).clamp(min=1e-9)
    # The kernel computes (step - 8) * scale + offset, both in bf16.
    scale_OG, offset_OG = scale_OG.bfloat16(), (least_OG + 8 * scale_OG).bfloat16()
    steps_OGK = ((weight_OGK - offset_OG.float()[..., None]) / scale_OG.float()[..., None]).round() + 8
    steps_OI = steps_OGK.clamp(0, 15).to(torch.int32).flatten(1)
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(steps_OI, 1)
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    except (AttributeError, NotImplementedError, RuntimeError):
        raise UserError("--quantize int4: this PyTorch has no such kernels; leave it out") from None
    scales_GO2 = torch.stack([scale_OG, offset_OG], dim=-1).transpose(0, 1).contiguous()

    def int4(x_NI: Tensor) -> Tensor:
        x_NI = F.pad(x_NI.bfloat16(), (0, extra_inputs)) if extra_inputs else x_NI.bfloat16()
        out_NO: Tensor = multiply(x_NI, packed, GROUP_WEIGHTS, scales_GO2)[:, :outputs].float()
        return out_NO if bias_O is None else out_NO + bias_O

    return int4
