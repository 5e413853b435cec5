"""`config.json`: Hugging Face's keys in and out; what is not implemented is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fledge.errors import UserError
from fledge.model.config import FULL, SLIDING, ModelConfig
from fledge.model.rope import RopeScaling

RAW: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


SCALING = RopeScaling("yarn", 4.0, 32, attention_factor=1.2, truncate=False)


@pytest.mark.parametrize(
    "config",
    [
        *(
            ModelConfig(family, 300, 32, 64, 2, 4, 2, 16, 128, 1e-5, 5e5, False, 0.01)
            for family in ("llama", "mistral", "qwen2", "qwen3")
        ),
        ModelConfig("llama", 300, 32, 64, 2, 4, 2, 16, 128, attention_bias=True, mlp_bias=True),
        ModelConfig("qwen3", 300, 32, 64, 2, 4, 2, 16, 128, attention_bias=True, rope_scaling=SCALING),
        ModelConfig("mistral", 300, 32, 64, 2, 4, 2, 16, 128, sliding_window=8, layer_types=(SLIDING,) * 2),
        ModelConfig("qwen2", 300, 32, 64, 2, 4, 2, 16, 128, sliding_window=8, layer_types=(SLIDING, FULL)),
    ],
    ids=repr,
)
def test_round_trip(config: ModelConfig) -> None:
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()


def test_defaults_are_those_of_transformers() -> None:
    llama = ModelConfig.from_dict(RAW)
    assert (llama.head_dim, llama.num_key_value_heads) == (8, 4)
    assert (llama.rms_norm_eps, llama.rope_theta, llama.tie_word_embeddings) == (1e-6, 10_000.0, False)
    qwen3 = ModelConfig.from_dict({**RAW, "model_type": "qwen3", "num_attention_heads": 64})
    assert (qwen3.head_dim, qwen3.num_key_value_heads) == (128, 32)
    null = {"head_dim": None, "num_key_value_heads": None}
    null_qwen3 = ModelConfig.from_dict({**RAW, "model_type": "qwen3", **null})
    assert (null_qwen3.head_dim, null_qwen3.num_key_value_heads) == (8, 4)
    mistral = {**RAW, "model_type": "mistral", "num_attention_heads": 8}
    assert ModelConfig.from_dict(mistral).window(1) == 4096
    assert ModelConfig.from_dict({**mistral, "sliding_window": None}).window(1) is None


def test_qwen2_has_biases_whatever_the_key_says() -> None:
    for value in (True, False, None):
        config = ModelConfig.from_dict(
            {**RAW, "model_type": "qwen2", "num_key_value_heads": 2, "attention_bias": value}
        )
        assert config.has_qkv_bias and not config.attention_bias


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 1.0, "rope_scaling": {"rope_theta": 5e5, "type": "default"}},
    ],
)
def test_rope_theta_in_all_its_places(rope: dict[str, Any]) -> None:
    assert ModelConfig.from_dict({**RAW, **rope}).rope_theta == 5e5


MISTRAL = {"model_type": "mistral", "num_key_value_heads": 2}
QWEN2 = {"model_type": "qwen2", "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"model_type": "mixtral"}, "model_type 'mixtral'"),
        ({"model_type": "qwen3_moe"}, "model_type 'qwen3_moe'"),
        ({"attention_bias": True, **MISTRAL}, "attention_bias = True is not supported in a mistral model"),
        ({"attention_bias": "yes"}, "attention_bias = 'yes'"),
        ({"mlp_bias": True, **QWEN2}, "mlp_bias = True is not supported in a qwen2 model"),
        ({"num_local_experts": 8}, "num_local_experts = 8"),
        ({"num_experts": 8}, "num_experts = 8"),
        ({"rope_interleaved": True}, "rope_interleaved = True"),
        ({"dual_chunk_attention_config": {"chunk_size": 4}}, "dual_chunk_attention_config"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"residual_multiplier": 0.22}, "residual_multiplier = 0.22"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"sliding_window": 4096}, "sliding_window = 4096: a llama model has none"),
        ({"sliding_window": 0, **MISTRAL}, "sliding_window = 0"),
        ({"sliding_window": "x", "use_sliding_window": True, **QWEN2}, "sliding_window = 'x'"),
        ({"use_sliding_window": True, "max_window_layers": None, **QWEN2}, "max_window_layers = None"),
        ({"layer_types": ["full_attention", "sliding_attention"], **QWEN2}, "there is no sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"], **MISTRAL}, "the same in all layers"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types: only"),
        (
            {"use_sliding_window": True, "layer_types": ["sliding_attention"], **QWEN2},
            "layer_types names 1 layers, num_hidden_layers is 2",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type 'longrope'"),
        ({"rope_parameters": {"rope_type": "mrope", "mrope_section": [4]}}, "rope_type 'mrope'"),
        ({"rope_scaling": {"type": "linear"}}, "a linear rope needs factor"),
        ({"rope_scaling": {"type": "yarn"}}, "a yarn rope needs factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "a llama3 rope needs low_freq_factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 0}}, "rope factor = 0"),
        ({"rope_scaling": {"type": "dynamic", "factor": True}}, "rope factor = True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "short": 1}}, "short of a linear rope"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": 1}}, "rope truncate = 1"),
        ({"rope_scaling": 2}, "rope_scaling = 2"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.full_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"head_dim": 7}, "head_dim 7"),
        ({"vocab_size": "300"}, "vocab_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"hidden_size": None}, "hidden_size"),
        ({"rope_parameters": {"rope_theta": "much"}}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**RAW, **change}), encoding="utf-8")
    with pytest.raises(UserError) as error:
        ModelConfig.load(tmp_path)
    assert named in str(error.value)
    assert "config.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", [key for key in RAW if key != "model_type"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(UserError, match=rf"x/config\.json: the key '{key}' is missing"):
        ModelConfig.from_dict({k: v for k, v in RAW.items() if k != key}, "x/config.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"{", "not valid JSON"), (b"[]", "no JSON object"), (b'{"\xff"}', "not valid")],
)
def test_unreadable_files(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        ModelConfig.load(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)
