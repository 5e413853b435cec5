"""Which programs can read a model directory, and why not, judged from its files.

Nothing of theirs is run: what they read is known from their documentation and source (transformers 5, vLLM
0.11, llama.cpp's `convert_hf_to_gguf.py`); the tests ask `transformers` itself.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from fledge.errors import UserError
from fledge.files import read_json
from fledge.model.checkpoint import load_model, load_reward_model
from fledge.model.config import ARCHITECTURES, ModelConfig
from fledge.model.lora import adapter_config, has_adapter
from fledge.model.ngram import is_ngram
from fledge.tokenizer.bpe import Tokenizer

PROGRAMS = {"fledge": "fledge", "transformers": "transformers", "vLLM": "vllm", "llama.cpp": None}
FLASH_HEADS = (32, 64, 96, 128, 160, 192, 224, 256)


@dataclass
class Verdict:
    """Whether a program reads a directory: `no` says why not, `unsure` what decides, `notes` what to know."""

    no: list[str] = field(default_factory=list)
    unsure: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def word(self) -> str:
        """yes, no or perhaps."""
        return "no" if self.no else "perhaps" if self.unsure else "yes"


Verdicts = dict[str, Verdict]


def verdicts(directory: Path) -> tuple[str, Verdicts]:
    """What a directory holds, in words, and by program whether it reads that. Raises UserError if there is no
    such directory, or it holds no model."""
    found = {name: Verdict() for name in PROGRAMS}
    if not directory.is_dir():
        raise UserError(f"{directory}: no such model directory")
    if has_adapter(directory) and not (directory / "config.json").exists():
        _adapter(directory, found)
        return "an adapter (LoRA)", found
    if not (directory / "config.json").exists():
        raise UserError(f"{directory}: no model: it has no config.json")
    if is_ngram(directory):
        for name in ("transformers", "vLLM", "llama.cpp"):
            found[name].no.append("an n-gram model is fledge's own kind: counts, no network")
        return "an n-gram model", found
    raw = read_json(directory / "config.json")
    if not isinstance(raw, dict):
        raise UserError(f"{directory / 'config.json'}: holds no JSON object")
    is_reward = any("ForSequenceClassification" in str(name) for name in raw.get("architectures") or ())
    _weights(directory, raw, is_reward, found)
    _architecture(raw, is_reward, found)
    _tokenizer(directory, raw, is_reward, found)
    what = "a reward model" if is_reward else "a language model"
    return f"{what} of the family {raw.get('model_type')}", found


def installed() -> dict[str, str | None]:
    """The versions of the programs that are Python packages here."""
    versions: dict[str, str | None] = {}
    for name, package in PROGRAMS.items():
        try:
            versions[name] = importlib.metadata.version(package) if package else None
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _adapter(directory: Path, found: Verdicts) -> None:
    try:
        config = adapter_config(directory)
    except UserError as error:
        for verdict in found.values():
            verdict.no.append(str(error))
        return
    base = config.get("base_model_name_or_path")
    for verdict in found.values():
        verdict.notes.append(f"only together with its model, {base}; `fledge merge` makes one of both")
    found["transformers"].notes.append("needs the package peft")
    found["vLLM"].notes.append(
        f"vllm serve BASE --enable-lora --max-lora-rank {config['r']} --lora-modules NAME={directory}"
    )
    found["llama.cpp"].notes.append("through convert_lora_to_gguf.py, after the base")
    if config.get("modules_to_save"):
        for name in ("vLLM", "llama.cpp"):
            found[name].no.append(f"it also holds whole layers: modules_to_save {config['modules_to_save']}")


def _weights(directory: Path, raw: dict[str, Any], is_reward: bool, found: Verdicts) -> None:
    """Families, and what is missing, unknown or of the wrong shape among the tensors."""
    family = raw.get("model_type")
    if family not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        found["fledge"].no.append(f"config.json: model_type {family!r}; fledge has {known}")
        for name in ("transformers", "vLLM", "llama.cpp"):
            found[name].unsure.append(f"whether it has the family {family!r} is not known here")
        return
    try:
        model = (load_reward_model if is_reward else load_model)(directory, dtype=None)
    except UserError as error:
        found["fledge"].no.append(str(error))
        # What is wrong with the tensors is wrong for all; a setting that fledge lacks need not be.
        for name in ("transformers", "vLLM", "llama.cpp"):
            kind = found[name].no if "tensor" in str(error) or "safetensors" in str(error) else None
            (found[name].unsure if kind is None else kind).append(str(error))
        return
    dtype = str(next(iter(model.parameters())).dtype).removeprefix("torch.")
    if dtype == "float32":
        found["vLLM"].notes.append(
            "the weights are fp32, which --dtype auto computes in 16 bits: pass --dtype bfloat16, or float32"
        )
    found["llama.cpp"].notes.append(f"convert_hf_to_gguf.py {directory} --outtype {_gguf_type(dtype)}")
    _shape(model.config, found)


def _gguf_type(dtype: str) -> str:
    return {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}.get(dtype, "f16")


def _shape(config: ModelConfig, found: Verdicts) -> None:
    """Options of a family that some programs lack."""
    if config.model_type == "qwen3" and config.attention_bias:
        for name in ("vLLM", "llama.cpp"):
            found[name].no.append("attention_bias: its qwen3 has no bias in attention's output")
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "dynamic":
        found["llama.cpp"].no.append("rope_scaling dynamic: it has linear, llama3 and yarn")
    window = config.sliding_window
    if config.layer_types and window is not None and window < config.max_position_embeddings:
        found["llama.cpp"].unsure.append(
            f"windows: it reads this family without them, so texts beyond {window:,} tokens differ"
        )
        if len(set(config.layer_types)) > 1:
            found["vLLM"].unsure.append("windows in some layers only: its versions differ in taking that")
    if config.head_dim not in FLASH_HEADS:
        sizes = ", ".join(map(str, FLASH_HEADS))
        found["vLLM"].unsure.append(
            f"head_dim {config.head_dim}: FlashAttention has {sizes}; others need a slower kernel"
        )


def _architecture(raw: dict[str, Any], is_reward: bool, found: Verdicts) -> None:
    """The class that vLLM and llama.cpp choose by."""
    named = raw.get("architectures")
    expected = ARCHITECTURES.get(str(raw.get("model_type")))
    if not named:
        for name in ("vLLM", "llama.cpp"):
            found[name].no.append("config.json names no architectures, by which it chooses the code")
        return
    if expected is not None and not is_reward and named[0] != expected:
        for name in ("vLLM", "llama.cpp"):
            found[name].no.append(
                f"config.json: architectures {named[0]!r}; weights like these are {expected!r}"
            )
    if is_reward:
        found["transformers"].notes.append("AutoModelForSequenceClassification")
        found["vLLM"].notes.append("gives scores, not text: vllm serve MODEL --runner pooling")
        found["llama.cpp"].no.append("a reward model gives scores; it reads those of rerankers only")


def _tokenizer(directory: Path, raw: dict[str, Any], is_reward: bool, found: Verdicts) -> None:
    others = ("transformers", "vLLM", "llama.cpp")
    try:
        tokenizer = Tokenizer.load(directory)
    except UserError as error:
        for name in PROGRAMS:
            found[name].no.append(f"tokenizer: {error}")
        return
    rows = raw.get("vocab_size")
    if isinstance(rows, int) and tokenizer.vocab_size > rows:
        for verdict in found.values():
            verdict.no.append(f"the tokenizer has {tokenizer.vocab_size:,} ids, the embedding {rows:,} rows")
    if not (directory / "tokenizer.json").exists():
        found["vLLM"].notes.append("has no tokenizer.json: it is read through the older files")
    if tokenizer.chat_template is None and not is_reward:
        for name in others:
            found[name].notes.append("no chat template: it continues texts, and cannot chat")
    if (directory / "lineage.json").exists() and _is_bpe(directory):
        found["llama.cpp"].unsure.append(
            "its converter knows tokenizers by a hash of what they make of a text; one that was trained here "
            "has to be added to get_vocab_base_pre, as qwen2, whose rule for cutting words it has"
        )


def _is_bpe(directory: Path) -> bool:
    path = directory / "tokenizer.json"
    return path.exists() and isinstance(
        tokenizers.Tokenizer.from_file(str(path)).model, tokenizers.models.BPE
    )
