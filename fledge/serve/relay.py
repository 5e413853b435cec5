"""Models of other OpenAI-compatible servers, offered beside the own ones: requests are passed on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from fledge.errors import UserError
from fledge.serve.errors import ApiError
from fledge.serve.responses import DONE, NOT_KEPT, event
from fledge.serve.visits import Visit, unless_gone, visit_of

CONNECT_SECONDS = 10.0
# How many requests the endpoint answers at once is its own affair. A connection is not used again at the
# moment at which servers close it (uvicorn after 5 s).
UNLIMITED = httpx2.Limits(max_keepalive_connections=100, keepalive_expiry=2.0)


class Endpoint:
    """A server (its address as http://localhost:9000/v1); `models` are those that it has, by name."""

    def __init__(
        self, address: str, key: str | None = None, *, socket_file: Path | None = None,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:  # fmt: skip
        """Asks for the models, at `socket_file` where the server listens on a Unix socket. Raises UserError
        for an address that has none to tell of."""
        self.address, self.socket_file = address.rstrip("/"), socket_file
        self.headers = {"authorization": f"Bearer {key}"} if key else {}
        if socket_file is not None:
            transport = httpx2.HTTPTransport(uds=str(socket_file))
        try:
            with httpx2.Client(headers=self.headers, timeout=CONNECT_SECONDS, transport=transport) as client:
                answer = client.get(f"{self.address}/models")
            answer.raise_for_status()
            found = [one for one in answer.json()["data"] if isinstance(one["id"], str)]
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--endpoint {address}: no list of models there ({_why(error)})") from None
        self.models: dict[str, dict[str, Any]] = {one["id"]: {"kind": "chat", **one} for one in found}
        self._client: httpx2.AsyncClient | None = None

    def client(self) -> httpx2.AsyncClient:
        """The connections to it, which are the event loop's."""
        if self._client is None:
            file = self.socket_file
            transport = None if file is None else httpx2.AsyncHTTPTransport(uds=str(file), limits=UNLIMITED)
            timeout = httpx2.Timeout(None, connect=CONNECT_SECONDS)  # requests have a limit of their own
            self._client = httpx2.AsyncClient(
                headers=self.headers, timeout=timeout, transport=transport, limits=UNLIMITED
            )
        return self._client

    async def pass_on(self, request: Request) -> Response:
        """Its answer to a request whose path begins with /v1. Raises ApiError (502) if it has none."""
        visit = visit_of(request)
        visit.ignored = []
        address = f"{self.address}{request.url.path.removeprefix('/v1')}"
        headers = {"content-type": "application/json", "x-request-id": visit.request_id}
        client = self.client()
        asked = client.build_request("POST", address, content=await request.body(), headers=headers)
        try:
            answer = await unless_gone(request, client.send(asked, stream=True))
            visit.ends.append(lambda: _close(answer))
            kind = answer.headers.get("content-type", "application/json")
            if kind.startswith("text/event-stream"):
                pieces = _pieces(answer, self.address, visit)
                return StreamingResponse(pieces, answer.status_code, NOT_KEPT, kind)
            body = await unless_gone(request, answer.aread())
        except httpx2.HTTPError as error:
            raise _gone(self.address, error) from None
        again = answer.headers.get("retry-after")
        return Response(body, answer.status_code, {"retry-after": again} if again else {}, kind)

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()


class Relay:
    """The ways to the models of endpoints; `models` are all of theirs, by name."""

    def __init__(self, *endpoints: Endpoint) -> None:
        """Raises UserError where two have a model of the same name."""
        self.endpoints = endpoints
        self.models: dict[str, dict[str, Any]] = {}
        for endpoint in endpoints:
            if both := sorted(set(self.models) & set(endpoint.models)):
                raise UserError(f"{both[0]!r} is also a model of {endpoint.address}; write --model NAME=DIR")
            self.models.update(endpoint.models)

    def endpoint_of(self, name: str | None) -> Endpoint:
        """The one that has a model; the first where none is named."""
        return next((one for one in self.endpoints if name in one.models), self.endpoints[0])

    async def close(self) -> None:
        """Close the connections."""
        for endpoint in self.endpoints:
            await endpoint.close()


async def _pieces(answer: httpx2.Response, address: str, visit: Visit) -> AsyncIterator[bytes]:
    """What the endpoint streams; where it breaks off, an error ends the stream."""
    try:
        async for piece in answer.aiter_bytes():
            yield piece
    except httpx2.HTTPError as error:
        visit.status = 502
        yield b"\n\n" + event(_gone(address, error).body()) + DONE


def _gone(address: str, error: Exception) -> ApiError:
    return ApiError(502, f"{address}: {_why(error)}", code="bad_gateway")


def _close(answer: httpx2.Response) -> None:
    """Tell the endpoint that nobody reads on."""
    task = asyncio.get_running_loop().create_task(answer.aclose())
    _CLOSING.add(task)
    task.add_done_callback(_CLOSING.discard)


_CLOSING: set[asyncio.Task[None]] = set()


def _why(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
