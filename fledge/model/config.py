"""`config.json`: the shape of a model, in Hugging Face's names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fledge.errors import UserError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# Options that change the mathematics and that only this value of is implemented.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "attention_dropout": (0, None),
    "pretraining_tp": (1, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, None),
}

# Sizes that other fields give when they are null or missing.
_DERIVED = ("num_key_value_heads", "head_dim")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    *_DERIVED,
)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only transformer; every field is the one of `transformers`' config."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.model_type not in ARCHITECTURES:
            raise UserError(
                f"config.json: model_type {self.model_type!r} is not supported; "
                f"supported: {', '.join(sorted(ARCHITECTURES))}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"config.json: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"config.json: head_dim {self.head_dim} is odd; rotary embeddings need pairs")

    @property
    def has_qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head (the qwen3 family)."""
        return self.model_type == "qwen3"

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str = "config.json") -> ModelConfig:
        """Read Hugging Face's keys; raises UserError for anything that is not implemented."""
        model_type = raw.get("model_type")
        if model_type not in ARCHITECTURES:
            raise UserError(
                f"{where}: model_type {model_type!r} is not supported; "
                f"supported: {', '.join(sorted(ARCHITECTURES))}"
            )
        for key, allowed in _ONLY.items():
            if raw.get(key, allowed[0]) not in allowed:
                raise UserError(f"{where}: {key} = {raw[key]!r} is not supported (only {allowed[0]!r})")
        if any(kind != "full_attention" for kind in raw.get("layer_types") or ()):
            raise UserError(f"{where}: layer_types other than full_attention are not supported")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            raise UserError(f"{where}: rope_type {rope_type!r} is not supported (only 'default')")
        if rope.get("partial_rotary_factor", 1) not in (1, None):
            raise UserError(f"{where}: partial_rotary_factor other than 1 is not supported")
        theta = rope.get("rope_theta", raw.get("rope_theta", 10_000.0))
        if not isinstance(theta, int | float) or theta <= 0:
            raise UserError(f"{where}: rope_theta = {theta!r} is not a number above 0")
        for key in _SIZES:
            is_whole = type(raw.get(key)) is int and raw[key] > 0
            if key in raw and not is_whole and not (key in _DERIVED and raw[key] is None):
                raise UserError(f"{where}: {key} = {raw[key]!r} is not a whole number above 0")
        try:
            heads = raw["num_attention_heads"]
            return cls(
                model_type=model_type,
                vocab_size=raw["vocab_size"],
                hidden_size=raw["hidden_size"],
                intermediate_size=raw["intermediate_size"],
                num_hidden_layers=raw["num_hidden_layers"],
                num_attention_heads=heads,
                num_key_value_heads=raw.get("num_key_value_heads") or heads,
                head_dim=raw.get("head_dim")
                or (128 if model_type == "qwen3" else raw["hidden_size"] // heads),
                max_position_embeddings=raw["max_position_embeddings"],
                rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
                rope_theta=float(theta),
                tie_word_embeddings=raw.get("tie_word_embeddings", False),
                initializer_range=raw.get("initializer_range", 0.02),
            )
        except KeyError as missing:
            raise UserError(f"{where}: the key {missing} is missing") from None

    @classmethod
    def load(cls, directory: Path) -> ModelConfig:
        """Read `config.json` of a model directory."""
        path = directory / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; a model directory has a config.json") from None
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error})") from None
        if not isinstance(raw, dict):
            raise UserError(f"{path}: holds no JSON object")
        return cls.from_dict(raw, where=str(path))

    def to_dict(self) -> dict[str, Any]:
        """The `config.json` that `transformers`, vLLM and llama.cpp's converter read."""
        shape = {key: getattr(self, key) for key in self.__dataclass_fields__ if key != "model_type"}
        return {
            "architectures": [ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            **shape,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            **({"mlp_bias": False} if self.model_type == "llama" else {}),
            "use_cache": True,
            "dtype": "float32",
            "torch_dtype": "float32",
        }
