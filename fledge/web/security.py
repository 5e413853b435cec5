"""What every answer of a server carries, and what it refuses: headers, requests from other pages, size."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fledge.errors import UserError

# Scripts and styles come from files of this server alone; no page may be framed, and no script may make
# HTML out of text (trusted types), so that a fault in a page of ours still runs nothing.
CONTENT_SECURITY_POLICY = "; ".join([
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'", "connect-src 'self'",
    "form-action 'self'", "base-uri 'none'", "frame-ancestors 'none'",
    "require-trusted-types-for 'script'", "trusted-types 'none'",
])  # fmt: skip
HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",  # a personal link must not travel on
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
MAX_BODY_BYTES = 4_000_000


def protected(app: ASGIApp) -> ASGIApp:
    """The same server, with `HEADERS` on every answer, that refuses what another site's page asks it to
    change: the browser says where such a request comes from, or it isn't JSON."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refused = _refusal(scope["method"], Headers(scope=scope))
        if refused is None:
            await app(scope, receive, send_with_headers)
        else:
            await JSONResponse({"error": refused}, 403)(scope, receive, send_with_headers)

    return serve


def _refusal(method: str, headers: Headers) -> str | None:
    if method in ("GET", "HEAD"):
        return None
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != headers.get("host"):
        return "this request comes from another site"
    if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        return "send application/json"
    return None


async def json_body(request: Request) -> dict[str, Any]:
    """The JSON object that a request carries; UserError for anything else, or for more than 4 MB."""
    body = b""
    async for block in request.stream():
        body += block
        if len(body) > MAX_BODY_BYTES:
            raise UserError(f"the request is longer than {MAX_BODY_BYTES:,} bytes; shorten the text")
    try:
        value = json.loads(body)
        json.dumps(value, ensure_ascii=False).encode()  # no halves of characters
    except (ValueError, RecursionError):
        raise UserError("the request is no valid JSON; reload the page") from None
    if not isinstance(value, dict):
        raise UserError("the request is no JSON object; reload the page")
    return value
