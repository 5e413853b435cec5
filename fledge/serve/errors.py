"""What goes wrong with a request, as OpenAI's error object."""

from __future__ import annotations

from typing import Any

# OpenAI's names for kinds of errors, by status.
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "server_error",
    503: "server_error",
    504: "server_error",
}


class ApiError(Exception):
    """An answer that is no success: HTTP's status, a message, the field it is about, a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def busy(message: str, seconds: int) -> ApiError:
    """There is no room: come again after some seconds."""
    return ApiError(429, message, code="rate_limit_exceeded", headers={"retry-after": str(seconds)})


def stopping() -> ApiError:
    """The server is about to end."""
    return ApiError(503, "the server is stopping", code="shutting_down", headers={"retry-after": "10"})


def timed_out(seconds: float) -> ApiError:
    """The request took longer than the server allows."""
    return ApiError(504, f"the request took longer than {seconds:g} seconds", code="timeout")


def broken(request_id: str) -> ApiError:
    """The server's own fault: the details are in its log only."""
    return ApiError(500, f"internal error; the server's log has it under {request_id}", code="internal_error")
