"""`fledge serve`: models behind an OpenAI-compatible address, and a page to talk with them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import uvicorn

from fledge.config import check_at_least
from fledge.device import keep_freed_memory, pick_device
from fledge.engine.products import QuantizeName, WeightsName, weights_type
from fledge.engine.remote import endpoint_key
from fledge.errors import UserError
from fledge.serve.app import make_app
from fledge.serve.guard import Limits
from fledge.serve.keys import Doorkeeper, is_loopback, read_keys
from fledge.serve.models import Served, load_served, named_directories
from fledge.serve.relay import Endpoint, Relay
from fledge.serve.running import BACKLOG, new_server, run
from fledge.serve.service import Service
from fledge.serve.turns import Turns, alone
from fledge.serve.vllm import VllmProcess, Wishes, check_directory, close_all, find_program
from fledge.web.listening import address_of, listen

# Completions made at once.
ROWS = 32


@dataclass(frozen=True, kw_only=True)
class Config:
    """Serve models to OpenAI's clients, and a chat page to browsers, until Ctrl-C."""

    model: tuple[str, ...] = ()
    """Model directories, as DIR or NAME=DIR; a reward model among them answers /v1/score."""
    engine: Literal["fledge", "vllm"] = "fledge"
    """What makes the answers: fledge itself, or vLLM (extra `vllm`), which it starts for each model."""
    endpoint: str | None = None
    """Address of another OpenAI-compatible server, as http://localhost:9000/v1: it has more models."""
    endpoint_key: str | None = None
    """Name of the environment variable that holds the endpoint's key."""
    host: str = "127.0.0.1"
    """Address to listen on; another one than this machine's own needs keys, and wants a proxy with TLS."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    key_file: Path | None = None
    """File of keys, one a line: who asks must send one."""
    key_variable: tuple[str, ...] = ()
    """Names of environment variables that hold keys."""
    allow_unauthenticated: bool = False
    """Let everybody who reaches --host in without a key."""
    cors: tuple[str, ...] = ()
    """Sites, as https://example.org, whose pages may use the server from a browser."""
    corrections: Path | None = None
    """JSONL file for what readers of the page write where an answer is wrong; without it they cannot."""
    at_once: int | None = None
    """Completions made at once, for each model; by default 32, fewer where memory lacks, or vLLM's number."""
    queue: int = 256
    """Completions that may wait for a place, for each model; more are refused (429)."""
    context: int | None = None
    """Tokens of a request, prompt and answer together; by default what the model reads and memory allows."""
    max_tokens: int | None = None
    """Longest answer in tokens; a request that asks for more gets as many."""
    body_mb: float = 4.0
    """Longest request in megabytes."""
    request_seconds: float = 600.0
    """Longest time for a request."""
    stop_seconds: float = 10.0
    """Time for running requests to end after Ctrl-C or SIGTERM."""
    access_log: bool = True
    """Write a line for every request to stderr, without anything of its contents."""
    weights: WeightsName | None = None
    """What weights are rounded to for speed: bf16 for many requests at once, fp16 for one at a time; by
    default fp32, while vLLM makes 16 bits of 32."""
    quantize: QuantizeName | None = None
    """Round weights to so many bits instead, to read fewer bytes for each token (on a CPU)."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:INDEX or mps."""
    vllm: str = "vllm"
    """The program of --engine vllm, by name or path, where it isn't in this environment or on PATH."""
    vllm_flags: str = ""
    """More flags for it, as --vllm-flags="--tensor-parallel-size 4"."""
    start_seconds: float = 1800.0
    """Longest time for vLLM to load a model."""


def main(config: Config) -> None:
    """Load, listen, and serve until SIGTERM or Ctrl-C."""
    check(config)
    keys = read_keys(config.key_file, {name: os.environ.get(name) for name in config.key_variable})
    only_local = is_loopback(config.host)
    if not (only_local or keys or config.allow_unauthenticated):
        raise UserError(
            f"--host {config.host}: others could use this server; give --key-file or --key-variable, "
            "or --allow-unauthenticated"
        )
    directories = named_directories(config.model) if config.model or config.endpoint is None else {}
    wishes = vllm_wishes(config, directories)
    endpoints = []
    if config.endpoint is not None:
        endpoints.append(Endpoint(config.endpoint, endpoint_key(config.endpoint_key, os.environ)))
        if both := sorted(set(directories) & set(endpoints[0].models)):
            raise UserError(f"--model: {both[0]!r} is also a model of the endpoint; write NAME=DIR")
    keep_freed_memory()
    with ExitStack() as stack:
        listening = stack.enter_context(listen(config.host, config.port, BACKLOG))
        before = signal.signal(signal.SIGTERM, ended)  # uvicorn takes it over, and hands it on at its end
        stack.callback(signal.signal, signal.SIGTERM, before or signal.SIG_DFL)
        turns = Turns(stack.enter_context(alone()))
        models: dict[str, Served] = {}
        stack.callback(close_models, models)
        processes: list[VllmProcess] = []
        stack.callback(close_all, processes)
        for name, directory in directories.items():
            if wishes is None:
                models[name] = load(name, directory, config, turns)
                log_line(loaded_line(models[name]))
            else:  # one after the other: each looks how much of the GPU's memory is free
                processes.append(VllmProcess(name, directory, wishes, log_line))
                endpoints.append(processes[-1].ready(config.start_seconds))
        service = Service(models, config.queue, Relay(*endpoints) if endpoints else None)
        app = make_app(
            service,
            limits=Limits(int(config.body_mb * 2**20), config.request_seconds),
            door=Doorkeeper(keys, only_local and not config.allow_unauthenticated, config.cors),
            origins=config.cors,
            corrections=config.corrections,
            log=log_line if config.access_log else None,
        )
        if not only_local:
            log_line("others can reach this server, and what they send is not encrypted")
        print(f"page {address_of(listening)}  API {address_of(listening)}/v1", flush=True)
        server = new_server(app, config.stop_seconds)
        end_with(processes, server)
        asyncio.run(run(server, service, listening, config.stop_seconds))
        if lost := next((process for process in processes if process.has_ended), None):
            raise lost.ended()


def check(config: Config) -> None:
    """Raises UserError for numbers without a meaning."""
    check_at_least(config, 0, "port", "queue", "stop_seconds")
    check_at_least(config, 1, "at_once", "context", "max_tokens", "request_seconds", "start_seconds")
    if not 0 < config.body_mb <= 1000:
        raise UserError(f"--body-mb {config.body_mb:g}: must be above 0 and at most 1000")


def vllm_wishes(config: Config, directories: Mapping[str, Path]) -> Wishes | None:
    """How vLLM is to run, None without it. Raises UserError for settings of the other engine, and for
    directories that vLLM cannot serve."""
    usual, with_vllm = Config(), config.engine == "vllm"
    for name in ("quantize", "queue") if with_vllm else ("vllm", "vllm_flags", "start_seconds"):
        if getattr(config, name) != getattr(usual, name):
            why = "leave it out with --engine vllm" if with_vllm else "it is for --engine vllm"
            raise UserError(f"--{name.replace('_', '-')}: {why}")
    if not with_vllm:
        return None
    if not directories:
        raise UserError("--engine vllm: name what it is to serve: --model DIR")
    program = find_program(config.vllm)
    for name, directory in directories.items():
        for doubt in check_directory(name, directory):
            log_line(f"{name}: vLLM may not serve it: {doubt}")
    return Wishes(
        program=program, weights=config.weights, context=config.context, rows=config.at_once,
        answer_tokens=config.max_tokens, device=config.device, share=len(directories),
        flags=config.vllm_flags,
    )  # fmt: skip


def end_with(processes: Sequence[VllmProcess], server: uvicorn.Server) -> None:
    """End the server once one of the processes has ended."""

    def end() -> None:
        server.should_exit = True

    for process in processes:
        process.when_ended = end
        if process.has_ended:
            end()


def close_models(models: Mapping[str, Served]) -> None:
    """End them all: none waits for a call of another before it hears of it."""
    for served in models.values():
        served.worker.begin_to_close()
    for served in models.values():
        served.worker.close()


def ended(number: int, frame: object) -> None:
    """What SIGTERM means: a good end."""
    raise SystemExit(0)


def load(name: str, directory: Path, config: Config, turns: Turns) -> Served:
    """A model, ready to work."""
    return load_served(
        name,
        directory,
        device=pick_device(config.device),
        compute_dtype=weights_type(config.weights or "fp32", config.quantize),
        rows=config.at_once or ROWS,
        context=config.context,
        answer_tokens=config.max_tokens,
        turns=turns,
    )


def loaded_line(served: Served) -> str:
    """What was loaded, in a line."""
    if served.worker.scheduler is None:
        return f"{served.name}: reward model {served.directory}"
    rows = served.worker.scheduler.slots.rows
    return f"{served.name}: {served.directory}, {rows} at once, up to {served.room.tokens:,} tokens each"


def log_line(line: str) -> None:
    """Write a line of the access log."""
    print(line, file=sys.stderr, flush=True)
