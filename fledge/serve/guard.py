"""What stands around every request: who may ask, how much it may send, how long it takes, what is logged."""

from __future__ import annotations

import asyncio
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fledge.serve.errors import ApiError, broken, stopping, timed_out
from fledge.serve.keys import Doorkeeper
from fledge.serve.metrics import Histogram, Metrics
from fledge.serve.responses import DONE, as_json, event
from fledge.serve.visits import Visit, new_visit

# A client that takes this long for the next part of its request has gone.
BODY_SECONDS = 30.0
# What a client has to take the end of a stream that was cut off.
FAREWELL_SECONDS = 1.0


@dataclass(frozen=True)
class Limits:
    """What a request may be."""

    body_bytes: int = 4 * 2**20
    seconds: float = 600.0
    body_seconds: float = BODY_SECONDS


class _Answer:
    """What was sent so far."""

    def __init__(self, send: Send, visit: Visit) -> None:
        self._send, self._visit = send, visit
        self.started = self.ended = self.is_stream = False

    async def send(self, message: Message) -> None:
        """Pass on, with the headers that every answer has."""
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._visit.request_id
            headers.setdefault("x-content-type-options", "nosniff")
            if self._visit.ignored:
                names = ", ".join(self._visit.ignored)[:500].encode("ascii", "backslashreplace").decode()
                shown = "".join(c for c in names if c.isprintable() and c not in '"\\')
                headers["warning"] = f'199 fledge "ignored fields: {shown}"'
            self.is_stream = headers.get("content-type", "").startswith("text/event-stream")
            self._visit.status = message["status"]
            self.started = True
        elif not message.get("more_body", False):
            self.ended = True
        await self._send(message)

    async def fail(self, error: ApiError) -> None:
        """Tell an error: as an answer, as the last event of a stream, or by breaking off."""
        self._visit.status = error.status
        if not self.started:
            headers = {"content-type": "application/json", **error.headers}
            raw = [(name.encode(), value.encode()) for name, value in headers.items()]
            await self.send({"type": "http.response.start", "status": error.status, "headers": raw})
            await self.send({"type": "http.response.body", "body": as_json(error.body())})
        elif self.is_stream and not self.ended:
            self.ended = True
            body = event(error.body()) + DONE
            await asyncio.wait_for(
                self._send({"type": "http.response.body", "body": body, "more_body": False}), FAREWELL_SECONDS
            )


def guarded(
    app: ASGIApp, limits: Limits, door: Doorkeeper, metrics: Metrics, log: Callable[[str], None] | None,
    visits: set[Visit],
) -> ASGIApp:  # fmt: skip
    """The same server with limits; `log` takes a line for every request, without anything of its contents;
    `visits` are kept to be those that are under way."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        visit = new_visit(headers)
        scope["fledge.visit"] = visit
        answer = _Answer(send, visit)
        try:
            door.check(scope["method"], scope["path"], headers)
            _check_length(headers, limits.body_bytes)
            async with asyncio.timeout(limits.seconds) as visit.limit:
                visits.add(visit)
                await app(scope, _bounded(receive, limits), answer.send)
        except ClientDisconnect:
            visit.status = 499  # as nginx calls it
        except TimeoutError:
            await _told(answer, stopping() if visit.stopped else timed_out(limits.seconds))
        except ApiError as error:
            await _told(answer, error)
        except Exception:
            print(f"request {visit.request_id}: {traceback.format_exc()}", file=sys.stderr, flush=True)
            await _told(answer, broken(visit.request_id))
        finally:
            visits.discard(visit)
            visit.end()
            if answer.started and not answer.ended and visit.status == 200:
                visit.status = 499
            _note(scope, visit, metrics, log)

    return serve


async def _told(answer: _Answer, error: ApiError) -> None:
    try:
        await answer.fail(error)
    except (TimeoutError, OSError):
        return  # nobody takes it


def _check_length(headers: Headers, most: int) -> None:
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise _too_long(most)


def _too_long(most: int) -> ApiError:
    return ApiError(413, f"the request is longer than {most:,} bytes", code="request_too_large")


def _bounded(receive: Receive, limits: Limits) -> Receive:
    """The body, as long as it is short and comes."""
    seen, whole = 0, False

    async def bounded() -> Message:
        nonlocal seen, whole
        if whole:  # what comes now is that the client goes
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), limits.body_seconds)
        except TimeoutError:
            raise ApiError(408, "the rest of the request did not come", code="timeout") from None
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if seen > limits.body_bytes:
                raise _too_long(limits.body_bytes)
        return message

    return bounded


def _note(scope: Scope, visit: Visit, metrics: Metrics, log: Callable[[str], None] | None) -> None:
    """Count and log what was."""
    seconds = time.monotonic() - visit.started
    route = scope.get("route")
    path = getattr(route, "path", None) or "other"
    metrics.requests[path, visit.model, visit.status] += 1
    metrics.left += visit.status == 499
    if visit.model:
        metrics.prompt_tokens[visit.model] += visit.prompt_tokens
        metrics.completion_tokens[visit.model] += visit.completion_tokens
        metrics.seconds.setdefault(visit.model, Histogram()).observe(seconds)
        if visit.first_token_seconds is not None:
            first = metrics.first_token.setdefault(visit.model, Histogram())
            first.observe(visit.first_token_seconds)
    if log is None:
        return
    client = (scope.get("client") or ("-",))[0]
    tokens = f" {visit.prompt_tokens}+{visit.completion_tokens} tokens" if visit.model else ""
    at = time.strftime("%Y-%m-%dT%H:%M:%S")
    what = f"{scope['method']} {path}" + (f" {visit.model}" if visit.model else "")
    log(f"{at} {client} {visit.request_id} {what} {visit.status} {seconds:.3f} s{tokens}")
