"""Many streams for a while, and searches among them."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fledge.engine.beam import Beams, beam_search
from fledge.engine.engine import Engine
from fledge.types import SamplingParams

from .real import Serving, events, load, make_tokenizer, save_random_model, serving

STREAMS = 64
SECONDS = 60.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    path = tmp_path_factory.mktemp("served") / "tiny"
    save_random_model(path, make_tokenizer(), context=4096)
    with serving(load(path, rows=16), queue=STREAMS) as server:
        yield server


def engine_of(server: Serving) -> Engine:
    served = server.service.models["tiny"].engine
    assert served is not None
    return Engine(served.model, served.eos_ids)


def memory_bytes() -> int:
    """What this process, server and clients, holds of the machine's memory."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


@pytest.mark.slow
def test_64_streams_for_a_minute(server: Serving) -> None:
    tokenizer, engine = server.service.models["tiny"].tokenizer, engine_of(server)
    rng = random.Random(0)
    prompts = [tokenizer.encode(f"The cats {i}; Hello") for i in range(STREAMS)]
    alone = [
        made.ids
        for prompt in prompts
        for made in engine.generate([prompt], SamplingParams(temperature=0, max_tokens=40))
    ]
    ends = time.monotonic() + SECONDS
    finished = [0] * STREAMS
    held: list[int] = []

    def ask(i: int, length: int) -> None:
        with server.client() as client:
            while time.monotonic() < ends or finished[i] < 2:
                body: dict[str, Any] = {
                    "prompt": prompts[i], "temperature": 0, "max_tokens": length, "stream": True,
                    "return_token_ids": True,
                }  # fmt: skip
                lines = events(client.post("/v1/completions", json=body))
                choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
                assert [token_id for one in choices for token_id in one["token_ids"]] == alone[i][:length]
                assert lines[-1] == "[DONE]" and choices[-1]["finish_reason"] in ("stop", "length")
                finished[i] += 1

    def watch() -> None:
        while time.monotonic() < ends:
            time.sleep(SECONDS / 10)
            held.append(memory_bytes())

    watching = threading.Thread(target=watch)
    watching.start()
    with ThreadPoolExecutor(STREAMS) as pool:
        for made in [pool.submit(ask, i, rng.randint(5, 40)) for i in range(STREAMS)]:
            made.result()
    watching.join()
    assert min(finished) >= 2
    # After the first part nothing grows any more: 10 MB for the allocator's moods.
    assert held[-1] - held[len(held) // 2] < 10_000_000
    server.until_idle()


def test_a_search_lets_others_go_on(server: Serving) -> None:
    prompt = server.service.models["tiny"].tokenizer.encode("The cats")
    search = {"prompt": prompt, "max_tokens": 150, "n": 3, "use_beam_search": True, "ignore_eos": True}
    search["return_token_ids"] = True
    made: dict[str, Any] = {}
    thread = threading.Thread(target=lambda: made.update(server.post("/v1/completions", search).json()))
    thread.start()
    while not server.service.live.get("tiny"):
        time.sleep(0.001)
    for _ in range(3):
        body = {"prompt": "The", "max_tokens": 3, "ignore_eos": True}
        assert server.post("/v1/completions", body).json()["usage"]["completion_tokens"] == 3
    thread.join()
    params = SamplingParams(max_tokens=150, n=3, ignore_eos=True)
    expected = beam_search(engine_of(server), [prompt], params, Beams(3))[0]
    assert [choice["token_ids"] for choice in made["choices"]] == [one.completion.ids for one in expected]


def test_a_search_that_nobody_waits_for_ends(server: Serving) -> None:
    body = {"prompt": "The", "max_tokens": 4000, "n": 8, "use_beam_search": True, "ignore_eos": True}
    with server.client() as client, pytest.raises(Exception, match="timed out"):
        client.post("/v1/completions", json=body, timeout=0.03)
    started = time.monotonic()
    assert server.post("/v1/embeddings", {"input": "The"}).status_code == 200  # it waits for the search
    assert time.monotonic() - started < 20
    server.until_idle()
