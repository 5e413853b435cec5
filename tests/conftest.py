"""What every test shares: few threads and repeatable examples."""

from __future__ import annotations

import signal

import hypothesis
import pytest
import torch

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
