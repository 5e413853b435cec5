"""What keeps tiny trainings quick."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fledge.files


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The models are so small that a second thread only waits for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """The power does not fail here, and waiting for the disk takes longer than a training."""
    monkeypatch.setattr(fledge.files, "_sync", lambda path: None)
