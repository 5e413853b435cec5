"""Many streams at once: all complete, each says what it says alone, and the memory stays as it is."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from .live import Server, served

STREAMS = 64
SECONDS = float(os.environ.get("FLEDGE_TEST_STREAM_SECONDS", "20"))
QUESTIONS = [
    *("Say hello.", "Count to twelve.", "A person as JSON.", "What is the weather in Paris?"),
    *(f"Tell me about the number {n}, and about {n * n}." for n in range(12)),
]


def body(place: int) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": QUESTIONS[place % len(QUESTIONS)]}], "temperature": 0,
        "max_tokens": 16 + 8 * (place % 5), "stream": True, "ignore_eos": place % 3 == 0,
    }  # fmt: skip


async def text_of(client: httpx2.AsyncClient, place: int) -> tuple[str, str]:
    """What a stream says, and why it ended."""
    text, reasons, is_done = "", [], False
    async with client.stream("POST", "/chat/completions", json=body(place)) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            assert not is_done or not line
            if line == "data: [DONE]":
                is_done = True
            elif line:
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                text += choice["delta"].get("content") or ""
                reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    assert is_done and len(reasons) == 1
    return text, reasons[0]


async def burden(server: Server) -> tuple[int, list[int]]:
    """Streams that completed, and the memory after each tenth of the time."""
    limits = httpx2.Limits(max_connections=STREAMS)
    async with httpx2.AsyncClient(base_url=server.v1, timeout=60, limits=limits) as client:
        alone = [await text_of(client, place) for place in range(STREAMS)]
        for _ in range(2):  # fills what is filled once: pools, threads, the cache's pages
            await asyncio.gather(*(text_of(client, place) for place in range(STREAMS)))
        ends, completed, memory = time.monotonic() + SECONDS, 0, list[int]()

        async def ask_on(number: int) -> None:
            nonlocal completed
            place = number
            while time.monotonic() < ends:
                assert await text_of(client, place % len(alone)) == alone[place % len(alone)]
                completed += 1
                place += STREAMS + 1

        async def watch() -> None:
            while time.monotonic() < ends:
                await asyncio.sleep(SECONDS / 10)
                memory.append(server.resident_bytes())

        await asyncio.gather(watch(), *(ask_on(number) for number in range(STREAMS)))
    return completed, memory


@pytest.mark.slow
def test_many_streams(assistant: Path) -> None:
    with served("--model", assistant, "--at-once", 32, "--context", 128) as server:
        completed, memory = asyncio.run(burden(server))
        metrics = httpx2.get(f"{server.url}/metrics").text
    print(f"{completed} streams in {SECONDS:g} s; MB: {[round(size / 1e6) for size in memory]}")
    assert completed >= STREAMS
    # Pools, threads and the allocator fill for the first 8,000 streams or so; from then on nothing grows.
    assert max(memory) - memory[0] < 150e6, memory
    assert completed < 10_000 or max(memory[-3:]) - min(memory[-3:]) < 8e6
    assert 'fledge_running{model="assistant"} 0' in metrics
    assert 'fledge_waiting{model="assistant"} 0' in metrics
