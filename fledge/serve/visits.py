"""A request from its first byte to its last: its number, what it holds, what is told about it."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

T = TypeVar("T")
_ID = re.compile(r"[A-Za-z0-9._-]{1,100}")


@dataclass(eq=False)
class Visit:
    """What is known about a request. `ends` are called at its end, however it ends."""

    request_id: str
    started: float = field(default_factory=time.monotonic)
    model: str = ""
    status: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_seconds: float | None = None
    ignored: list[str] = field(default_factory=list)
    ends: list[Callable[[], None]] = field(default_factory=list)
    limit: asyncio.Timeout | None = None
    stopped: bool = False

    def first_token(self) -> None:
        """Something was made."""
        if self.first_token_seconds is None:
            self.first_token_seconds = time.monotonic() - self.started

    def stop(self) -> None:
        """Its time is up: the server ends."""
        self.stopped = True
        if self.limit is not None:
            self.limit.reschedule(asyncio.get_running_loop().time())

    def end(self) -> None:
        """Give back what the request holds."""
        while self.ends:
            self.ends.pop()()


def new_visit(headers: Mapping[str, str]) -> Visit:
    """With the client's own number, if it has a plain one."""
    given = headers.get("x-request-id", "")
    return Visit(given if _ID.fullmatch(given) else f"req_{secrets.token_hex(12)}")


def visit_of(request: Request) -> Visit:
    """The visit that a request is."""
    visit: Visit = request.scope["fledge.visit"]
    return visit


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What the work gives. Raises ClientDisconnect, and cancels the work, when the client goes before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks: list[asyncio.Future[Any]] = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        result: T = tasks[0].result()
        return result
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
