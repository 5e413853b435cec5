"""The labelling server on its port: the links that let people in, and serving until Ctrl-C."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence

import uvicorn

from fledge.errors import UserError
from fledge.feedback.app import make_app
from fledge.feedback.people import add_labeler, list_labelers, renew_token
from fledge.feedback.prepare import Preparation
from fledge.feedback.site import Site
from fledge.feedback.store import Store


def listen(host: str, port: int) -> socket.socket:
    """A socket that waits for browsers; UserError when the port is taken or the address is none."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--host {host} --port {port}: cannot listen there: {reason}") from None


def serve(
    store: Store, project_id: int, preparation: Preparation, listening: socket.socket, admin: str,
    labelers: Sequence[str],
) -> None:  # fmt: skip
    """Print the links, prepare outputs in the background, and serve until Ctrl-C.

    Links cannot be read back from the store, so the one of `admin` is made anew each time, and those of
    `labelers` only for new names.
    """
    address, port = listening.getsockname()[:2]
    everywhere = address in ("0.0.0.0", "::")
    host = "localhost" if everywhere else f"[{address}]" if ":" in address else address
    people = [person for person in list_labelers(store) if not person.purged]
    admin = " ".join(admin.split())  # as the store writes names
    known = next((one for one in people if one.role == "admin" and one.name == admin), None)
    token = renew_token(store, known.id) if known else add_labeler(store, admin, "admin")[1]
    print(f"{admin} (admin): http://{host}:{port}/s/{token}", flush=True)
    names = {person.name for person in people}
    for name in dict.fromkeys(" ".join(name.split()) for name in labelers):
        if name not in names:
            print(f"{name}: http://{host}:{port}/s/{add_labeler(store, name)[1]}", flush=True)
    if everywhere or not (address.startswith("127.") or address == "::1"):
        print("others can reach this server, and what they send is not encrypted", file=sys.stderr)
    app = make_app(Site(store, project_id, preparation.status))
    options = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", ws="none")
    preparation.start()
    try:
        uvicorn.Server(options).run(sockets=[listening])
    finally:
        preparation.stop()
