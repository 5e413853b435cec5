"""Which address does what."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from fledge.errors import UserError
from fledge.serve import generating, other
from fledge.serve.description import describe
from fledge.serve.errors import ApiError, broken
from fledge.serve.guard import Limits, guarded
from fledge.serve.keys import Doorkeeper
from fledge.serve.page import page_routes
from fledge.serve.responses import as_json
from fledge.serve.service import Service
from fledge.serve.visits import visit_of

Endpoint = Callable[[Service, Request], Awaitable[Response]]
GET: dict[str, Endpoint] = {
    "/health": other.health, "/metrics": other.metrics, "/v1/models": other.models,
    "/v1/models/{model:path}": other.model, "/tokenizer_info": other.tokenizer_info,
}  # fmt: skip
POST: dict[str, Endpoint] = {
    "/v1/completions": generating.completions, "/v1/chat/completions": generating.chat_completions,
    "/v1/embeddings": other.embeddings, "/v1/score": other.score, "/tokenize": other.tokenize,
    "/detokenize": other.detokenize, "/apply-template": other.apply_template,
}  # fmt: skip


def make_app(
    service: Service,
    *,
    limits: Limits,
    door: Doorkeeper,
    origins: Sequence[str] = (),
    corrections: Path | None = None,
    log: Callable[[str], None] | None = None,
) -> ASGIApp:
    """The server. `origins`: sites whose pages may use it; `corrections`: where the page stores them."""
    routes: list[BaseRoute] = [
        Route(path, functools.partial(_call, endpoint, service), methods=[method])
        for method, endpoints in (("GET", GET), ("POST", POST))
        for path, endpoint in endpoints.items()
    ]
    elsewhere = [] if service.relay is None else list(service.relay.models)
    description = as_json(describe([*service.models, *elsewhere]))

    async def described(request: Request) -> Response:
        return Response(description, media_type="application/json")

    routes.append(Route("/openapi.json", described, methods=["GET"]))
    writing = [name for name, served in service.models.items() if served.engine is not None] + elsewhere
    routes += page_routes(writing, corrections)
    handlers = {ApiError: _api_error, UserError: _mistake, HTTPException: _http_error, Exception: _broken}
    app = guarded(
        Starlette(routes=routes, exception_handlers=handlers),
        limits,
        door,
        service.metrics,
        log,
        service.visits,
    )
    if not origins:
        return app
    return CORSMiddleware(
        app, allow_origins=list(origins), allow_methods=["GET", "POST"], allow_headers=["*"],
        expose_headers=["x-request-id", "warning", "retry-after"],
    )  # fmt: skip


async def _call(endpoint: Endpoint, service: Service, request: Request) -> Response:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # A form of another site's page can be sent without asking the browser; JSON cannot.
    if request.method == "POST" and kind != "application/json":
        raise ApiError(415, "send JSON, with `Content-Type: application/json`", code="unsupported_media_type")
    return await endpoint(service, request)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return Response(as_json(error.body()), error.status, error.headers, "application/json")


async def _mistake(request: Request, error: Exception) -> Response:
    return await _api_error(request, ApiError(400, str(error), code="invalid_value"))


async def _broken(request: Request, error: Exception) -> Response:
    return await _api_error(request, broken(visit_of(request).request_id))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path[:200]}"
    found = ApiError(error.status_code, message, headers=dict(error.headers or {}))
    return await _api_error(request, found)
