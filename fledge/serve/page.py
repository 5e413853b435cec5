"""The chat page: one template, its scripts and styles, and the file that corrections go to.

The page is a client like any other: it talks to `/v1/models` and `/v1/chat/completions` of its own server.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fledge.errors import UserError
from fledge.serve.corrections import CorrectionFile, correction_row
from fledge.web.pages import asset, environment, page
from fledge.web.security import json_body, protected

TEMPLATES = environment("fledge.serve")
FOLDERS = [Path(__file__).parent / "pages", Path(__file__).parents[1] / "web" / "assets"]


def page_routes(models: Sequence[str], corrections: Path | None) -> list[Route]:
    """`/`, `/assets/{name}` and `/corrections`, with the headers that keep a page from running anything else.

    `models` are the names that corrections may be about; they go to the file `corrections`, or, where it is
    None, the page doesn't offer them. Keys are not checked here. Raises UserError for a file that cannot be
    written.
    """
    names = tuple(models)
    file = None if corrections is None else CorrectionFile(corrections)

    def chat(request: Request) -> Response:
        return page(TEMPLATES, "chat.html", corrections=file is not None)

    def assets(request: Request) -> Response:
        return asset(FOLDERS, request.path_params["name"]) or _error("there is no such file", 404)

    async def correct(request: Request) -> Response:
        if file is None:
            return _error("this server keeps no corrections; start it with --corrections FILE", 404)
        try:
            body = await json_body(request)
            row = correction_row(body, names)
            key = body.get("key")
            await run_in_threadpool(file.add, row, key if isinstance(key, str) else "")
        except UserError as error:
            return _error(str(error), 400)
        except OSError as error:
            return _error(f"{file.path.name}: cannot be written: {error.strerror}", 500)
        return JSONResponse({"stored": True})

    guard = [Middleware(protected)]
    return [
        Route("/", chat, middleware=guard),
        Route("/assets/{name}", assets, middleware=guard),
        Route("/corrections", correct, methods=["POST"], middleware=guard),
    ]


def _error(message: str, status: int) -> Response:
    """An error in OpenAI's shape, as all of the server's are."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": error}, status)
