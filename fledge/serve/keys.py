"""Who may ask: keys, addresses, and pages of other sites."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from fledge.errors import UserError
from fledge.files import read_text
from fledge.serve.errors import ApiError

# Shorter ones can be guessed.
SHORTEST_KEY = 8
# What everybody may read: the page and its scripts hold no secrets, and keys are typed into it.
PUBLIC = ("/", "/health", "/openapi.json")


def read_keys(file: Path | None, variables: Mapping[str, str | None]) -> tuple[str, ...]:
    """The keys of a file (one a line, `#` begins a comment) and of environment variables, by their names.
    Raises UserError for a variable without a value, and for a key that is too short or no plain text."""
    keys: list[str] = []
    for name, value in variables.items():
        if not value:
            raise UserError(f"--key-variable {name}: there is no such environment variable, or it is empty")
        keys.append(_checked(value, f"--key-variable {name}"))
    if file is not None:
        lines = [line.strip() for line in read_text(file).splitlines()]
        keys += [_checked(line, f"--key-file {file}") for line in lines if line and not line.startswith("#")]
        if not keys:
            raise UserError(f"--key-file {file}: no keys in it; write one a line")
    return tuple(keys)


def _checked(key: str, where: str) -> str:
    if len(key) < SHORTEST_KEY or not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"{where}: a key has at least {SHORTEST_KEY} ASCII characters, without spaces")
    return key


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own, that no other can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Doorkeeper:
    """Lets requests in by their headers."""

    def __init__(self, keys: Iterable[str], only_local: bool, origins: Sequence[str] = ()) -> None:
        """`only_local`: nobody needs a key, so a name of another machine in `Host` is a trick (a page of a
        site whose name was turned to this machine). `origins`: sites whose pages may ask."""
        self._digests = [_digest(key) for key in keys]
        self._only_local = only_local and not self._digests
        self._origins = frozenset(origins)

    def check(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        """Raises ApiError (401, 403)."""
        try:
            self._check_sender(headers)
        except ValueError:  # urlsplit's
            raise ApiError(403, "the Origin or Host header is no address") from None
        self._check_key(method, path, headers)

    def _check_sender(self, headers: Mapping[str, str]) -> None:
        host = headers.get("host", "")
        if self._only_local and not is_loopback(_name_of(host)):
            raise ApiError(
                403, "this server answers its own machine only: ask for localhost, or start it with keys"
            )
        origin = headers.get("origin")
        if origin is not None and origin not in self._origins and urlsplit(origin).netloc != host:
            raise ApiError(403, "requests from pages of other sites are refused (see --cors)")

    def _check_key(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        if not self._digests or method == "OPTIONS" or path in PUBLIC or path.startswith("/assets/"):
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = _digest(key.strip() if scheme.lower() == "bearer" else "")
        # All are compared, so that the time tells nothing.
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(found):
            raise ApiError(
                401, "a key is needed: send `Authorization: Bearer KEY`" if not key else "the key is unknown",
                code="invalid_api_key", headers={"www-authenticate": "Bearer"},
            )  # fmt: skip


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="replace")).digest()


def _name_of(host: str) -> str:
    """The name in `name:port`."""
    return urlsplit(f"//{host}").hostname or ""
