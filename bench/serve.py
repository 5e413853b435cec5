"""How many requests a served model answers: `fledge serve` beside `transformers serve`, on the same weights.

    python bench/serve.py --transformers PYTHON [--sizes 15M 134M] [--clients 1 8 32] [--rounds 3]

PYTHON is that of an environment with `transformers[serving]` (`make .venv-clients/transformers/installed`
makes .venv-clients/transformers/bin/python); without it only fledge is measured. Random weights of two
shapes, short prompts of code, all different, greedy, 32 new tokens, streamed. Each client sends its next
request when it has its last answer. All servers of a size live over all its rounds, which are interleaved,
so that a slow minute of the machine slows them all; one that is not asked is halted (one of them waits
busily). Who asks is a process beside them, on the same cores. Medians over rounds are shown with the slowest
and the fastest, and of the time to the first text the 50th and 95th percentile over all requests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fledge.model.checkpoint import save_model
from fledge.model.config import ModelConfig
from fledge.model.transformer import CausalLM
from fledge.tokenizer.bpe import Tokenizer, train_bpe

SHAPES = {
    "tiny": ModelConfig("llama", 32000, 64, 128, 2, 4, 4, 16, 1024),
    "15M": ModelConfig("llama", 32000, 288, 768, 6, 6, 6, 48, 2048),
    "134M": ModelConfig("llama", 32000, 768, 2048, 12, 12, 12, 64, 2048, tie_word_embeddings=False),
}
THEIRS = "transformers"
# By itself it takes most of the memory for keys and values; this is room for 16,384 tokens.
CONTINUOUS = ("--continuous-batching", "--cb-block-size", "256", "--cb-num-blocks", "64")
VARIANTS = {
    f"{THEIRS} fp32": ("--dtype", "float32"),
    f"{THEIRS} bf16": ("--dtype", "bfloat16"),
    f"{THEIRS} fp32 continuous": ("--dtype", "float32", *CONTINUOUS),
    f"{THEIRS} bf16 continuous": ("--dtype", "bfloat16", *CONTINUOUS),
    "fledge fp32": ("--weights", "fp32"),
    "fledge bf16": ("--weights", "bf16"),
}
TEXT_MB = 8
PROMPT_WORDS = 24


@dataclass
class Answer:
    """When a request's first text and its end came, in seconds from its start."""

    first: float
    end: float
    chunks: int


@dataclass
class Asked:
    """A round: what came of all requests, and how long it took."""

    seconds: float
    answers: list[Answer]


def library_text() -> str:
    """Source of the standard library: as good as any text for a vocabulary and prompts."""
    texts, size = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if size < TEXT_MB * 1e6 and "site-packages" not in path.parts:
            texts.append(path.read_text("utf-8", errors="ignore"))
            size += len(texts[-1])
    return "\n".join(texts)


def save_random(directory: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Random weights that never choose to end: with rows of zeros the ends' scores are 0, never the best."""
    assert tokenizer.vocab_size <= config.vocab_size and tokenizer.end_of_turn_id is not None
    ends = [tokenizer.end_of_turn_id, tokenizer.eos_id]
    model = CausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
        for head in {model.lm_head.weight, model.model.embed_tokens.weight}:
            head[ends] = 0.0
    directory.mkdir()
    save_model(directory, model, tokenizer, {"stage": "bench"}, ends)


def command_of(variant: str, directory: Path, port: int, theirs: str | None) -> list[str]:
    """Starts a server."""
    place = ["--host", "127.0.0.1", "--port", str(port), *VARIANTS[variant]]
    if variant.startswith(THEIRS):
        assert theirs is not None
        start = "from transformers.cli.transformers import main; main()"
        return [theirs, "-c", start, "serve", str(directory), "--device", "cpu", *place]
    return [sys.executable, "-m", "fledge", "serve", "--model", str(directory), "--no-access-log", *place]


@dataclass
class Server:
    """One that runs, or is halted."""

    port: int
    process: subprocess.Popen[bytes]

    def halt(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)


@contextmanager
def starting(variant: str, directory: Path, threads: int, theirs: str | None) -> Iterator[Server]:
    """A server on a free port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as log:
        command = command_of(variant, directory, port, theirs)
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        server = Server(port, process)
        try:
            yield server
        except BaseException:
            log.seek(0)
            sys.stderr.buffer.write(log.read()[-4000:])
            raise
        finally:
            server.go_on()
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for(server: Server, variant: str) -> None:
    """Until the server listens."""
    ends = time.monotonic() + 120
    while time.monotonic() < ends and server.process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", server.port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"{variant} has not started")


async def pieces(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The chunks of an answer's body."""
    while size := int(await reader.readline(), 16):
        yield (await reader.readexactly(size + 2))[:-2]
    await reader.readline()


async def ask(port: int, model: str, prompt: str, tokens: int) -> Answer:
    """One streamed request over a connection of its own."""
    body = json.dumps(
        {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "stream": True}
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode() + body)
        status = await reader.readline()
        assert b" 200 " in status, status + await reader.read()
        while (await reader.readline()).strip():
            pass
        first, last, chunks = 0.0, b"", 0
        async for piece in pieces(reader):
            for event in piece.split(b"\n\n"):
                if event.startswith(b"data: {"):
                    chunks += 1
                    last = event
                    if not first and json.loads(event[6:])["choices"][0]["text"]:
                        first = time.perf_counter() - started
    finally:
        writer.close()
    assert chunks and first
    assert json.loads(last[6:])["choices"][0]["finish_reason"] == "length", last
    return Answer(first, time.perf_counter() - started, chunks)


async def one_round(port: int, model: str, prompts: list[str], clients: int, tokens: int) -> Asked:
    """All prompts, by `clients` at once."""
    waiting, answers = iter(prompts), list[Answer]()

    async def client() -> None:
        for prompt in waiting:
            answers.append(await ask(port, model, prompt, tokens))

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return Asked(time.perf_counter() - started, answers)


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least a share of all do not exceed."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, max(0, round(share * len(ranked) + 0.5) - 1))]


def measure(directory: Path, size: str, words: list[str], options: argparse.Namespace) -> None:
    """The tables of a size."""
    taken = iter(range(0, len(words) - PROMPT_WORDS, 7))

    def prompts(count: int) -> list[str]:
        starts = [next(taken) for _ in range(count)]
        return [" ".join(words[start : start + PROMPT_WORDS]) for start in starts]

    with ExitStack() as stack:
        servers = {
            variant: stack.enter_context(starting(variant, directory, options.threads, options.transformers))
            for variant in options.variants
        }
        for variant, server in servers.items():
            wait_for(server, variant)
        for server in servers.values():
            server.halt()
        rounds: dict[tuple[int, str], list[Asked]] = {}
        for number in range(options.rounds + 1):
            for clients in options.clients:
                for variant, server in servers.items():
                    # The first round loads and compiles.
                    count = max(options.requests, clients) if number else min(2, clients)
                    tokens = options.tokens if number else 8
                    model = str(directory) if variant.startswith(THEIRS) else directory.name
                    server.go_on()
                    made = asyncio.run(one_round(server.port, model, prompts(count), clients, tokens))
                    server.halt()
                    if number:
                        rounds.setdefault((clients, variant), []).append(made)
                        speed = len(made.answers) * tokens / made.seconds
                        done = f"{size}, {clients} clients, round {number}: {variant} {speed:,.0f} tokens/s"
                        print(done, file=sys.stderr, flush=True)
    for clients in options.clients:
        show(size, clients, {v: rounds[clients, v] for v in servers}, options.tokens)


def show(size: str, clients: int, rounds: dict[str, list[Asked]], tokens: int) -> None:
    """One table."""
    speeds = {
        variant: [len(one.answers) * tokens / one.seconds for one in made] for variant, made in rounds.items()
    }
    best = max((statistics.median(speeds[v]) for v in rounds if v.startswith(THEIRS)), default=None)
    columns = ("tokens/s", "from", "to", "times their best", "requests/s", "first text p50, ms", "p95, ms")
    table = Table("", *columns, title=f"{size}, {clients} clients", title_justify="left")
    for variant, made in rounds.items():
        speed = statistics.median(speeds[variant])
        firsts = [answer.first for one in made for answer in one.answers]
        table.add_row(
            variant, f"{speed:,.0f}", f"{min(speeds[variant]):,.0f}", f"{max(speeds[variant]):,.0f}",
            f"{speed / best:.2f}" if best else "", f"{speed / tokens:.2f}",
            f"{1e3 * percentile(firsts, 0.5):,.0f}", f"{1e3 * percentile(firsts, 0.95):,.0f}",
        )  # fmt: skip
    Console(width=130).print(table)


def main() -> None:
    parser: Any = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--transformers", help="Python with transformers[serving]; without: fledge alone")
    parser.add_argument("--sizes", nargs="+", default=["15M", "134M"], choices=list(SHAPES))
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=3, help="of a round, at least one a client")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # servers that are halted must not be left behind
    if options.transformers is None:
        options.variants = [v for v in options.variants if not v.startswith(THEIRS)]
    text = library_text()
    tokenizer = train_bpe([text], 32000)
    words = text.split()
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes:
            directory = Path(folder) / size
            save_random(directory, SHAPES[size], tokenizer)
            measure(directory, size, words, options)


if __name__ == "__main__":
    main()
