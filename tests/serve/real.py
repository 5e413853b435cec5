"""A real server of tiny models, on a free port, in a thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import torch
import uvicorn

from fledge.model.checkpoint import save_model
from fledge.model.config import ModelConfig
from fledge.model.heads import RewardModel
from fledge.model.transformer import CausalLM
from fledge.rewards.reward_model import save_reward_model
from fledge.serve.app import make_app
from fledge.serve.guard import Limits
from fledge.serve.keys import Doorkeeper
from fledge.serve.models import Served, load_served
from fledge.serve.relay import Relay
from fledge.serve.running import new_server, run
from fledge.serve.service import Service
from fledge.serve.turns import Turns
from fledge.tokenizer.bpe import Tokenizer, train_bpe
from fledge.web.listening import address_of, listen

TEXT = (
    "The café sells naïve 漢字 books. The cats sat; the cats ate. Hello, hello 🙂🙂! "
    '{"name": "weather", "arguments": {"city": "Paris", "days": 3}} true false null '
)
CONTEXT = 1024
JSON = {"content-type": "application/json"}


def make_tokenizer() -> Tokenizer:
    return train_bpe([TEXT] * 3, 400)


def save_random_model(
    directory: Path, tokenizer: Tokenizer, context: int = CONTEXT, tied: bool = True
) -> CausalLM:
    """Weights large enough that every part of the model shows in its scores."""
    size = tokenizer.vocab_size
    config = ModelConfig("qwen3", size, 32, 48, 2, 4, 2, 8, context, tie_word_embeddings=tied)
    model = CausalLM(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.25, generator=generator)
    directory.mkdir(parents=True)
    assert tokenizer.end_of_turn_id is not None
    save_model(directory, model, tokenizer, {"stage": "sft"}, [tokenizer.end_of_turn_id, tokenizer.eos_id])
    return model


def save_random_judge(directory: Path, tokenizer: Tokenizer) -> None:
    config = ModelConfig("qwen3", tokenizer.vocab_size, 32, 48, 2, 4, 2, 8, CONTEXT)
    directory.mkdir(parents=True)
    model = RewardModel(CausalLM(config), torch.Generator().manual_seed(0))
    origin = {"stage": "reward"}
    save_reward_model(
        directory, 0, model=model, tokenizer=tokenizer, origin=origin, base=directory, offset=0.5
    )


@dataclass
class Serving:
    """A running server."""

    url: str
    service: Service
    server: uvicorn.Server
    thread: threading.Thread
    lines: list[str]

    def client(self, **options: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=60, **options)

    def is_idle(self) -> bool:
        """Whether nothing is being made or waits."""
        free = all(
            not (served.worker._runs or served.worker.running) for served in self.service.models.values()
        )
        return free and not any(self.service.live.values())

    def until_idle(self, seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not self.is_idle():
            assert time.monotonic() < deadline, "goes on working"
            time.sleep(0.01)

    def post(self, path: str, body: Any, **options: Any) -> httpx2.Response:
        with self.client() as client:
            return client.post(path, json=body, **options)


def load(directory: Path, name: str = "tiny", rows: int = 4, **more: Any) -> Served:
    options = {"context": None, "answer_tokens": None, "compute_dtype": None, "turns": Turns(), **more}
    return load_served(name, directory, device=torch.device("cpu"), rows=rows, **options)


@contextmanager
def serving(
    *models: Served, queue: int = 64, keys: tuple[str, ...] = (), origins: tuple[str, ...] = (),
    limits: Limits | None = None, relay: Relay | None = None, stop_seconds: float = 5.0,
    idle_seconds: float = 60.0,
) -> Iterator[Serving]:  # fmt: skip
    """The models behind a port of their own."""
    service, lines = Service({served.name: served for served in models}, queue, relay), list[str]()
    app = make_app(
        service, limits=limits or Limits(), door=Doorkeeper(keys, True, origins), origins=origins,
        log=lines.append,
    )  # fmt: skip
    listening = listen("127.0.0.1", 0)
    server = new_server(app, stop_seconds, idle_seconds)
    thread = threading.Thread(
        target=lambda: asyncio.run(run(server, service, listening, stop_seconds, idle_seconds))
    )
    thread.start()
    try:
        yield Serving(address_of(listening), service, server, thread, lines)
    finally:
        server.should_exit = True
        thread.join(30)
        for served in models:
            served.worker.close()
        listening.close()
        assert not thread.is_alive()


def events(response: httpx2.Response) -> list[str]:
    """The data of a stream's events."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]
