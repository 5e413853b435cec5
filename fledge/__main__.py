"""`python -m fledge` is `fledge`."""

from fledge.cli import entry

entry()
