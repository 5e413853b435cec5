"""Sign-in by a personal link: who has it is the person; a cookie keeps it for the browser.

The cookie holds the link's secret itself, which the store checks at every request: a link that is revoked
ends at once, in every browser, and the server has no secret of its own to lose.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

DAYS = 90


def signed_in(request: Request, token: str, target: str = "/") -> Response:
    """The answer to a personal link that is valid: remember it, and go on without it in the address."""
    answer = RedirectResponse(target, 303)
    # Lax, not strict: a link from a mail must arrive signed in. Scripts cannot read it.
    answer.set_cookie(
        _name(request), token, max_age=DAYS * 86_400, httponly=True, samesite="lax",
        secure=request.url.scheme == "https",
    )  # fmt: skip
    return answer


def signed_out(request: Request, answer: Response) -> Response:
    """The same answer, which also makes this browser forget the person."""
    answer.delete_cookie(_name(request))
    return answer


def token_of(request: Request) -> str | None:
    """The secret of the link that this browser came with, if it did."""
    return request.cookies.get(_name(request))


def _name(request: Request) -> str:
    # Browsers share cookies between the ports of a host: two servers on one machine must not mix them up.
    return f"fledge-{request.url.port or request.url.scheme}"
