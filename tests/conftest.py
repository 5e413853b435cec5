"""What every test shares: few threads, repeatable examples, a browser."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch

from .on_a_port import CHROMIUM, FLAGS

# No deadline: a shared machine may pause at any example.
hypothesis.settings.register_profile("fledge", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("fledge")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny models gain nothing from two, and lose much on a busy machine


@pytest.fixture(scope="session", autouse=True)
def _interrupts_arrive() -> None:
    # A shell's background job ignores Ctrl-C, and so would all that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Of one module: while it is open, `asyncio.run` is refused in this thread."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()
