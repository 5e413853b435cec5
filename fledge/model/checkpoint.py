"""Model directories in Hugging Face's layout: safetensors and JSON, nothing that executes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fledge.errors import UserError
from fledge.files import write_json
from fledge.model.config import ModelConfig
from fledge.model.transformer import CausalLM
from fledge.types import ModelFiles


def weights_of(model: CausalLM) -> dict[str, Tensor]:
    """The model's tensors under Hugging Face's names; a tied head is left out."""
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def save_model(
    directory: Path,
    model: CausalLM,
    tokenizer: ModelFiles,
    lineage: dict[str, Any],
    eos_ids: list[int],
) -> None:
    """Write a whole model directory into the existing folder `directory` (see `new_directory`)."""
    config = {
        **model.config.to_dict(),
        "eos_token_id": eos_ids[0],
        "pad_token_id": None,
        "bos_token_id": None,
    }
    write_json(directory / "config.json", config)
    save_file(weights_of(model), directory / "model.safetensors", metadata={"format": "pt"})
    generation = {"eos_token_id": eos_ids if len(eos_ids) > 1 else eos_ids[0], "do_sample": False}
    write_json(directory / "generation_config.json", generation)
    tokenizer.save(directory)
    write_json(directory / "lineage.json", lineage)
    (directory / "README.md").write_text(_model_card(model, lineage), encoding="utf-8")


def load_model(directory: Path, dtype: torch.dtype = torch.float32) -> CausalLM:
    """Load a model directory; raises UserError that names the file and tensor at fault."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such model directory")
    config = ModelConfig.load(directory)
    with torch.device("meta"):
        model = CausalLM(config)
    weights = {name: tensor.to(dtype) for name, tensor in read_weights(directory).items()}
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights.get("model.embed_tokens.weight", torch.empty(0))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in expected.items():
        if name not in weights:
            raise UserError(f"{directory}: the weights have no tensor {name}, which config.json calls for")
        if tuple(weights[name].shape) != shape:
            found = tuple(weights[name].shape)
            raise UserError(f"{directory}: tensor {name} has shape {found}, config.json calls for {shape}")
    unknown = sorted(
        name for name in weights if name not in expected and not name.endswith("rotary_emb.inv_freq")
    )
    if unknown:
        raise UserError(
            f"{directory}: the weights hold {unknown[0]}, which a {config.model_type} model does not have"
        )
    model.load_state_dict({name: weights[name] for name in expected}, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(True)


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of `model.safetensors`, or of the shards that its index names."""
    index = directory / "model.safetensors.index.json"
    files = [directory / "model.safetensors"]
    if index.exists():
        try:
            files = [
                directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: not a valid shard index ({error!r})") from None
    weights: dict[str, Tensor] = {}
    for file in files:
        if not file.exists():
            raise UserError(f"{file}: no such file; a model directory keeps its weights there")
        try:
            with safe_open(file, framework="pt") as handle:
                weights.update({name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{file}: not a readable safetensors file ({error}); copy it again") from None
    return weights


def eos_ids_of(directory: Path) -> list[int]:
    """The ids that end a generation, from `generation_config.json` or `config.json`."""
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        if not path.exists():
            continue
        try:
            value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError):
            raise UserError(f"{path}: not valid JSON") from None
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(type(token_id) is int for token_id in ids):
                raise UserError(f"{path}: eos_token_id = {value!r} is not a token id or a list of them")
            return ids
    return []


def _model_card(model: CausalLM, lineage: dict[str, Any]) -> str:
    config = model.config
    rows = {
        "stage": lineage.get("stage", "?"),
        "parent": lineage.get("parent") or "none (trained from scratch)",
        "family": config.model_type,
        "parameters": f"{model.num_parameters():,}",
        "layers x width": f"{config.num_hidden_layers} x {config.hidden_size}",
        "vocabulary": f"{config.vocab_size:,}",
        "context": f"{config.max_position_embeddings:,} tokens",
        "training tokens": f"{lineage.get('tokens', 0):,}",
        "made with": f"fledge {lineage.get('fledge_version', '?')}",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [fledge]\n---\n\n"
        f"# A {lineage.get('stage', '')} model\n\n| | |\n|---|---|\n{table}\n\n"
        "`lineage.json` beside this file holds the configuration and data fingerprints it was made from.\n"
    )
