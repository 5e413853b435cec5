"""The server on its port: started, watched, and ended in good order."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from fledge.serve.errors import stopping
from fledge.serve.service import Service

# Connections on which no request is under way for as long are closed; uvicorn does so with those that have
# had an answer, and here those that never send a whole request.
IDLE_SECONDS = 60.0
# Connections that wait to be taken.
BACKLOG = 1024
# What a closed connection has to take what was sent.
CLOSING_SECONDS = 5.0


def new_server(app: ASGIApp, stop_seconds: float, idle_seconds: float = IDLE_SECONDS) -> uvicorn.Server:
    """A server of an app that logs nothing itself."""
    options = uvicorn.Config(
        app, log_config=None, log_level="critical", access_log=False, lifespan="off", ws="none",
        server_header=False, timeout_keep_alive=int(idle_seconds),
        timeout_graceful_shutdown=int(stop_seconds) + 5,
    )  # fmt: skip
    return uvicorn.Server(options)


async def run(
    server: uvicorn.Server, service: Service, listening: socket.socket, stop_seconds: float,
    idle_seconds: float = IDLE_SECONDS,
) -> None:  # fmt: skip
    """Serve until SIGTERM, Ctrl-C or `server.should_exit`. Then no request is taken any more; those that run
    have `stop_seconds` to end, and are told so if they don't. A second Ctrl-C ends at once."""
    tasks = [
        asyncio.create_task(end_in_time(lambda: server.should_exit, service, stop_seconds)),
        asyncio.create_task(close_idle(server, idle_seconds)),
    ]
    try:
        await server.serve(sockets=[listening])
    finally:
        for task in tasks:
            task.cancel()
        if service.relay is not None:
            await service.relay.close()


async def end_in_time(should_exit: Callable[[], bool], service: Service, seconds: float) -> None:
    """Once the server is to end: take no more requests, and end those that take longer."""
    while not should_exit():
        await asyncio.sleep(0.05)
    service.stopping = True
    deadline = time.monotonic() + seconds
    while service.visits and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    for served in service.models.values():
        served.worker.end_all(stopping())
    await asyncio.sleep(0.1)  # what they tell is told by the requests themselves
    for visit in list(service.visits):  # those that others answer
        visit.stop()


async def close_idle(server: uvicorn.Server, seconds: float) -> None:
    """Close connections that wait for half a request, or for a client to take what was sent."""
    since: dict[Any, tuple[Any, float]] = {}
    while True:
        await asyncio.sleep(min(1.0, seconds / 4))
        now, seen = time.monotonic(), dict[Any, tuple[Any, float]]()
        for connection in list(server.server_state.connections):
            cycle = getattr(connection, "cycle", None)
            transport = getattr(connection, "transport", None)
            is_closing = transport is not None and transport.is_closing()
            if transport is None or not (cycle is None or cycle.response_complete or is_closing):
                continue
            state = (id(cycle), is_closing)
            before, at = since.get(connection, (state, now))
            seen[connection] = (state, at if before == state else now)
            if now - seen[connection][1] > (CLOSING_SECONDS if is_closing else seconds + 1):
                transport.abort()
        since = seen
