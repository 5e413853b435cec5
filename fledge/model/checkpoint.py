"""Model directories in Hugging Face's layout: safetensors and JSON, nothing that executes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fledge.errors import UserError
from fledge.files import write_json
from fledge.model.config import ModelConfig
from fledge.model.heads import RewardModel
from fledge.model.transformer import CausalLM
from fledge.types import ModelFiles

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9


def weights_of(model: CausalLM | RewardModel) -> dict[str, Tensor]:
    """The model's tensors under Hugging Face's names; a tied head is left out."""
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if isinstance(model, CausalLM) and model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def save_model(
    directory: Path,
    model: CausalLM | RewardModel,
    tokenizer: ModelFiles,
    lineage: dict[str, Any],
    eos_ids: list[int],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    pad_id: int | None = None,
) -> None:
    """Write a whole model directory into the existing folder `directory` (see `new_directory`).

    The weights keep their type; beyond `max_shard_bytes` they are spread over several files. A reward model
    needs a `pad_id` that no completion ends with: transformers reads its score at the last other token.
    """
    dtype = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    config = {
        **model.config.to_dict(),
        "dtype": dtype,
        "torch_dtype": dtype,
        "eos_token_id": eos_ids[0],
        "pad_token_id": pad_id,
        "bos_token_id": None,
    }
    if isinstance(model, RewardModel):
        architecture = config["architectures"][0].replace("ForCausalLM", "ForSequenceClassification")
        config |= {"architectures": [architecture], "num_labels": 1}
        config |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    write_json(directory / "config.json", config)
    save_weights(directory, weights_of(model), max_shard_bytes)
    generation = {"eos_token_id": eos_ids if len(eos_ids) > 1 else eos_ids[0], "do_sample": False}
    write_json(directory / "generation_config.json", generation)
    tokenizer.save(directory)
    write_json(directory / "lineage.json", lineage)
    (directory / "README.md").write_text(_model_card(model, lineage), encoding="utf-8")


def save_weights(directory: Path, weights: dict[str, Tensor], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write `model.safetensors`, or numbered shards of at most that size and their index.

    A single tensor that is larger gets a shard of its own.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in weights.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in weights.values())
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def load_model(directory: Path, dtype: torch.dtype | None = torch.float32) -> CausalLM:
    """Load a model directory; raises UserError that names the file and tensor at fault.

    `dtype` None keeps the type of the file. Weights whose type stays as it is are mapped from the file:
    they take no memory of their own until they are written to.
    """
    config = _config_of(directory)
    with torch.device("meta"):
        model = CausalLM(config)
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    _fill(model, directory, dtype, tied)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(True)


def load_reward_model(directory: Path, dtype: torch.dtype | None = torch.float32) -> RewardModel:
    """Load a reward model's directory (`*ForSequenceClassification` with one label); see `load_model`."""
    config = _config_of(directory)
    if "score.weight" not in _tensor_files(directory):
        raise UserError(f"{directory}: not a reward model; `fledge reward` makes one of a language model")
    with torch.device("meta"):
        model = RewardModel(CausalLM(config))
    _fill(model, directory, dtype, [])
    return model.requires_grad_(True)


def _config_of(directory: Path) -> ModelConfig:
    if not directory.is_dir():
        raise UserError(f"{directory}: no such model directory")
    if (directory / "adapter_config.json").exists() and not (directory / "config.json").exists():
        raise UserError(f"{directory}: an adapter; `fledge merge` makes a model of it and its base")
    return ModelConfig.load(directory)


def _fill(model: CausalLM | RewardModel, directory: Path, dtype: torch.dtype | None, tied: list[str]) -> None:
    """Put a directory's tensors into a model without memory; `tied` names are not read."""
    files = _tensor_files(directory)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in tied:
        del expected[name]
        files.pop(name, None)  # some files hold it twice
    unknown = sorted(
        name for name in files if name not in expected and not name.endswith("rotary_emb.inv_freq")
    )
    if unknown == ["score.weight"]:
        raise UserError(
            f"{directory}: a reward model, which gives scores and no text; `fledge score` reads it"
        )
    if unknown:
        family = model.config.model_type
        raise UserError(f"{directory}: the weights hold {unknown[0]}, which a {family} model does not have")
    weights: dict[str, Tensor] = {}
    for name, shape in expected.items():
        if name not in files:
            raise UserError(f"{directory}: the weights have no tensor {name}, which config.json calls for")
        weights[name] = _read_tensor(files[name], name, shape)
        dtype = dtype or weights[name].dtype
        weights[name] = weights[name].to(dtype)
    if tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of `model.safetensors`, or of the shards that its index names, as they are."""
    return {name: _read_tensor(file, name) for name, file in _tensor_files(directory).items()}


def read_file(file: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file, as they are."""
    with _opened(file) as handle:
        names = list(handle.keys())
    return {name: _read_tensor(file, name) for name in names}


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Where each tensor is."""
    index, files = directory / INDEX, [directory / WEIGHTS]
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if any(Path(name).name != name for name in names):
                raise ValueError("a shard outside the directory")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: not a valid shard index ({error!r})") from None
        files = [directory / name for name in names]
    found: dict[str, Path] = {}
    for file in files:
        with _opened(file) as handle:
            found |= dict.fromkeys(handle.keys(), file)
    return found


def _read_tensor(file: Path, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """A tensor that is mapped from its file.

    The file is opened for it alone: the memory of a mapping whose tensor was converted is then given back
    at once, instead of when the whole file has been read.
    """
    with _opened(file) as handle:
        part = handle.get_slice(name)
        found = tuple(part.get_shape())
        if shape is not None and found != shape:
            raise UserError(f"{file}: tensor {name} has shape {found}, config.json calls for {shape}")
        if part.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            raise UserError(
                f"{file}: tensor {name} is of type {part.get_dtype()}; quantised weights are not supported"
            )
        tensor: Tensor = handle.get_tensor(name)
    return tensor


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    if not file.exists():
        pickles = sorted(file.parent.glob("pytorch_model*.bin"))
        hint = f" ({pickles[0].name} is not read: it could run code; convert it)" if pickles else ""
        raise UserError(f"{file}: no such file; a model directory keeps its weights there{hint}")
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except SafetensorError as error:
        raise UserError(f"{file}: not a readable safetensors file ({error}); copy it again") from None


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


def _model_card(model: CausalLM | RewardModel, lineage: dict[str, Any]) -> str:
    config = model.config
    task = "text-classification" if isinstance(model, RewardModel) else "text-generation"
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
        f"---\nlibrary_name: transformers\npipeline_tag: {task}\ntags: [fledge]\n---\n\n"
        f"# A {lineage.get('stage', '')} model\n\n| | |\n|---|---|\n{table}\n\n"
        "`lineage.json` beside this file holds the configuration and data fingerprints it was made from.\n"
    )
