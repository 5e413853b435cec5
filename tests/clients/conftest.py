"""The model and the server that all clients talk with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .assistant import train_assistant
from .live import Server, served


@pytest.fixture(scope="session")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("clients") / "assistant"
    train_assistant(directory)
    return directory


@pytest.fixture(scope="session")
def server(assistant: Path) -> Iterator[Server]:
    with served("--model", assistant) as running:
        yield running


@pytest.fixture(scope="session")
def narrow_server(assistant: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Makes one answer at a time, lets nobody wait, and wants a key."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("one-key-of-two\nother-key-of-two\n")
    keys.chmod(0o600)
    with served("--model", assistant, "--key-file", keys, "--at-once", 1, "--queue", 0) as running:
        yield running
