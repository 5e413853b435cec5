"""Visits of the chat page in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from .scripted import Scripted


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """Opens the page; any error in it that a test doesn't expect fails the test."""
    contexts, problems = [], []

    def open_page(made: Scripted, ready: bool = True, **context: Any) -> Any:
        contexts.append(browser.new_context(**{"viewport": {"width": 1300, "height": 900}, **context}))
        page = contexts[-1].new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
        page.on("dialog", lambda dialog: (problems.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.goto(made.url)
        page.problems = problems
        if ready:
            page.wait_for_selector("html[data-ready]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [line for line in problems if "ERR_CONNECTION_REFUSED" not in line] == []
