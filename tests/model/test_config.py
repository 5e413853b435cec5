"""`config.json`: Hugging Face's keys in and out; what is not implemented is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fledge.errors import UserError
from fledge.model.config import ModelConfig

RAW: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_round_trip(family: str) -> None:
    config = ModelConfig(family, 300, 32, 64, 2, 4, 2, 16, 128, 1e-5, 5e5, False, 0.01)
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()


def test_defaults_are_those_of_transformers() -> None:
    llama = ModelConfig.from_dict(RAW)
    assert (llama.head_dim, llama.num_key_value_heads) == (8, 4)
    assert (llama.rms_norm_eps, llama.rope_theta, llama.tie_word_embeddings) == (1e-6, 10_000.0, False)
    assert ModelConfig.from_dict({**RAW, "model_type": "qwen3"}).head_dim == 128


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": None},
    ],
)
def test_rope_theta_in_all_its_places(rope: dict[str, Any]) -> None:
    assert ModelConfig.from_dict({**RAW, **rope}).rope_theta == 5e5


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type 'yarn'"),
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
