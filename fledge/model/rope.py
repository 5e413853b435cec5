"""Rotary positions beyond the trained length: the scaling variants of `config.json`, read and computed.

Linear (Chen et al. 2023), dynamic NTK, YaRN (Peng et al. 2023), and the one of Llama 3.1. The arithmetic is
fp32 in the order that `transformers` does it in: at position 100,000 a last bit of a frequency is 0.006 rad.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fledge.errors import UserError

# What each kind needs, and what it may have besides.
_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": (
        ("factor",),
        (
            *("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
            *("mscale", "mscale_all_dim", "truncate"),
        ),
    ),
}
# These have `original_max_position_embeddings`, the length before scaling.
_WITH_ORIGINAL_LENGTH = ("llama3", "yarn")


@dataclass(frozen=True)
class RopeScaling:
    """How positions beyond the trained length are reached; the names are those of `config.json`."""

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """The object `rope_scaling` of a `config.json`."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def read_rope(raw: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """`rope_theta` and the scaling of a whole `config.json`, in the old spelling (`rope_scaling`) or the new
    one (`rope_parameters`). Raises UserError that begins with `where` and names the key at fault."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: rope_scaling = {rope!r} is not an object")
    nested = next((key for key, value in rope.items() if isinstance(value, dict)), None)
    if nested is not None:
        raise UserError(f"{where}: rope_parameters.{nested}: different positions by layer are not supported")
    theta = rope.get("rope_theta", raw.get("rope_theta", 10_000.0))
    if not _is_number(theta):
        raise UserError(f"{where}: rope_theta = {theta!r} is not a number above 0")
    kind = rope.get("rope_type", rope.get("type", "default"))
    for part in (raw, rope):
        if part.get("partial_rotary_factor") not in (None, 1):
            factor = part["partial_rotary_factor"]
            raise UserError(f"{where}: partial_rotary_factor = {factor!r} is not supported (only 1)")
    if kind == "default":
        return float(theta), None
    if kind not in _KEYS:
        supported = ", ".join(["default", *_KEYS])
        raise UserError(f"{where}: rope_type {kind!r} is not supported (only {supported})")
    return float(theta), _read_scaling(raw, rope, kind, where)


def _read_scaling(raw: dict[str, Any], rope: dict[str, Any], kind: str, where: str) -> RopeScaling:
    needed, possible = _KEYS[kind]
    values = {key: rope[key] for key in (*needed, *possible) if rope.get(key) is not None}
    if kind in _WITH_ORIGINAL_LENGTH:
        # One beside the object goes before the one in it; without any, the context is the original length.
        longest = raw.get("max_position_embeddings")
        original = values.get("original_max_position_embeddings", longest)
        values["original_max_position_embeddings"] = raw.get("original_max_position_embeddings") or original
        if kind == "yarn" and "factor" in rope and rope["factor"] is None and longest:
            values["factor"] = longest / values["original_max_position_embeddings"]
    unknown = sorted(rope.keys() - {*needed, *possible, "rope_type", "type", "rope_theta"})
    if unknown and unknown != ["partial_rotary_factor"]:
        name = next(key for key in unknown if key != "partial_rotary_factor")
        # Keys of another kind are left behind by conversions and mean nothing; others might mean something.
        if not any(name in (*a, *b) for a, b in _KEYS.values()):
            raise UserError(f"{where}: {name} of a {kind} rope is not known")
    for key in needed:
        if key not in values:
            raise UserError(f"{where}: a {kind} rope needs {key}")
    for key, value in values.items():
        if key == "truncate":
            if not isinstance(value, bool):
                raise UserError(f"{where}: rope {key} = {value!r} is not true or false")
        elif not _is_number(value) and not (value == 0 and key not in needed):
            raise UserError(f"{where}: rope {key} = {value!r} is not a number above 0")
    if kind == "llama3" and values["low_freq_factor"] == values["high_freq_factor"]:
        raise UserError(f"{where}: low_freq_factor and high_freq_factor of the rope are the same")
    return RopeScaling(rope_type=kind, **values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def scaled_frequencies(
    scaling: RopeScaling, theta: float, head_dim: int, max_positions: int, lengths_B: Tensor
) -> tuple[Tensor, float]:
    """Radians per position of each pair of dimensions, and what cosines and sines are multiplied by.

    (D / 2,), or (B, 1, D / 2) for the dynamic kind, which depends on each sequence's length (`lengths_B`,
    what has been read after this pass) where that is above `max_positions`.
    """
    share = torch.arange(0, head_dim, 2, dtype=torch.float32, device=lengths_B.device) / head_dim
    if scaling.rope_type == "dynamic":
        return _dynamic(scaling, theta, head_dim, max_positions, lengths_B, share), 1.0
    inverse = 1.0 / theta**share
    if scaling.rope_type == "linear":
        return inverse / scaling.factor, 1.0
    if scaling.rope_type == "llama3":
        return _llama3(scaling, inverse), 1.0
    return _yarn(scaling, theta, head_dim, share), yarn_attention_factor(scaling)


def _dynamic(
    scaling: RopeScaling, theta: float, head_dim: int, max_positions: int, lengths_B: Tensor, share: Tensor
) -> Tensor:
    """NTK-aware: theta grows with the length, so that the slowest pair is stretched by the whole factor."""
    lengths_B11 = lengths_B.clamp(min=max_positions)[:, None, None].float()
    stretch = scaling.factor * lengths_B11 / max_positions - (scaling.factor - 1)
    return 1.0 / (theta * stretch ** (head_dim / (head_dim - 2))) ** share


def _llama3(scaling: RopeScaling, inverse: Tensor) -> Tensor:
    """Fast pairs stay, slow ones are divided by the factor, those between move from one to the other."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    original = scaling.original_max_position_embeddings
    assert low is not None and high is not None and original is not None
    waves = 2 * math.pi / inverse
    slow = waves > original / low
    between = ~(waves < original / high) & ~slow
    smooth = (original / waves - low) / (high - low)
    mixed = (1 - smooth) * inverse / scaling.factor + smooth * inverse
    return torch.where(between, mixed, torch.where(slow, inverse / scaling.factor, inverse))


def _yarn(scaling: RopeScaling, theta: float, head_dim: int, share: Tensor) -> Tensor:
    """Between the pairs that turn `beta_slow` and `beta_fast` times over the original length, a ramp."""
    original = scaling.original_max_position_embeddings
    assert original is not None

    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.beta_fast or 32), pair_that_turns(scaling.beta_slow or 1)
    if scaling.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # no division by zero
    ramp = ((torch.arange(len(share), dtype=torch.float32, device=share.device) - low) / (high - low)).clamp(
        0, 1
    )
    powers = theta**share
    keep = 1 - ramp
    return 1.0 / (scaling.factor * powers) * (1 - keep) + 1.0 / powers * keep


def yarn_attention_factor(scaling: RopeScaling) -> float:
    """The temperature of YaRN, as a factor of queries and keys alike (section 3.4 of the paper)."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return scale(scaling.mscale) / scale(scaling.mscale_all_dim)
    return scale(1.0)
