"""LangChain's `ChatOpenAI` as a client: answers, streams, tools and structured output."""

from __future__ import annotations

from pathlib import Path

import pytest

from .assistant import HELLO, NUMBERS
from .live import Server, results

PARIS = ["get_weather", {"city": "Paris"}]
ROME = ["get_weather", {"city": "Rome"}]


@pytest.mark.slow
def test_langchain(server: Server, tmp_path: Path) -> None:
    made = results("langchain", "with_langchain.py", tmp_path, server.v1)
    answers, tools, structured = made["answers"], made["tools"], made["structured"]
    assert (answers["text"], answers["reason"], answers["usage"]) == (HELLO, "stop", True)
    assert answers["kind"] == answers["streamed"] == NUMBERS and answers["pieces"]
    assert answers["scored"] > 3 and len(answers["counted"]) == 1
    assert answers["batch"] == [HELLO, NUMBERS] and answers["later"] == [HELLO, HELLO]
    assert answers["completion"]
    assert tools["calls"] == tools["forced"] == [PARIS] and tools["streamed"] == [PARIS, ROME]
    assert tools["answer"] == "It is 18 degrees in Paris."
    person = ["None", {"name": "Ada", "age": 36}]
    assert structured == {
        "json_schema": person, "json_mode": person, "function_calling": ["None", {"city": "Paris"}],
    }  # fmt: skip
