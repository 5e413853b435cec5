"""The `openai` package as a client: whole answers, streams, tools, parsing, errors and retries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .assistant import HELLO, NUMBERS
from .live import Server, results

pytestmark = pytest.mark.slow
PARIS = ["get_weather", '{"city": "Paris"}']
ROME = ["get_weather", '{"city": "Rome"}']
ADA = {"name": "Ada", "age": 36}


@pytest.fixture(scope="module")
def found(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return results("openai", "with_openai.py", tmp_path_factory.mktemp("home"), server.v1)


def test_whole_answers(found: dict[str, Any]) -> None:
    plain = found["plain"]
    assert (plain["text"], plain["reason"], plain["by_parts"]) == (HELLO, "stop", HELLO)
    assert plain["usage"]["total_tokens"] == sum(
        plain["usage"][name] for name in ("prompt_tokens", "completion_tokens")
    )
    assert plain["request_id"].startswith("req_")
    assert plain["short"] == ["length", 3]
    assert len(plain["several"]) == 3 and not any("friend" in text for text in plain["several"])
    assert plain["several"] == plain["repeated"]  # one seed


def test_logprobs_and_biases(found: dict[str, Any]) -> None:
    logprobs = found["logprobs"]
    assert logprobs["bytes"] == logprobs["text"] == HELLO
    assert all(logprobs["best"]) and set(logprobs["tops"]) == {3}
    assert not HELLO.startswith(logprobs["biased"])


def test_models(found: dict[str, Any]) -> None:
    assert found["models"] == {"listed": ["assistant"], "one": "assistant"}


def test_completions(found: dict[str, Any]) -> None:
    made = found["completions"]
    assert made["text"] == made["streamed"]
    assert made["echoed"][0].startswith("one two three") and made["echoed"][1].startswith("one")
    assert made["joined"].startswith("one two three") and made["unknown"] is None
    assert len(set(made["lengths"])) == 1 and made["offsets"] == [0, len("one")]
    assert made["indices"] == [0, 1, 2, 3]


def test_embeddings(found: dict[str, Any]) -> None:
    made = found["embeddings"]
    assert made["width"] == 96
    assert made["norm"] == pytest.approx(1, abs=1e-5)
    assert made["same"] < 1e-6
    assert made["different"] > 0.01
    assert made["coded"] < 1e-6


def test_streams(found: dict[str, Any]) -> None:
    made = found["streams"]
    assert made["ids"] == 1 and made["role"] == "assistant" and made["roles"] == 1
    assert made["text"] == HELLO and made["reasons"] == ["stop"]
    assert made["usages"] == [False] * (len(made["usages"]) - 1) + [True]
    assert made["usage"] == found["plain"]["usage"]
    assert {"chunk", "content.delta", "content.done"} <= set(made["kinds"])
    assert made["final"] == [NUMBERS, "stop"]


def test_many_at_once(found: dict[str, Any]) -> None:
    assert found["many"] == {"texts": sorted([HELLO, NUMBERS]), "count": 16}


def test_tools(found: dict[str, Any]) -> None:
    made = found["tools"]
    assert made["calls"] == made["forced"] == made["required"] == made["single"] == [PARIS]
    assert (made["content"], made["reason"]) == (None, "tool_calls")
    assert made["answer"] == "It is 18 degrees in Paris."
    assert made["parallel"] == made["streamed"] == [PARIS, ROME]
    assert made["ids"] == 2 and made["stream_reason"] == "tool_calls"
    assert made["never"] == [HELLO, []]
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= set(
        made["events"]
    )


def test_parsed_answers(found: dict[str, Any]) -> None:
    made = found["parsed"]
    assert made["whole"] == made["streamed"] == made["free"] == ADA and made["kind"] == "Person"
    assert made["called"] == {"city": "Paris"}
    assert (made["cut"], made["too_short"]) == ("length", "LengthFinishReasonError")


def test_errors(found: dict[str, Any]) -> None:
    made = found["errors"]
    bad = ["BadRequestError", 400]
    assert made["model"] == ["NotFoundError", 404, "model", "model_not_found", True]
    assert made["temperature"] == [*bad, "temperature", "invalid_value", True]
    assert made["messages"][:3] == [*bad, "messages"]
    assert made["role"][:2] == made["image"][:2] == made["schema"][:2] == bad
    assert made["context"] == made["streamed"] == [*bad, "messages", "context_length_exceeded", True]
    assert made["suffix"][:3] == [*bad, "suffix"]
    assert made["path"][:2] == ["NotFoundError", 404]
    assert made["timeout"] == "APITimeoutError"
    assert "colour" in made["warning"] and "user" not in made["warning"]


def test_a_busy_server_is_asked_again(narrow_server: Server, tmp_path: Path) -> None:
    made = results("openai", "retrying.py", tmp_path, narrow_server.v1, "other-key-of-two")
    assert made["wrong_key"][:2] == ["AuthenticationError", "invalid_api_key"]
    assert made["busy"][:2] == ["RateLimitError", "rate_limit_exceeded"]
    assert 1 <= int(made["busy"][2]) <= 60
    assert made["retried"] == HELLO and made["retries"] >= 1
