"""Completions on a terminal: texts on stdout, what is known about them on stderr."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from fledge.engine.batch import Progress
from fledge.engine.choices import ChoiceScores
from fledge.engine.engine import Engine
from fledge.engine.speculative import Counts
from fledge.engine.text import TextCompletion, terminal_safe
from fledge.tokenizer.bpe import Tokenizer
from fledge.types import SamplingParams, Token

QUIET_SECONDS = 10.0
# Tokens of each text that are made again without guesses, to say what the guesses were worth.
TIMED_TOKENS = 32


def print_stream(stream: Generator[str, None, TextCompletion]) -> TextCompletion:
    """Print one continuation as it is made, and close its stream."""
    with closing(stream):
        while True:
            try:
                piece = next(stream)
            except StopIteration as end:
                print()
                made: TextCompletion = end.value
                return made
            print(terminal_safe(piece), end="", flush=True)


def print_all(prompts: list[str], shown: list[str], made: list[TextCompletion]) -> None:
    """Texts on stdout, each behind what is `shown` of its prompt; between them, on stderr, which prompt
    each belongs to."""
    safe = terminal_safe if sys.stdout.isatty() else str
    for i, (prompt, before, completion) in enumerate(zip(prompts, shown, made, strict=True), start=1):
        if len(made) > 1:
            start = terminal_safe(prompt.replace("\n", " "))[:60]
            print(f"--- {i} of {len(made)}: {start}", file=sys.stderr, flush=True)
        print(safe(before + completion.text), flush=True)


def print_logprobs(tokenizer: Tokenizer, made: TextCompletion) -> None:
    """A line for each token, on stderr: its probability, and the most probable ones in its place."""

    def shown(token_id: int, logp: float) -> str:
        return f"{math.exp(logp):7.2%} {json.dumps(tokenizer.decode([token_id]), ensure_ascii=False)}"

    parts = zip(made.ids, made.logps, made.sampled_logps, made.top_logps, strict=True)
    for token in (*made.echoed, *(Token(*part) for part in parts)):
        others = [shown(*alternative) for alternative in token.top]
        line = " ".join([shown(token.id, token.logp), *(["|", *others] if others else [])])
        print(terminal_safe(line), file=sys.stderr)


def print_probabilities(prompts: list[str], choices: list[str], scores: list[ChoiceScores]) -> None:
    """A line for each choice, on stderr: its share among the choices, and its own probability."""
    for i, (prompt, score) in enumerate(zip(prompts, scores, strict=True), start=1):
        start = terminal_safe(prompt.replace("\n", " "))[:60]
        over = "every tokenisation" if score.method == "exact" else "the tokenizer's own tokenisation"
        print(f"--- {i} of {len(prompts)}, by {over}: {start}", file=sys.stderr)
        for choice, share, logp in zip(choices, score.probabilities, score.logps, strict=True):
            shown = json.dumps(choice, ensure_ascii=False)
            print(terminal_safe(f"{share:7.2%} {shown} (logp {logp:.2f})"), file=sys.stderr)


def mask_cost(engine: Engine) -> str:
    """What the constraint's masks took, for the summary."""
    grammars = engine.grammars
    if grammars is None or not grammars.masks:
        return ""
    return f", {1e6 * grammars.mask_seconds / grammars.masks:,.0f} \u00b5s a mask"


def print_summary(made: list[TextCompletion], seconds: float, cost: str = "") -> None:
    """How much was made, how fast, and why it ended, on stderr."""
    tokens = sum(len(completion.ids) for completion in made)
    reasons = [completion.finish_reason for completion in made]
    meanings = {"stop": "at their end", "length": "at --max-tokens", "context": "at the model's context"}
    counts = [f"{reasons.count(key)} {meaning}" for key, meaning in meanings.items() if key in reasons]
    rate = tokens / max(seconds, 1e-9)
    print(f"{tokens:,} tokens, {rate:,.0f} tokens/s{cost}; ended: {', '.join(counts)}", file=sys.stderr)


def print_speculation(engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
    """How often guesses were right and, where there are prompts, how much faster that was, on stderr."""
    if engine.speculation is None or not engine.speculation.counts.passes:
        return
    counts = engine.speculation.counts
    share = f"{counts.kept / counts.proposed:.0%} of {counts.proposed:,}" if counts.proposed else "no"
    line = f"{share} guessed tokens kept, {counts.tokens / counts.passes:.2f} tokens a pass"
    plain = plain_seconds(engine, prompts, params) if prompts else None
    if plain is not None:
        line += f", {plain * counts.tokens / counts.seconds:.2f} times as fast as without"
    print(line, file=sys.stderr)


def plain_seconds(engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams) -> float | None:
    """The time of a token without guesses: the beginnings of the same texts are made again, with as many at
    once; None where they end too early to tell."""
    speculation = engine.speculation
    assert speculation is not None
    counts, tokens = speculation.counts, speculation.tokens
    most = min(params.max_tokens, TIMED_TOKENS)
    params = replace(params, max_tokens=most, min_tokens=min(params.min_tokens, most), echo=False)
    speculation.counts, speculation.tokens = Counts(), 0
    try:
        engine.generate(prompts, params)
        plain = speculation.counts
    finally:
        speculation.counts, speculation.tokens = counts, tokens
    return plain.seconds / plain.tokens if plain.tokens else None


@contextmanager
def batch_progress() -> Iterator[Progress]:
    """A bar on a terminal, a line every ten seconds elsewhere."""
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    started = printed = time.monotonic()
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("rows")

        def show(done: int, total: int, tokens: int) -> None:
            nonlocal printed
            now = time.monotonic()
            figures = f"rows, {tokens / max(now - started, 1e-9):,.0f} tokens/s"
            bar.update(task, completed=done, total=total, description=figures)
            if not console.is_terminal and now - printed >= QUIET_SECONDS:
                printed = now
                print(f"{done:,} of {total:,} {figures}", file=sys.stderr, flush=True)

        yield show
