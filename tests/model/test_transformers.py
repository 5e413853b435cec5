"""Against transformers: equal scores, with its models here and with ours there, whole and token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fledge.engine.decoder import Decoder
from fledge.model.checkpoint import load_model, save_model
from fledge.model.config import FULL, SLIDING, ModelConfig
from fledge.model.transformer import CausalLM

pytestmark = pytest.mark.peers
transformers = pytest.importorskip("transformers")

IDS = torch.randint(0, 99, (2, 60), generator=torch.Generator().manual_seed(0))
READ_AT_ONCE = 23  # tokens before the first of them that is read alone
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
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
# Each turns some of the pairs by the old, some by the new frequencies, at the lengths of this test.
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0},
    "llama3": {
        **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    },
    "yarn": YARN,
    "yarn-all": {
        **{**YARN, "beta_fast": 16, "beta_slow": 2, "mscale": 1.2, "mscale_all_dim": 0.8},
        **{"truncate": False},
    },
    "yarn-factor": {**YARN, "attention_factor": 1.3},
    "yarn-null": {**YARN, "factor": None},
}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
MIXED = [SLIDING, FULL, SLIDING]
VARIANTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "tied": (tuple(FAMILIES), {"tie_word_embeddings": True}),
    "full-heads": (
        tuple(FAMILIES),
        {"num_key_value_heads": 4, "rope_parameters": {**DEFAULT, "rope_theta": 1e6}},
    ),
    "one-head": (tuple(FAMILIES), {"num_key_value_heads": 1, "head_dim": 12}),
    "biases": (("llama", "qwen3"), {"attention_bias": True}),
    "mlp-biases": (("llama",), {"attention_bias": True, "mlp_bias": True}),
    "window": (("mistral",), {"sliding_window": 9}),
    "no-window": (("mistral",), {"sliding_window": None}),
    "window-2": (("mistral",), {"sliding_window": 2}),
    "some-windows": (
        ("qwen2", "qwen3"),
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "windows-of-28": (("qwen2", "qwen3"), {"use_sliding_window": True, "sliding_window": 9}),
    "layer-types": (
        ("qwen2", "qwen3"),
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": MIXED},
    ),
    "unused-window": (("qwen2", "qwen3"), {"sliding_window": 5}),
    **{name: (tuple(FAMILIES), {"rope_parameters": rope}) for name, rope in ROPES.items()},
    "dynamic-beyond": (
        tuple(FAMILIES),
        {"max_position_embeddings": 32, "rope_parameters": ROPES["dynamic"]},
    ),
    "yarn-window": (("mistral",), {"sliding_window": 9, "rope_parameters": YARN}),
}
CASES = [
    pytest.param(family, change, id=f"{family}-{name}")
    for name, (families, change) in VARIANTS.items()
    for family in families
]


class NoTokenizer:
    def save(self, directory: Path) -> None:
        pass


def theirs(family: str, **change: Any) -> Any:
    config_name, model_name = FAMILIES[family]
    settings = {"tie_word_embeddings": False, "rope_parameters": DEFAULT, **SHAPE, **change}
    settings["rope_parameters"] = dict(settings["rope_parameters"])  # their config writes into it
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**settings, attn_implementation="eager")
    model = getattr(transformers, model_name)(config).eval()
    with torch.no_grad():  # norms away from 1 and biases from 0, so that leaving one out would show
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.3)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
    return model


def one_by_one(model: Any, ids: Tensor) -> Tensor:
    """Their scores after the first `READ_AT_ONCE` tokens and after each one that follows."""
    out = model(ids[:, :READ_AT_ONCE], use_cache=True)
    logits = [out.logits[:, -1]]
    for t in range(READ_AT_ONCE, ids.shape[1]):
        out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[:, -1])
    return torch.stack(logits, dim=1)


@torch.inference_mode()
def ours_one_by_one(model: CausalLM, ids: Tensor) -> Tensor:
    decoder = Decoder(model)
    cache = decoder.new_cache(ids.shape[0], ids.shape[1])
    lengths_B = torch.full((ids.shape[0],), READ_AT_ONCE)
    logits = [decoder.logits(decoder.extend(ids[:, :READ_AT_ONCE], lengths_B, cache)[:, -1])]
    logits += [decoder.step(ids[:, t], cache) for t in range(READ_AT_ONCE, ids.shape[1])]
    return torch.stack(logits, dim=1)


def check_equal(ours: CausalLM, model: Any, record: Any = None) -> None:
    """Equal scores of whole rows and token by token."""
    model.config._attn_implementation = "eager"
    # A fresh rope first: theirs remembers the longest sequence it has seen.
    stepwise = one_by_one(model, IDS)
    expected = model(IDS).logits
    assert expected.std() > 0.3  # a comparison of something
    whole, steps = ours(IDS), ours_one_by_one(ours, IDS)
    if record is not None:
        record(
            "largest_difference", float(max((whole - expected).abs().max(), (steps - stepwise).abs().max()))
        )
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(steps, stepwise, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("family", "change"), CASES)
@torch.no_grad()
def test_their_model_here(family: str, change: dict[str, Any], tmp_path: Path, record_property: Any) -> None:
    model = theirs(family, **change)
    model.save_pretrained(tmp_path)
    check_equal(load_model(tmp_path), model, record_property)


@pytest.mark.parametrize(("family", "change"), CASES)
@torch.no_grad()
def test_our_model_there(family: str, change: dict[str, Any], tmp_path: Path, record_property: Any) -> None:
    raw = {"model_type": family, "rope_parameters": DEFAULT, **SHAPE, **change}
    ours = CausalLM(ModelConfig.from_dict(raw)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in ours.named_parameters():
        parameter.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
    save_model(tmp_path, ours, NoTokenizer(), {"stage": "pretrain"}, [7, 8], max_shard_bytes=30_000)
    assert (tmp_path / "model.safetensors.index.json").exists()
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(model).__name__ == FAMILIES[family][1]
    assert model.generation_config.eos_token_id == [7, 8]
    check_equal(ours, model, record_property)
    assert load_model(tmp_path).config == ours.config


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("spelling", ["rope_type", "type"])
@torch.no_grad()
def test_the_old_spelling_of_a_rope(name: str, spelling: str, tmp_path: Path) -> None:
    """Both libraries read `rope_scaling` and a separate `rope_theta` as they read `rope_parameters`."""
    model = theirs("llama", rope_parameters=ROPES[name])
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    rope[spelling] = rope.pop("rope_type")
    raw["rope_scaling"] = rope
    path.write_text(json.dumps(raw))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)
    torch.testing.assert_close(load_model(tmp_path)(IDS), model(IDS).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("place", ["inside", "beside", "both", "nowhere"])
@pytest.mark.parametrize("name", ["llama3", "yarn"])
@torch.no_grad()
def test_places_of_the_original_length(name: str, place: str, tmp_path: Path) -> None:
    theirs("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    raw["rope_parameters"] = dict(ROPES[name])
    if place in ("beside", "nowhere"):
        del raw["rope_parameters"]["original_max_position_embeddings"]
    if place in ("beside", "both"):
        raw["original_max_position_embeddings"] = 24
    path.write_text(json.dumps(raw))
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits
    torch.testing.assert_close(load_model(tmp_path)(IDS), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_files(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs("qwen2").to(dtype).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    wide, kept = load_model(tmp_path), load_model(tmp_path, None)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert {p.dtype for p in kept.parameters()} == {dtype}
    torch.testing.assert_close(wide(IDS), model(IDS).logits, atol=1e-4, rtol=0)
    (tmp_path / "kept").mkdir()
    save_model(tmp_path / "kept", kept, NoTokenizer(), {}, [7])
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "kept", dtype="auto")
    assert again.dtype == dtype
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor.float(), wide.state_dict()[name]), name


@torch.no_grad()
def test_their_sharded_model_here(tmp_path: Path) -> None:
    model = theirs("qwen3")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    torch.testing.assert_close(load_model(tmp_path)(IDS), model(IDS).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_their_defaults_are_ours(family: str, tmp_path: Path) -> None:
    default = getattr(transformers, FAMILIES[family][0])()
    default.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    needed = {"model_type", *ModelConfig.__dataclass_fields__} - {
        *("num_key_value_heads", "head_dim", "sliding_window", "layer_types", "rms_norm_eps"),
        *("tie_word_embeddings", "initializer_range", "attention_bias", "mlp_bias"),
    }
    for raw in (written, {key: value for key, value in written.items() if key in needed}):
        ours = ModelConfig.from_dict(raw)
        for key in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"):
            assert getattr(ours, key) == getattr(default, key), key
        heads = default.num_attention_heads
        assert ours.head_dim == (getattr(default, "head_dim", None) or default.hidden_size // heads)
        assert (ours.sliding_window is None) == (
            default.sliding_window is None if family == "mistral" else True
        )
        assert ours.rope_theta == default.rope_parameters["rope_theta"]


@pytest.mark.parametrize("first", [0, 2, 3, 28])
@pytest.mark.parametrize("window", [7, None])
@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_which_layers_have_a_window(family: str, used: bool, window: int | None, first: int) -> None:
    settings = {**SHAPE, "use_sliding_window": used, "sliding_window": window, "max_window_layers": first}
    their_types = getattr(transformers, FAMILIES[family][0])(**settings).layer_types
    ours = ModelConfig.from_dict({"model_type": family, **settings})
    assert [FULL if ours.window(i) is None else SLIDING for i in range(3)] == their_types


def test_a_dynamic_rope_forgets(tmp_path: Path) -> None:
    """Theirs keeps the frequencies of the longest sequence so far; ours are those of a fresh model."""
    model = theirs("llama", max_position_embeddings=16, rope_parameters=ROPES["dynamic"])
    model.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    with torch.no_grad():
        short = model(IDS[:, :30]).logits
        model(IDS)
        assert (model(IDS[:, :30]).logits - short).abs().max() > 0.01
        ours(IDS)
        torch.testing.assert_close(ours(IDS[:, :30]), short, atol=1e-4, rtol=0)
