"""`fledge merge`: a model and its adapter become one model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fledge.errors import UserError
from fledge.files import new_directory, read_json
from fledge.model.checkpoint import eos_ids_of, load_model, save_model
from fledge.model.heads import RewardModel
from fledge.model.lora import adapter_config, base_of, load_adapter, merge_lora
from fledge.rewards.reward_model import pad_id_of
from fledge.run import lineage
from fledge.tokenizer.bpe import Tokenizer
from fledge.train.progress import say


@dataclass(frozen=True, kw_only=True)
class Config:
    """Take an adapter (LoRA) into the weights of the model that it belongs to."""

    model: Path
    """Directory of the adapter: the model/ of a run with --lora-rank, or one that PEFT wrote."""
    base: Path | None = None
    """Model directory that it belongs to; by default the one that the adapter names."""
    out: Path
    """New directory for the merged model."""
    overwrite: bool = False
    """Replace what --out holds."""


def main(config: Config) -> None:
    """Write the merged model directory."""
    settings = adapter_config(config.model)
    base = config.base or base_of(config.model)
    if not base.is_dir():
        raise UserError(f"{base}: no such directory; give the model that the adapter belongs to with --base")
    if config.out.exists() and config.overwrite and not (config.out / "config.json").is_file():
        raise UserError(f"{config.out}: holds no model, so --overwrite leaves it; choose another --out")
    model = load_model(base)
    merged = RewardModel(model) if settings.get("task_type") == "SEQ_CLS" else model
    load_adapter(merged, config.model)
    merge_lora(merged)
    own = (config.model / "tokenizer.json").exists()
    tokenizer = Tokenizer.load(config.model if own else base)
    saved = config.model / "lineage.json"
    origin = read_json(saved) if saved.exists() else lineage("merge", config, base, {}, "", 0)
    origin = {**origin, "adapter": str(config.model), "base": str(base)}
    ends = [tokenizer.end_of_turn_id, *eos_ids_of(base)] if own else [*eos_ids_of(base)]
    ids = [token_id for token_id in dict.fromkeys(ends) if token_id is not None] or [tokenizer.eos_id]
    pad_id = pad_id_of(tokenizer) if isinstance(merged, RewardModel) else None
    with new_directory(config.out, overwrite=config.overwrite) as directory:
        save_model(directory, merged, tokenizer, origin, ids, pad_id=pad_id)
    say(Console(stderr=True), f"the merged model is {config.out}")
