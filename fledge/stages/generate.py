"""`fledge generate`: a model continues text, or answers it as a chat turn; one prompt or a file of them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from fledge.config import to_toml
from fledge.device import pick_device
from fledge.engine import batch, terminal
from fledge.engine.draft_models import Speculate, speculation_of
from fledge.engine.engine import Engine
from fledge.engine.exact import Budget
from fledge.engine.local_texts import local_results, print_local, read_local_jobs
from fledge.engine.products import QuantizeName, WeightsName, weights_type
from fledge.engine.prompts import read_prompts
from fledge.engine.remote import check_remote, connect
from fledge.engine.remote_texts import LOCAL_ONLY, print_remote, read_remote_jobs, remote_results
from fledge.engine.sampling import validate
from fledge.engine.search_texts import EarlyStoppingName, Strategy, search_of
from fledge.engine.settings import banned_sequences, logit_bias, read_constraint, split_biases
from fledge.engine.text import LocalChat, load_engine
from fledge.errors import UserError
from fledge.rewards.best_of import best_replies, bound_line
from fledge.rewards.reward_model import load_judge
from fledge.tokenizer.bpe import Tokenizer
from fledge.types import Message, SamplingParams

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Continue texts with a model; only the continuation is written to stdout."""

    model: str
    """Model directory; with --endpoint, a name there."""
    endpoint: str | None = None
    """Address of an OpenAI-compatible server, as http://localhost:8000/v1, that writes the texts instead."""
    endpoint_key: str | None = None
    """Name of the environment variable that holds the endpoint's key."""
    prompt: tuple[str, ...] = ()
    """Texts to continue; `-` reads one from stdin. An empty text starts a new document."""
    prompt_file: Path | None = None
    """UTF-8 file whose whole content is one more prompt (without its last line break)."""
    batch: Path | None = None
    """JSONL file of {"prompt": ...} or {"messages": [...]} rows, each with sampling settings if it likes."""
    out: Path | None = None
    """File for the completions of --batch; a killed command goes on when it is run again."""
    strict: bool = False
    """End at the first bad row of --batch, instead of writing {"error": ...} for it."""
    overwrite: bool = False
    """Replace what --out holds."""
    chat: bool = False
    """Give each prompt to the model as a user's turn and print the assistant's answer."""
    echo: bool = False
    """Print the prompt before its continuation; with --show-logprobs, score it too."""
    show_logprobs: int | None = None
    """Show the probability of each token and of this many alternatives, on stderr (0: none)."""
    temperature: float | None = None
    """Randomness: 0 always takes the most probable token (greedy), 1 samples from the model as it is.
    By default 0.8; 1 for a search."""
    top_k: int | None = None
    """Sample among this many most probable tokens only."""
    top_p: float | None = None
    """Sample among the fewest tokens whose probabilities sum to this."""
    min_p: float | None = None
    """Sample among tokens at least this share as probable as the most probable one."""
    repetition_penalty: float = 1.0
    """Above 1 makes every token of prompt and continuation less probable to come again; 1 is none."""
    presence_penalty: float = 0.0
    """Subtracted from the score of every token that the continuation has; negative invites repetition."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's score for each time that the continuation has it."""
    logit_bias: tuple[str, ...] = ()
    """TOKEN=BIAS (an id, or text that is one token): added to its score; -100 bans it, 100 forces it."""
    ban: tuple[str, ...] = ()
    """Words that are never written, as the tokens they have at a line's start and behind a space."""
    min_tokens: int = 0
    """Tokens before a continuation may end."""
    max_tokens: int = 256
    """Longest continuation in tokens."""
    seed: int = 0
    """The same seed, prompts and settings give the same texts."""
    stop: tuple[str, ...] = ()
    """Texts that end a continuation; they are not printed."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end a continuation."""
    choices: tuple[str, ...] = ()
    """Texts of which the continuation is one."""
    regex: str | None = None
    """Regular expression that the whole continuation matches (Rust's syntax, no look-around)."""
    json_schema: str | None = None
    """JSON schema (a file, or the JSON itself) that the continuation is an instance of."""
    grammar: Path | None = None
    """File with a Lark grammar (llguidance's kind) that the continuation is a sentence of."""
    show_probabilities: bool = False
    """Show how probable each of the --choices is, on stderr (with --batch: in --out)."""
    n: int = 1
    """Continuations of each prompt."""
    beams: int | None = None
    """Beam search: follow this many prefixes and print the --n best texts."""
    length_penalty: float | None = None
    """With --beams: scores are log-probabilities divided by (tokens) ** this (default 1; 0: by nothing)."""
    early_stopping: EarlyStoppingName | None = None
    """With --beams: end when as many texts are whole (true), when the best prefix is worse at its present
    length (false, the default), or when it would be at any length (never)."""
    stochastic: bool = False
    """With --beams: texts sampled without replacement instead of the best."""
    strategy: Strategy = "sample"
    """sample chooses token by token; exact searches for the most probable whole text, with a certificate."""
    max_expansions: int | None = None
    """With --strategy exact: give up after looking behind this many prefixes (default 10,000)."""
    max_seconds: float | None = None
    """With --strategy exact: give up after this time."""
    best_of: int | None = None
    """With --chat: make this many answers to each prompt and print the one with the highest reward."""
    reward_model: Path | None = None
    """Directory of the reward model that chooses it."""
    speculate: Speculate | None = None
    """Guess tokens ahead and check them in one pass; lookup: what followed the last tokens before."""
    draft_model: Path | None = None
    """Guess tokens ahead with this model, a smaller one with the same tokenizer (n-gram models too)."""
    draft_tokens: int | None = None
    """With --speculate or --draft-model: how many tokens to guess ahead at most (default 6)."""
    batch_size: int = 64
    """Continuations made at once, as far as memory for keys and values allows; of an endpoint at most 16."""
    weights: WeightsName = "fp32"
    """What weights are rounded to for speed: fp16 for one continuation at a time, bf16 for many."""
    quantize: QuantizeName | None = None
    """Round weights to so many bits, to read fewer bytes for each token (on a CPU)."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:INDEX or mps."""


def main(config: Config) -> None:
    """Print the continuations: as they are made if there is one and stdout is a terminal."""
    if config.n < 1:
        raise UserError(f"--n {config.n} is below 1")
    check_remote(config, LOCAL_ONLY)
    search = search_of(
        config.strategy, config.beams, config.length_penalty, config.early_stopping, config.stochastic,
        config.max_expansions, config.max_seconds,
    )  # fmt: skip
    if search is not None and (config.batch is not None or config.best_of is not None):
        raise UserError("--beams and --strategy exact do not go with --batch and --best-of")
    if isinstance(search, Budget) and (config.weights != "fp32" or config.quantize is not None):
        raise UserError("--strategy exact goes with --weights fp32: what it certifies are exact scores")
    if search is not None and (config.speculate is not None or config.draft_model is not None):
        raise UserError("--speculate and --draft-model do not go with --beams and --strategy exact")
    if search is not None and config.show_logprobs is not None and (config.show_logprobs or config.echo):
        raise UserError("a search has the probability of its own tokens only: --show-logprobs 0, no --echo")
    if config.batch is not None:
        run_batch(config)
        return
    if config.out is not None or config.strict or config.overwrite:
        raise UserError("--out, --strict and --overwrite go with --batch FILE; a continuation is on stdout")
    prompts = list(read_prompts(config.prompt, config.prompt_file))
    if config.endpoint is not None:
        model = connect(config.endpoint, config.model, config.endpoint_key, os.environ, config.batch_size)
        with closing(model):
            print_remote(model, prompts, config.chat, sampling(config))
        return
    if config.best_of is not None or config.reward_model is not None:
        print_best(config, prompts)
        return
    engine, tokenizer, params = load(config)
    print_local(
        engine, tokenizer, prompts, config.chat, params, search, config.show_logprobs,
        config.show_probabilities,
    )  # fmt: skip


def print_best(config: Config, prompts: list[str]) -> None:
    """For each prompt the best of several answers; their rewards and the bound of the KL on stderr."""
    if config.best_of is None or config.reward_model is None or not config.chat or config.n != 1:
        raise UserError("--best-of N goes with --reward-model DIR and --chat, and not with --n")
    if config.show_logprobs is not None or config.show_probabilities:
        raise UserError("--best-of does not go with --show-logprobs and --show-probabilities")
    engine, tokenizer, params = load(config)
    judge = load_judge(config.reward_model, pick_device(config.device))
    asked = [[Message(role="user", content=prompt)] for prompt in prompts]
    found = best_replies(LocalChat(engine, tokenizer), judge, asked, params, config.best_of)
    shown = [prompt if config.echo else "" for prompt in prompts]
    terminal.print_all(prompts, shown, [best.chosen for best in found])
    for best in found:
        others = " ".join(f"{reward:+.3f}" for reward in sorted(best.rewards, reverse=True)[1:])
        print(f"reward {best.reward:+.3f}" + (f"; the others {others}" if others else ""), file=sys.stderr)
    print(bound_line(config.best_of), file=sys.stderr)


def sampling(config: Config) -> SamplingParams:
    """The sampling settings but for those that name tokens."""
    default = 0.8 if config.beams is None and config.strategy == "sample" else 1.0
    params = SamplingParams(
        temperature=default if config.temperature is None else config.temperature, top_k=config.top_k,
        top_p=config.top_p, min_p=config.min_p, repetition_penalty=config.repetition_penalty,
        presence_penalty=config.presence_penalty, frequency_penalty=config.frequency_penalty,
        max_tokens=config.max_tokens, seed=config.seed, stop=config.stop, stop_ids=config.stop_ids,
        echo=config.echo, top_logprobs=config.show_logprobs or 0, min_tokens=config.min_tokens, n=config.n,
    )  # fmt: skip
    validate(params)
    return params


def load(config: Config) -> tuple[Engine, Tokenizer, SamplingParams]:
    """The model and the sampling settings."""
    biases, params = split_biases(config.logit_bias), sampling(config)
    constraint = read_constraint(config.choices, config.regex, config.json_schema, config.grammar)
    engine, tokenizer = load_engine(
        Path(config.model), device=pick_device(config.device), batch_size=config.batch_size,
        compute_dtype=weights_type(config.weights, config.quantize),
    )  # fmt: skip
    engine.speculation = speculation_of(
        config.speculate, config.draft_model, config.draft_tokens, engine, tokenizer
    )
    if constraint is not None and engine.grammars is not None:
        engine.grammars.start(constraint)  # one error here instead of one for each prompt
    banned, biases_by_id = banned_sequences(config.ban, tokenizer), logit_bias(biases, tokenizer)
    return engine, tokenizer, replace(params, banned=banned, logit_bias=biases_by_id, constraint=constraint)


def run_batch(config: Config) -> None:
    """Continue the rows of --batch into --out."""
    if config.prompt or config.prompt_file is not None:
        raise UserError("--batch has its own prompts; leave out --prompt and --prompt-file")
    if config.batch is None or config.out is None:
        raise UserError("--batch needs --out FILE.jsonl for the completions")
    if config.out.exists() and config.out.samefile(config.batch):
        raise UserError(f"{config.out}: is the file of --batch itself; choose another --out")
    started = time.perf_counter()
    if config.endpoint is not None:
        params = sampling(config)
        model = connect(config.endpoint, config.model, config.endpoint_key, os.environ, config.batch_size)
        with closing(model):
            asked = read_remote_jobs(config.batch, params, config.chat, config.strict)
            counts = write_rows(config, params, asked, partial(remote_results, model, config.strict))
        print(batch.summary(counts, time.perf_counter() - started, config.out), file=sys.stderr)
        return
    engine, tokenizer, params = load(config)
    jobs = read_local_jobs(config.batch, engine, tokenizer, params, config.chat, config.strict)
    make = partial(local_results, engine, tokenizer, config.show_probabilities)
    counts = write_rows(config, params, jobs, make)
    seconds, cost = time.perf_counter() - started, terminal.mask_cost(engine)
    print(batch.summary(counts, seconds, config.out, cost), file=sys.stderr)
    terminal.print_speculation(engine, [], params)


def write_rows(
    config: Config, params: SamplingParams, jobs: Sequence[batch.Job[T]], make: batch.Make[T]
) -> dict[str, int]:
    """`batch.run_batch` with the settings' files and a bar. What has no part in the rows may change before
    the same job goes on."""
    assert config.batch is not None and config.out is not None
    model = Path(config.model) if config.endpoint is None else None
    settings = replace(
        config, model=str(model or config.model), strict=False, overwrite=False, batch=None, out=None,
        device="auto", batch_size=1, endpoint_key=None,
    )  # fmt: skip
    job = batch.job_id(f"{to_toml(settings)}\n{params.constraint!r}", config.batch, model)
    with terminal.batch_progress() as progress:
        return batch.run_batch(jobs, make, config.out, job, config.strict, config.overwrite, progress)
