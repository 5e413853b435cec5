"""`config.json`: the shape of a model, in Hugging Face's names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fledge.errors import UserError
from fledge.model.rope import RopeScaling, read_rope

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
FULL, SLIDING = "full_attention", "sliding_attention"

# Options that change the mathematics, and the values that are implemented.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0, None),
    "quantization_config": (None,),
    # Mixtures of experts
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "n_routed_experts": (None, 0),
    # Granite's, Gemma's, Cohere's and others' changes to a model of this shape
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "clip_qkv": (None,),
    "use_qk_norm": (None, False),
    "no_rope_layers": (None, []),
    "attention_chunk_size": (None,),
    "kv_lora_rank": (None,),
    "rope_interleaved": (None, False),
    "dual_chunk_attention_config": (None,),
    "add_cross_attention": (None, False),
}
# Options of some families only: another family's code would leave them unread.
_FLAGS = {"attention_bias": ("llama", "qwen3"), "mlp_bias": ("llama",)}
_WINDOWED = ("mistral", "qwen2", "qwen3")

# What `transformers` takes when a key is missing (null means: from other fields).
_DEFAULT_KEY_VALUE_HEADS = {"llama": None, "mistral": 8, "qwen2": 32, "qwen3": 32}
_DEFAULT_HEAD_DIM = {"qwen3": 128}
_DEFAULT_WINDOW, _DEFAULT_FIRST_WINDOWED_LAYER = 4096, 28

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
    """The shape of a decoder-only transformer; every field is the one of `transformers`' config.

    `layer_types` is empty where no layer has a window.
    """

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
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        _check_family(self.model_type, "config.json")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"config.json: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"config.json: head_dim {self.head_dim} is odd; rotary embeddings need pairs")
        if self.layer_types and (self.sliding_window is None or self.model_type not in _WINDOWED):
            raise UserError(f"config.json: layer_types: a {self.model_type} model here has no sliding_window")
        if self.layer_types and len(self.layer_types) != self.num_hidden_layers:
            raise UserError(
                f"config.json: layer_types names {len(self.layer_types)} layers, "
                f"num_hidden_layers is {self.num_hidden_layers}"
            )
        if self.rope_scaling is not None and self.rope_scaling.rope_type == "dynamic" and self.head_dim < 4:
            raise UserError(f"config.json: head_dim {self.head_dim} is too small for a dynamic rope")

    @property
    def has_qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head (the qwen3 family)."""
        return self.model_type == "qwen3"

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values have a bias (always in the qwen2 family)."""
        return self.attention_bias or self.model_type == "qwen2"

    def window(self, layer: int) -> int | None:
        """How many positions a token of a layer sees, itself included; None: all before it."""
        return self.sliding_window if self.layer_types and self.layer_types[layer] == SLIDING else None

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str = "config.json") -> ModelConfig:
        """Read Hugging Face's keys; raises UserError for anything that is not implemented."""
        family = _check_family(raw.get("model_type"), where)
        _check_values(raw, family, where)
        theta, scaling = read_rope(raw, where)
        window, layer_types = _read_windows(raw, family, where)
        try:
            heads = raw["num_attention_heads"]
            return cls(
                model_type=family,
                vocab_size=raw["vocab_size"],
                hidden_size=raw["hidden_size"],
                intermediate_size=raw["intermediate_size"],
                num_hidden_layers=raw["num_hidden_layers"],
                num_attention_heads=heads,
                num_key_value_heads=raw.get("num_key_value_heads", _DEFAULT_KEY_VALUE_HEADS[family]) or heads,
                head_dim=raw.get("head_dim", _DEFAULT_HEAD_DIM.get(family)) or raw["hidden_size"] // heads,
                max_position_embeddings=raw["max_position_embeddings"],
                rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
                rope_theta=theta,
                tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
                initializer_range=raw.get("initializer_range", 0.02),
                attention_bias=family != "qwen2" and bool(raw.get("attention_bias", False)),
                mlp_bias=bool(raw.get("mlp_bias", False)),
                sliding_window=window,
                layer_types=layer_types,
                rope_scaling=scaling,
            )
        except KeyError as missing:
            raise UserError(f"{where}: the key {missing} is missing") from None
        except UserError as error:
            raise UserError(str(error).replace("config.json", where, 1)) from None

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
        """The `config.json` that `transformers`, vLLM and llama.cpp's converter read.

        In the old spelling (`rope_theta`, `rope_scaling`), which old and new readers know.
        """
        own = ("model_type", "attention_bias", "mlp_bias", "sliding_window", "layer_types", "rope_scaling")
        raw = {
            "architectures": [ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            **{key: getattr(self, key) for key in self.__dataclass_fields__ if key not in own},
            "hidden_act": "silu",
            **{key: getattr(self, key) for key in ("attention_bias",) if self.model_type in _FLAGS[key]},
            "attention_dropout": 0.0,
            **{key: getattr(self, key) for key in ("mlp_bias",) if self.model_type in _FLAGS[key]},
            "use_cache": True,
            "dtype": "float32",
            "torch_dtype": "float32",
        }
        if self.model_type == "mistral":
            raw["sliding_window"] = self.sliding_window  # missing would mean 4096
        elif self.layer_types:
            raw |= {"use_sliding_window": True, "sliding_window": self.sliding_window}
            # Where the windows begin, for readers that do not know layer_types.
            raw |= {"max_window_layers": self.layer_types.index(SLIDING), "layer_types": [*self.layer_types]}
        if self.rope_scaling is not None:
            raw["rope_scaling"] = self.rope_scaling.to_dict()
        return raw


def _check_family(model_type: Any, where: str) -> str:
    if model_type not in ARCHITECTURES:
        supported = ", ".join(sorted(ARCHITECTURES))
        raise UserError(f"{where}: model_type {model_type!r} is not supported; supported: {supported}")
    return str(model_type)


def _check_values(raw: dict[str, Any], family: str, where: str) -> None:
    for key, allowed in _ONLY.items():
        if raw.get(key, allowed[0]) not in allowed:
            known = "it must be absent" if allowed[0] is None else f"only {allowed[0]!r}"
            raise UserError(f"{where}: {key} = {raw[key]!r} is not supported ({known})")
    for key, families in _FLAGS.items():
        if family == "qwen2" and key == "attention_bias":
            continue  # has biases whatever the key says
        if raw.get(key) not in ((True, False, None) if family in families else (False, None)):
            raise UserError(f"{where}: {key} = {raw[key]!r} is not supported in a {family} model")
    for key in _SIZES:
        is_whole = type(raw.get(key)) is int and raw[key] > 0
        if key in raw and not is_whole and not (key in _DERIVED and raw[key] is None):
            raise UserError(f"{where}: {key} = {raw[key]!r} is not a whole number above 0")


def _read_windows(raw: dict[str, Any], family: str, where: str) -> tuple[int | None, tuple[str, ...]]:
    """(sliding_window, layer_types) as `transformers` 5 derives them; (None, ()) if no layer has a window."""
    layers = raw.get("num_hidden_layers")
    types = raw.get("layer_types")
    if not isinstance(types, list | None) or any(kind not in (FULL, SLIDING) for kind in types or ()):
        raise UserError(f"{where}: layer_types: only {FULL} and {SLIDING} are supported")
    if family == "mistral":
        window = raw.get("sliding_window", _DEFAULT_WINDOW)
        derived = [SLIDING if window else FULL] * (layers if isinstance(layers, int) else 0)
    else:
        window = raw.get("sliding_window", _DEFAULT_WINDOW) if raw.get("use_sliding_window") else None
        first = raw.get("max_window_layers", _DEFAULT_FIRST_WINDOWED_LAYER)
        if window is not None and (type(first) is not int or first < 0):
            raise UserError(f"{where}: max_window_layers = {first!r} is not a whole number")
        derived = [SLIDING if window and i >= first else FULL for i in range(layers or 0)]
    if window is not None and (type(window) is not int or window < 1):
        raise UserError(f"{where}: sliding_window = {window!r} is not a whole number above 0")
    if family not in _WINDOWED and (raw.get("sliding_window") or raw.get("use_sliding_window")):
        raise UserError(f"{where}: sliding_window = {raw.get('sliding_window')!r}: a llama model has none")
    kinds = derived if types is None else types
    if SLIDING in kinds and window is None:
        raise UserError(f"{where}: layer_types has {SLIDING}, but there is no sliding_window in use")
    if family == "mistral" and kinds != derived:
        raise UserError(f"{where}: layer_types: a mistral model has the same in all layers, {derived[:1]}")
    return (window, tuple(kinds)) if SLIDING in kinds else (None, ())
