"""`fledge serve`: models behind an OpenAI-compatible address, and a page to talk with them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from fledge.config import check_at_least
from fledge.device import keep_freed_memory, pick_device
from fledge.engine.products import QuantizeName, WeightsName, weights_type
from fledge.engine.remote import endpoint_key
from fledge.errors import UserError
from fledge.serve.app import make_app
from fledge.serve.guard import Limits
from fledge.serve.keys import Doorkeeper, is_loopback, read_keys
from fledge.serve.models import Served, load_served, named_directories
from fledge.serve.relay import Relay
from fledge.serve.running import BACKLOG, new_server, run
from fledge.serve.service import Service
from fledge.web.listening import address_of, listen


@dataclass(frozen=True, kw_only=True)
class Config:
    """Serve models to OpenAI's clients, and a chat page to browsers, until Ctrl-C."""

    model: tuple[str, ...] = ()
    """Model directories, as DIR or NAME=DIR; a reward model among them answers /v1/score."""
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
    at_once: int = 32
    """Completions made at once, for each model; fewer where memory for their keys and values lacks."""
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
    weights: WeightsName = "fp32"
    """What weights are rounded to for speed: bf16 for many requests at once, fp16 for one at a time."""
    quantize: QuantizeName | None = None
    """Round weights to so many bits instead, to read fewer bytes for each token (on a CPU)."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:INDEX or mps."""


def main(config: Config) -> None:
    """Load, listen, and serve until SIGTERM or Ctrl-C."""
    check_at_least(config, 0, "port", "queue", "stop_seconds")
    check_at_least(config, 1, "at_once", "context", "max_tokens", "request_seconds")
    if not 0 < config.body_mb <= 1000:
        raise UserError(f"--body-mb {config.body_mb:g}: must be above 0 and at most 1000")
    keys = read_keys(config.key_file, {name: os.environ.get(name) for name in config.key_variable})
    only_local = is_loopback(config.host)
    if not (only_local or keys or config.allow_unauthenticated):
        raise UserError(
            f"--host {config.host}: others could use this server; give --key-file or --key-variable, "
            "or --allow-unauthenticated"
        )
    directories = named_directories(config.model) if config.model or config.endpoint is None else {}
    relay = None
    if config.endpoint is not None:
        relay = Relay(config.endpoint, endpoint_key(config.endpoint_key, os.environ))
        if both := sorted(set(directories) & set(relay.models)):
            raise UserError(f"--model: {both[0]!r} is also a model of the endpoint; write NAME=DIR")
    keep_freed_memory()
    listening = listen(config.host, config.port, BACKLOG)
    models: dict[str, Served] = {}
    try:
        for name, directory in directories.items():
            models[name] = load(name, directory, config)
            print(loaded_line(models[name]), file=sys.stderr, flush=True)
        service = Service(models, config.queue, relay)
        app = make_app(
            service,
            limits=Limits(int(config.body_mb * 2**20), config.request_seconds),
            door=Doorkeeper(keys, only_local and not config.allow_unauthenticated, config.cors),
            origins=config.cors,
            corrections=config.corrections,
            log=log_line if config.access_log else None,
        )
        if not only_local:
            print(
                "others can reach this server, and what they send is not encrypted",
                file=sys.stderr,
            )
        print(f"page {address_of(listening)}  API {address_of(listening)}/v1", flush=True)
        signal.signal(signal.SIGTERM, ended)  # uvicorn hands the signal on once it has stopped
        server = new_server(app, config.stop_seconds)
        asyncio.run(run(server, service, listening, config.stop_seconds))
    finally:
        for served in models.values():
            served.worker.close()
        listening.close()


def ended(number: int, frame: object) -> None:
    """What SIGTERM means: a good end."""
    raise SystemExit(0)


def load(name: str, directory: Path, config: Config) -> Served:
    """A model, ready to work."""
    return load_served(
        name,
        directory,
        device=pick_device(config.device),
        compute_dtype=weights_type(config.weights, config.quantize),
        rows=config.at_once,
        context=config.context,
        answer_tokens=config.max_tokens,
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
