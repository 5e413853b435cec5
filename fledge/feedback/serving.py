"""The labelling server on its port: the links that let people in, and serving until Ctrl-C."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence

import uvicorn

from fledge.feedback.app import make_app
from fledge.feedback.people import add_labeler, list_labelers, renew_token
from fledge.feedback.prepare import Preparation
from fledge.feedback.site import Site
from fledge.feedback.store import Store
from fledge.web.listening import address_of


def serve(
    store: Store, project_id: int, preparation: Preparation, listening: socket.socket, admin: str,
    labelers: Sequence[str],
) -> None:  # fmt: skip
    """Print the links, prepare outputs in the background, and serve until Ctrl-C.

    Links cannot be read back from the store, so the one of `admin` is made anew each time, and those of
    `labelers` only for new names.
    """
    host, address = listening.getsockname()[0], address_of(listening)
    people = [person for person in list_labelers(store) if not person.purged]
    admin = " ".join(admin.split())  # as the store writes names
    known = next((one for one in people if one.role == "admin" and one.name == admin), None)
    token = renew_token(store, known.id) if known else add_labeler(store, admin, "admin")[1]
    print(f"{admin} (admin): {address}/s/{token}", flush=True)
    names = {person.name for person in people}
    for name in dict.fromkeys(" ".join(name.split()) for name in labelers):
        if name not in names:
            print(f"{name}: {address}/s/{add_labeler(store, name)[1]}", flush=True)
    if not (host.startswith("127.") or host == "::1"):
        print("others can reach this server, and what they send is not encrypted", file=sys.stderr)
    app = make_app(Site(store, project_id, preparation.status))
    options = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", ws="none")
    preparation.start()
    try:
        uvicorn.Server(options).run(sockets=[listening])
    finally:
        preparation.stop()
