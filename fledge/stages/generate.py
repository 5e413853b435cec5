"""`fledge generate`: a model continues text, or answers it as a chat turn."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fledge.device import pick_device
from fledge.engine.engine import Engine
from fledge.engine.text import (
    LocalChat,
    TextCompletion,
    complete_ids,
    encode_prompt,
    load_engine,
    stream_ids,
    terminal_safe,
)
from fledge.errors import UserError
from fledge.tokenizer.bpe import Tokenizer
from fledge.types import Message, SamplingParams


@dataclass(frozen=True, kw_only=True)
class Config:
    """Continue texts with a model; only the continuation is written to stdout."""

    model: Path
    """Model directory."""
    prompt: tuple[str, ...] = ()
    """Texts to continue; `-` reads one from stdin. An empty text starts a new document."""
    prompt_file: Path | None = None
    """UTF-8 file whose whole content is one more prompt (without its last line break)."""
    chat: bool = False
    """Give each prompt to the model as a user's turn and print the assistant's answer."""
    temperature: float = 0.8
    """Randomness: 0 always takes the most probable token (greedy), 1 samples from the model as it is."""
    top_k: int | None = None
    """Sample among this many most probable tokens only."""
    top_p: float | None = None
    """Sample among the fewest tokens whose probabilities sum to this."""
    max_tokens: int = 256
    """Longest continuation in tokens."""
    seed: int = 0
    """The same seed, prompts and settings give the same texts."""
    stop: tuple[str, ...] = ()
    """Texts that end a continuation; they are not printed."""
    n: int = 1
    """Continuations of each prompt."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:INDEX or mps."""


def main(config: Config) -> None:
    """Print the continuations: as they are made if there is one and stdout is a terminal."""
    if config.n < 1:
        raise UserError(f"--n {config.n} is below 1")
    prompts = list(read_prompts(config))
    params = SamplingParams(
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        max_tokens=config.max_tokens,
        seed=config.seed,
        stop=config.stop,
    )
    engine, tokenizer = load_engine(config.model, device=pick_device(config.device))
    if config.chat:
        chat = LocalChat(engine, tokenizer)
        params = chat.until_end_of_turn(params)
        prompt_ids = [chat.prompt([Message(role="user", content=prompt)]) for prompt in prompts]
    else:
        prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    started = time.perf_counter()
    if len(prompts) == config.n == 1 and sys.stdout.isatty():
        made = [stream_to_terminal(engine, tokenizer, prompt_ids[0], params)]
    else:
        repeated = [ids for ids in prompt_ids for _ in range(config.n)]
        made = complete_ids(engine, tokenizer, repeated, params)
        print_all([prompt for prompt in prompts for _ in range(config.n)], made)
    print_summary(made, time.perf_counter() - started)


def read_prompts(config: Config) -> Iterator[str]:
    """The prompts in order: flags, then the file. Raises UserError if there is none, or one is not UTF-8."""
    if not config.prompt and config.prompt_file is None:
        raise UserError("nothing to continue: give --prompt TEXT, --prompt - (stdin) or --prompt-file FILE")
    if config.prompt.count("-") > 1:
        raise UserError("--prompt - is given twice; stdin can be read once")
    for prompt in config.prompt:
        yield _text(sys.stdin.buffer.read(), "stdin") if prompt == "-" else prompt
    if config.prompt_file is not None:
        try:
            raw = config.prompt_file.read_bytes()
        except OSError as error:
            raise UserError(f"{config.prompt_file}: cannot read the prompt: {error.strerror}") from None
        yield _text(raw, str(config.prompt_file))


def _text(raw: bytes, where: str) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where}:{line}: not valid UTF-8 (byte {error.start}); save it as UTF-8") from None
    return text.replace("\r\n", "\n").removesuffix("\n")


def stream_to_terminal(
    engine: Engine, tokenizer: Tokenizer, prompt: list[int], params: SamplingParams
) -> TextCompletion:
    """Print one continuation as it is made."""
    stream = stream_ids(engine, tokenizer, prompt, params)
    while True:
        try:
            piece = next(stream)
        except StopIteration as end:
            print()
            made: TextCompletion = end.value
            return made
        print(terminal_safe(piece), end="", flush=True)


def print_all(prompts: list[str], made: list[TextCompletion]) -> None:
    """Texts on stdout; between them, on stderr, which prompt each belongs to."""
    safe = terminal_safe if sys.stdout.isatty() else str
    for i, (prompt, completion) in enumerate(zip(prompts, made, strict=True), start=1):
        if len(made) > 1:
            start = terminal_safe(prompt.replace("\n", " "))[:60]
            print(f"--- {i} of {len(made)}: {start}", file=sys.stderr, flush=True)
        print(safe(completion.text), flush=True)


def print_summary(made: list[TextCompletion], seconds: float) -> None:
    """How much was made, how fast, and why it ended, on stderr."""
    tokens = sum(len(completion.ids) for completion in made)
    reasons = [completion.finish_reason for completion in made]
    meanings = {"stop": "at their end", "length": "at --max-tokens", "context": "at the model's context"}
    counts = [f"{reasons.count(key)} {meaning}" for key, meaning in meanings.items() if key in reasons]
    rate = tokens / max(seconds, 1e-9)
    print(f"{tokens:,} tokens, {rate:,.0f} tokens/s; ended: {', '.join(counts)}", file=sys.stderr)
