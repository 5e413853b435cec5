"""`fledge chat`: talk with a model in the terminal, or through a pipe (one message a line)."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from fledge.device import pick_device
from fledge.engine.products import QuantizeName, WeightsName, weights_type
from fledge.engine.remote import RemoteChat, check_remote, connect
from fledge.engine.sampling import validate
from fledge.engine.session import Session, note
from fledge.engine.settings import banned_sequences, logit_bias, read_constraint, split_biases
from fledge.engine.text import LocalChat, load_engine
from fledge.errors import UserError
from fledge.types import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Config:
    """Talk with a model. Answers go to stdout, everything else to stderr; /help lists the commands."""

    model: str
    """Model directory, of a model that was fine-tuned on conversations; with --endpoint, a name there."""
    endpoint: str | None = None
    """Address of an OpenAI-compatible server, as http://localhost:8000/v1, that answers instead."""
    endpoint_key: str | None = None
    """Name of the environment variable that holds the endpoint's key."""
    system: str | None = None
    """System prompt."""
    temperature: float = 0.8
    """Randomness: 0 always takes the most probable token (greedy), 1 samples from the model as it is."""
    top_k: int | None = None
    """Sample among this many most probable tokens only."""
    top_p: float | None = None
    """Sample among the fewest tokens whose probabilities sum to this."""
    min_p: float | None = None
    """Sample among tokens at least this share as probable as the most probable one."""
    repetition_penalty: float = 1.0
    """Above 1 makes every token of the conversation less probable to come again; 1 is none."""
    presence_penalty: float = 0.0
    """Subtracted from the score of every token that the answer has; negative invites repetition."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's score for each time that the answer has it."""
    logit_bias: tuple[str, ...] = ()
    """TOKEN=BIAS (an id, or text that is one token): added to its score; -100 bans it, 100 forces it."""
    ban: tuple[str, ...] = ()
    """Words that are never written, as the tokens they have at a line's start and behind a space."""
    min_tokens: int = 0
    """Tokens before an answer may end."""
    max_tokens: int = 512
    """Longest answer in tokens."""
    seed: int = 0
    """The same seed, messages and settings give the same answers."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are not printed."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end an answer."""
    regex: str | None = None
    """Regular expression that each whole answer matches (Rust's syntax, no look-around)."""
    json_schema: str | None = None
    """JSON schema (a file, or the JSON itself) that each answer is an instance of."""
    grammar: Path | None = None
    """File with a Lark grammar (llguidance's kind) that each answer is a sentence of."""
    weights: WeightsName = "fp32"
    """What weights are rounded to for speed: fp16 is the fastest for one answer at a time."""
    quantize: QuantizeName | None = None
    """Round weights to so many bits instead, to read fewer bytes for each token (on a CPU)."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:INDEX or mps."""


def main(config: Config) -> None:
    """Read messages and commands until the end of the input."""
    params = SamplingParams(
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        presence_penalty=config.presence_penalty,
        frequency_penalty=config.frequency_penalty,
        min_tokens=config.min_tokens,
        max_tokens=config.max_tokens,
        seed=config.seed,
        stop=config.stop,
        stop_ids=config.stop_ids,
    )
    validate(params)
    check_remote(config)
    chat: LocalChat | RemoteChat
    if config.endpoint is None:
        chat, params = load(config, params)
    else:
        chat = connect(config.endpoint, config.model, config.endpoint_key, os.environ)
    try:
        converse(Session(chat, params, config.system))
    finally:
        if isinstance(chat, RemoteChat):
            chat.close()


def converse(session: Session) -> None:
    """Do what each line says."""
    if sys.stdin.isatty():
        note("/help lists the commands.")
    for line in read_lines():
        if line.startswith("/") and not line.startswith("//"):
            if not session.command(line):
                return
        elif line:
            session.say(line.removeprefix("/") if line.startswith("//") else line)


def load(config: Config, params: SamplingParams) -> tuple[LocalChat, SamplingParams]:
    """A local model, and the settings with what depends on its tokens."""
    biases = split_biases(config.logit_bias)
    constraint = read_constraint((), config.regex, config.json_schema, config.grammar)
    engine, tokenizer = load_engine(
        Path(config.model),
        device=pick_device(config.device),
        compute_dtype=weights_type(config.weights, config.quantize),
    )
    if constraint is not None and engine.grammars is not None:
        engine.grammars.start(constraint)  # one error here instead of one for each message
    banned, biases_by_id = banned_sequences(config.ban, tokenizer), logit_bias(biases, tokenizer)
    params = replace(params, banned=banned, logit_bias=biases_by_id, constraint=constraint)
    validate(params, engine.model.config.vocab_size)
    return LocalChat(engine, tokenizer), params


def read_lines() -> Iterator[str]:
    """Lines of stdin without surrounding space, until its end; Ctrl-C empties the line being written.

    Raises UserError for a line that is not UTF-8.
    """
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  arrow keys and history for input()
    while True:
        try:
            if interactive:
                yield input("> ").strip()
                continue
            raw = sys.stdin.buffer.readline()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            note("\n/quit or Ctrl-D ends the chat.")
            continue
        if not raw:
            return
        try:
            yield raw.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise UserError(f"stdin: not valid UTF-8: {raw[:60]!r}; send UTF-8 text") from None
