"""simonw's `llm` as a client, set up as its documentation says: a model in extra-openai-models.yaml."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .assistant import HELLO, NUMBERS
from .live import Server, program, run

MODELS = """
- model_id: chick
  model_name: assistant
  api_base: {base}
  can_stream: true
  supports_schema: true
  supports_tools: true
- model_id: chick-text
  model_name: assistant
  api_base: {base}
  completion: true
"""
WEATHER = '''
def get_weather(city: str) -> str:
    """The weather of a city."""
    return "18 degrees"
'''


@pytest.mark.slow
def test_llm(server: Server, tmp_path: Path) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(MODELS.format(base=server.v1))

    def llm(*arguments: str) -> str:
        command = [program("llm", "llm"), *arguments]
        return run(command, tmp_path, {"LLM_USER_PATH": str(tmp_path)}).rstrip("\n")

    cold = ("-m", "chick", "-o", "temperature", "0")
    assert llm("Say hello.", *cold) == HELLO
    assert llm("Count to twelve.", *cold, "--no-stream", "-s", "Be kind.") == NUMBERS
    assert json.loads(llm("A person as JSON.", *cold, "--schema", "name, age int")) == {
        "name": "Ada", "age": 36,
    }  # fmt: skip
    assert llm("What is the weather in Paris?", *cold, "--functions", WEATHER) == "It is 18 degrees in Paris."
    text = llm("one two three", "-m", "chick-text", "-o", "temperature", "0", "-o", "max_tokens", "2")
    assert text
    logged = json.loads(llm("logs", "--json", "-n", "0"))
    counted = [row["output_tokens"] for row in logged if row["model"] == "chick"]
    assert len(counted) >= 4 and all(counted)
