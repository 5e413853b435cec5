"""Against transformers: equal scores, with its models here and with ours there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fledge.model.checkpoint import load_model, save_model
from fledge.model.config import ModelConfig
from fledge.model.transformer import CausalLM

pytestmark = pytest.mark.peers
transformers = pytest.importorskip("transformers")

IDS = torch.randint(0, 99, (2, 40), generator=torch.Generator().manual_seed(0))
SHAPE = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
}
FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
}
CASES = [
    pytest.param(family, tied, heads, theta, id=f"{family}-{tied}-{heads}-{theta:g}")
    for family in FAMILIES
    for tied, heads, theta in [(True, 2, 1e4), (False, 4, 5e5), (False, 1, 1e6)]
]


class NoTokenizer:
    def save(self, directory: Path) -> None:
        pass


def theirs(family: str, tied: bool, heads: int, theta: float) -> Any:
    config_name, model_name = FAMILIES[family]
    shape = {**SHAPE, "num_key_value_heads": heads, "tie_word_embeddings": tied}
    rope = {"rope_type": "default", "rope_theta": theta}
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**shape, rope_parameters=rope, attn_implementation="eager")
    model = getattr(transformers, model_name)(config).eval()
    with torch.no_grad():  # norms away from 1, so that leaving one out would show
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.3)
    return model


@pytest.mark.parametrize(("family", "tied", "heads", "theta"), CASES)
@torch.no_grad()
def test_their_model_here(family: str, tied: bool, heads: int, theta: float, tmp_path: Path) -> None:
    model = theirs(family, tied, heads, theta)
    model.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    expected = model(IDS).logits
    assert expected.std() > 0.3  # a comparison of something
    torch.testing.assert_close(ours(IDS), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("family", "tied", "heads", "theta"), CASES)
@torch.no_grad()
def test_our_model_there(family: str, tied: bool, heads: int, theta: float, tmp_path: Path) -> None:
    shape = {**SHAPE, "num_key_value_heads": heads}
    config = ModelConfig(model_type=family, tie_word_embeddings=tied, rope_theta=theta, **shape)
    ours = CausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in ours.parameters():
        parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2, generator=generator)
    save_model(tmp_path, ours, NoTokenizer(), {"stage": "pretrain"}, [7, 8])
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(model).__name__ == FAMILIES[family][1]
    assert model.generation_config.eos_token_id == [7, 8]
    expected = ours(IDS)
    assert expected.std() > 0.3
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-4, rtol=0)


def test_their_sharded_model_here(tmp_path: Path) -> None:
    model = theirs("qwen3", False, 2, 1e4)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path)(IDS), model(IDS).logits, atol=1e-4, rtol=0)


def test_their_defaults_are_ours(tmp_path: Path) -> None:
    for family, (config_name, _) in FAMILIES.items():
        default = getattr(transformers, config_name)()
        default.save_pretrained(tmp_path)
        ours = ModelConfig.load(tmp_path)
        for key in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"):
            assert getattr(ours, key) == getattr(default, key), (family, key)
