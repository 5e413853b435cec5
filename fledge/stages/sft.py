"""`fledge sft`: from a base model and conversations to an assistant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from fledge.config import check_at_least, check_positive, check_share, to_toml
from fledge.data.conversations import EncodedConversations, read_conversations, split_conversations
from fledge.data.packing import ConversationRows
from fledge.device import ComputeName, DeviceName, pick_compile, pick_compute_dtype, pick_device
from fledge.errors import UserError
from fledge.files import new_directory, sha256, write_json
from fledge.model.checkpoint import read_weights
from fledge.model.embeddings import add_token_rows
from fledge.model.lora import TARGETS, add_lora, lora_of, parameter_line, read_adapter
from fledge.model.transformer import CausalLM
from fledge.rewards.best_of import sample_best
from fledge.run import Run, lineage
from fledge.tokenizer.adapt import ChatTokenizer, fit_for_chats
from fledge.tokenizer.bpe import Tokenizer
from fledge.train.loop import fit
from fledge.train.losses import mean_loss, next_token_loss
from fledge.train.memory import Setup, check_memory_here, trained_share
from fledge.train.optim import OptimizerName, make_optimizers
from fledge.train.parallel import Ranks, joined
from fledge.train.plan import FitConfig
from fledge.train.progress import say
from fledge.train.saving import save_assistant
from fledge.train.start import load_start
from fledge.train.steps import Metrics, row_steps
from fledge.types import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fine-tune a model on conversations; only what the assistant says is learned."""

    model: Path
    """Model directory to start from."""
    data: Path
    """JSONL file, one conversation a line in OpenAI's form: {"messages": [...], "tools": [...]}."""
    from_best_of: int | None = None
    """Learn from the model's own replies to the prompts of --data: the best of this many for each."""
    reward_model: Path | None = None
    """Directory of the reward model that chooses them."""
    completion_tokens: int = 256
    """Longest of those replies; what is cut off there is not learned from."""
    out: Path = Path("runs/sft")
    """Run directory; the same command again resumes it."""
    epochs: float | None = None
    """How often each conversation is seen; by default once."""
    minutes: float | None = None
    """Train about this long instead: the speed is measured once, then the number of steps stands."""
    row_tokens: int | None = None
    """Length of the packed rows; by default 512, or the model's context where that is shorter."""
    batch_tokens: int = 4096
    """Tokens of an optimizer step, padding included."""
    micro_batch_tokens: int = 16_384
    """Most tokens in memory at once; larger batches are accumulated."""
    lora_rank: int | None = None
    """Train an adapter (LoRA) of this rank beside frozen weights, instead of all weights."""
    lora_alpha: float | None = None
    """The adapter counts alpha / rank times; by default alpha is twice the rank."""
    lora_targets: tuple[str, ...] = TARGETS
    """Layers that get an adapter."""
    checkpoint_activations: bool = False
    """Compute the inside of each block again in the backward pass: a third slower, far less memory."""
    cut_overlong: bool = False
    """Cut conversations that do not fit a row at its end, instead of dropping them."""
    optimizer: OptimizerName = "adamw"
    """adamw (for all), or muon (hidden matrices; AdamW for the rest), which forgets more."""
    matrix_lr: float = 0.003
    """Muon's peak learning rate."""
    adam_lr: float = 5e-4
    """AdamW's peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay of all matrices."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises."""
    decay_share: float = 0.9
    """Share of the run, at its end, over which the learning rate falls to zero."""
    max_spike: float = 3.0
    """Stop when the loss jumps this many nats above its running mean."""
    validation_share: float = 0.02
    """Share of the conversations held out, chosen by a hash of their content."""
    evaluations: int = 4
    """How many times to save a checkpoint and evaluate it."""
    keep_checkpoints: int = 2
    """Latest checkpoints to keep, besides the best."""
    seed: int = 0
    """Seed of the data order."""
    device: DeviceName = "auto"
    """Where to train."""
    compute: ComputeName = "auto"
    """Type of matrix products; auto is bf16 where it is fast."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """torch.compile; auto uses it for runs long enough when there is a C++ compiler."""
    overwrite: bool = False
    """Delete what --out holds of an earlier run."""


def main(config: Config) -> None:
    """Train to the end, or go on where an interrupted run stopped."""
    with joined(config.device) as ranks:
        _train(config, ranks)


def _train(config: Config, ranks: Ranks) -> None:
    console = Console(stderr=True, quiet=not ranks.leads)
    _check(config)
    base = Tokenizer.load(config.model)
    fitted = fit_for_chats(base)
    tokenizer = fitted.tokenizer
    run = Run.open(config.out, to_toml(replace(config, overwrite=False)), config.overwrite, ranks.leads)
    if run.finished:
        say(console, f"{config.out}: finished already; the model is {run.model}")
        return
    device = pick_device(config.device)
    model = load_start(config.model, base, device, config.checkpoint_activations)
    _fit_vocabulary(console, config, fitted, model)
    lora = lora_of(config.lora_rank, config.lora_alpha, config.lora_targets)
    if lora is not None:
        add_lora(model, lora, torch.Generator().manual_seed(config.seed))
    row_tokens = _row_tokens(config, model)
    inputs = cache(partial(_inputs, config, tokenizer))
    made = _data(config, run, inputs, device, console) if ranks.leads else (config.data, None)
    place, best_of = ranks.share([str(made[0]), made[1]])
    data = Path(place)
    chats = read_conversations(data, tokenizer, row_tokens + 1, config.cut_overlong)
    train, validation = split_conversations(chats, config.validation_share)
    rows = ConversationRows(*train, row_tokens, tokenizer.eos_id, config.seed)
    held = ConversationRows(*validation, row_tokens, tokenizer.eos_id, 0) if validation[0] else None
    batch_rows = max(1, config.batch_tokens // row_tokens)
    fit_config = _fit_config(config, model, rows, batch_rows, device)
    memory = _check_memory(config, model, batch_rows, row_tokens, fit_config, ranks)
    rates = (config.matrix_lr, config.adam_lr, config.weight_decay)
    optimizers = make_optimizers(model, config.optimizer, *rates)
    if best_of is None:
        run.begin(inputs())
    _print_plan(console, config, model, chats, len(train[0]), rows, fit_config, memory)

    fingerprints = {config.data.name: inputs()["the data"]}
    origin = lineage("sft", config, config.model, fingerprints, tokenizer.fingerprint(), 0)
    write = partial(
        save_assistant, model=model, tokenizer=tokenizer, origin=origin, base=config.model, lora=lora
    )
    steps = row_steps(rows.rows, batch_rows, max(1, config.micro_batch_tokens // row_tokens), ranks)
    evaluate = partial(_evaluate, model, held, fit_config.compute_dtype) if held else None
    read = read_weights if lora is None else read_adapter
    how = (fit_config, run, write, evaluate)
    done = fit(model, optimizers, steps, next_token_loss, *how, read_model=read, ranks=ranks)
    if not ranks.leads:
        return
    with new_directory(run.model, overwrite=True) as directory:
        write(directory, done["tokens"])
    epochs = round(done["steps"] * batch_rows / rows.epoch_rows(0), 3)
    summary = _summary(model, run, done, chats, len(train[0]), epochs)
    write_json(run.directory / "summary.json", {**summary, **({"best_of": best_of} if best_of else {})})
    what, verb = ("assistant", "chat") if lora is None else ("adapter", "merge")
    say(console, f"the {what} is {run.model}: fledge {verb} --model {run.model}")


def _data(
    config: Config, run: Run, inputs: Callable[[], dict[str, str]], device: torch.device, console: Console
) -> tuple[Path, dict[str, Any] | None]:
    """The conversations to learn from: the given ones, or the best of the model's own; and what is known of
    those. Making these begins the run."""
    if config.from_best_of is None or config.reward_model is None:
        return config.data, None
    params = SamplingParams(max_tokens=config.completion_tokens, seed=config.seed, n=config.from_best_of)
    return sample_best(config.data, config.model, config.reward_model, params, run, inputs, device, console)


def _evaluate(model: CausalLM, held: ConversationRows, compute_dtype: torch.dtype, _step: int) -> Metrics:
    """Nats per token of the assistant over all held-out conversations."""
    total = held.epoch_rows(0)
    batches = (held.rows(first, min(8, total - first)) for first in range(0, total, 8))
    return {"validation": mean_loss(model, batches, compute_dtype)}


def _summary(
    model: CausalLM, run: Run, done: dict[str, Any], chats: EncodedConversations, training: int, epochs: float
) -> dict[str, Any]:
    losses = [row["validation"] for row in run.rows("metrics") if "validation" in row]
    return {
        "stage": "sft",
        "parameters": model.num_parameters(),
        **done,
        "conversations": training,
        "held_out": len(chats.ids) - training,
        "overlong": chats.overlong,
        "without_targets": chats.without_targets,
        "epochs": epochs,
        "validation_nats_per_token": losses[-1] if losses else None,
    }


def _check(config: Config) -> None:
    check_at_least(config, 0, "seed")
    if config.epochs is not None and config.minutes is not None:
        raise UserError("--epochs and --minutes: give one of them")
    check_positive(config, "epochs")
    check_share(config, "validation_share")
    check_at_least(config, 1, "row_tokens", "batch_tokens", "micro_batch_tokens", "completion_tokens")
    check_at_least(config, 1, "from_best_of")
    if (config.from_best_of is None) != (config.reward_model is None):
        raise UserError("--from-best-of and --reward-model: one needs the other")
    if lora_of(config.lora_rank, config.lora_alpha, config.lora_targets) and config.optimizer == "muon":
        raise UserError("--lora-rank goes with --optimizer adamw")


def _inputs(config: Config, tokenizer: Tokenizer) -> dict[str, str]:
    """Fingerprints of what is learned from."""
    weights = sha256(sorted(config.model.glob("*.safetensors")))
    return {"the model": weights, "the tokenizer": tokenizer.fingerprint(), "the data": sha256([config.data])}


def _fit_vocabulary(console: Console, config: Config, fitted: ChatTokenizer, model: CausalLM) -> None:
    """Rows for the tokens that chats need and the base lacks."""
    before = model.config.vocab_size
    add_token_rows(model, fitted.added.values(), torch.Generator().manual_seed(config.seed))
    if fitted.added and config.lora_rank is not None:
        raise UserError(f"--lora-rank trains no embeddings, and {config.model} lacks the tokens of chats")
    if fitted.note:
        say(console, f"{fitted.note}; embedding rows: {before:,} -> {model.config.vocab_size:,}")


def _row_tokens(config: Config, model: CausalLM) -> int:
    context = model.config.max_position_embeddings
    if config.row_tokens and config.row_tokens > context:
        raise UserError(f"--row-tokens {config.row_tokens} is longer than the model's context of {context}")
    return config.row_tokens or min(512, context)


def _fit_config(
    config: Config, model: CausalLM, rows: ConversationRows, batch_rows: int, device: torch.device
) -> FitConfig:
    epochs = config.epochs or 1.0
    total = None if config.minutes else max(1, round(epochs * rows.epoch_rows(0) / batch_rows))
    operations = 6 * model.num_parameters() * (total or 0) * batch_rows * rows.row_tokens
    return FitConfig.of(
        config,
        label="sft",
        total_steps=total,
        minutes=config.minutes,
        compute_dtype=pick_compute_dtype(device, config.compute),
        compile=pick_compile(config.compile, config.minutes, operations),
        validation_unit="nats per token of the assistant",
    )


def _check_memory(
    config: Config,
    model: CausalLM,
    batch_rows: int,
    row_tokens: int,
    fit_config: FitConfig,
    ranks: Ranks,
) -> str:
    micro_rows = max(1, config.micro_batch_tokens // row_tokens)
    device = model.model.embed_tokens.weight.device
    own_rows = -(-batch_rows // ranks.count)
    setup = Setup(
        rows=min(micro_rows, own_rows),
        row_tokens=row_tokens,
        optimizer=config.optimizer,
        compute_dtype=fit_config.compute_dtype,
        compiled=fit_config.compile,
        checkpointed=config.checkpoint_activations,
        accumulates=micro_rows < own_rows,
        on_cpu=device.type == "cpu",
        trained_share=trained_share(model),
        ranks=ranks.count,
        neighbours=ranks.neighbours,
    )
    return check_memory_here(model.config, setup, device, model.num_parameters())


def _print_plan(
    console: Console,
    config: Config,
    model: CausalLM,
    chats: EncodedConversations,
    training: int,
    rows: ConversationRows,
    fit_config: FitConfig,
    memory: str,
) -> None:
    fate = "cut" if config.cut_overlong else "dropped"
    length = f"{config.minutes} minutes" if config.minutes else f"{fit_config.total_steps:,} steps"
    console.print(
        f"{training:,} conversations in {rows.epoch_rows(0):,} rows of {rows.row_tokens} tokens, "
        f"{len(chats.ids) - training:,} held out, {chats.overlong:,} too long ({fate}), "
        f"{chats.without_targets:,} without anything to learn (dropped); {chats.targets:,} target tokens\n"
        f"{parameter_line(model)}; {length}; {config.optimizer}, peak rates "
        f"{config.matrix_lr:.3g} and {config.adam_lr:.3g}; {fit_config.execution}\n{memory}",
        highlight=False,
    )
