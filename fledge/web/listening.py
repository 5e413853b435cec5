"""The port of a server."""

from __future__ import annotations

import socket

from fledge.errors import UserError


def listen(host: str, port: int, backlog: int | None = None) -> socket.socket:
    """A socket that waits for clients, `backlog` of them at once (None: the system's number); UserError when
    the port is taken or the address is none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=backlog)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--host {host} --port {port}: cannot listen there: {reason}") from None


def address_of(listening: socket.socket) -> str:
    """The server's address for a browser on this machine."""
    host, port = listening.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "localhost"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
