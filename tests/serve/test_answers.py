"""What the addresses answer: over a real port, from tiny models whose weights are random."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from fledge.engine.engine import Engine
from fledge.rewards.reward_model import load_judge
from fledge.tokenizer.bpe import Tokenizer
from fledge.tokenizer.chat import encode_chat
from fledge.types import Message, SamplingParams

from .real import (
    CONTEXT,
    Serving,
    events,
    load,
    make_tokenizer,
    save_random_judge,
    save_random_model,
    serving,
)

ASK = [{"role": "user", "content": "The cats sat"}]
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {
        "type": "object", "required": ["city"], "additionalProperties": False,
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
    }}}
    for name in ("weather", "time")
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def directory(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    save_random_model(root / "tiny", tokenizer)
    save_random_judge(root / "judge", tokenizer)
    return root


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[Serving]:
    with serving(load(directory / "tiny"), load(directory / "judge", "judge")) as server:
        yield server


@pytest.fixture(scope="module")
def engine(server: Serving) -> Engine:
    """The model itself, to compare with."""
    engine = server.service.models["tiny"].engine
    assert engine is not None
    return Engine(engine.model, engine.eos_ids)


def good(server: Serving, path: str, body: Any) -> Any:
    response = server.post(path, body)
    assert response.status_code == 200, response.text
    return response.json()


def chunks(server: Serving, path: str, body: dict[str, Any]) -> list[Any]:
    response = server.post(path, {**body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = events(response)
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_models(server: Serving) -> None:
    with server.client() as client:
        listed = client.get("/v1/models").json()
        assert [one["id"] for one in listed["data"]] == ["tiny", "judge"]
        assert client.get("/v1/models/tiny").json() == listed["data"][0]
        assert client.get("/v1/models/none").status_code == 404
        assert client.get("/health").json() == {"status": "ok"}


def test_completion_is_what_the_engine_makes(server: Serving, engine: Engine, tokenizer: Tokenizer) -> None:
    for text in ("The cats", "Hello, 漢", ""):
        prompt = tokenizer.encode(text) or [tokenizer.eos_id]
        (expected,) = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=20))
        body = {"prompt": text, "temperature": 0, "max_tokens": 20}
        made = good(server, "/v1/completions", body)
        assert made["choices"][0]["text"] == tokenizer.decode(expected.ids, skip_special=True)
        assert made["usage"]["prompt_tokens"] == len(prompt)
        assert made["usage"]["completion_tokens"] == len(expected.ids)
        # The same prompt as ids, and as one of several, gives the same.
        for prompts in (prompt, [prompt], [text], [prompt, prompt]):
            again = good(server, "/v1/completions", {**body, "prompt": prompts})
            assert {choice["text"] for choice in again["choices"]} == {made["choices"][0]["text"]}


def test_echo_scores_the_prompt(server: Serving, engine: Engine, tokenizer: Tokenizer) -> None:
    prompts = [tokenizer.encode(text) for text in ("The café sells naïve 漢字 books.", "Hello, hello 🙂")]
    (scores, others) = engine.score(prompts)
    for most in (0, 1):
        body = {"prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": most, "temperature": 0}
        choices = good(server, "/v1/completions", body)["choices"]
        for choice, prompt, expected in zip(choices, prompts, (scores, others), strict=True):
            logprobs = choice["logprobs"]
            assert len(logprobs["tokens"]) == len(logprobs["top_logprobs"]) == len(prompt) + most
            assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
            assert logprobs["token_logprobs"][1 : len(prompt)] == pytest.approx(expected, abs=1e-5)
            assert choice["text"].startswith(tokenizer.decode(prompt))
            # The most probable token is never less probable than the one that is there.
            pairs = zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True)
            assert all(max(top.values()) >= logp for logp, top in pairs)
            if most:  # greedy: the token that was made is the most probable, exactly
                assert logprobs["token_logprobs"][-1] == max(logprobs["top_logprobs"][-1].values())


def test_text_offsets_point_into_the_text(server: Serving, tokenizer: Tokenizer) -> None:
    body = {"prompt": "The café 漢字", "echo": True, "logprobs": 0, "max_tokens": 12, "temperature": 0}
    (choice,) = good(server, "/v1/completions", body)["choices"]
    logprobs, text = choice["logprobs"], choice["text"]
    for name, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not name.startswith(("bytes:", "<")) and "\ufffd" not in text[: offset + 1]:
            assert text[offset:].startswith(name)


def test_a_text_that_ends_keeps_the_probability_of_its_end(server: Serving, tokenizer: Tokenizer) -> None:
    ends = [tokenizer.encode("The")[0], tokenizer.end_of_turn_id]
    body = {
        "prompt": "The cats", "max_tokens": 5, "echo": True, "logprobs": 1, "temperature": 0,
        "logit_bias": {str(ends[1]): 100},
    }  # fmt: skip
    (choice,) = good(server, "/v1/completions", body)["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"]["tokens"][-1] == "<|im_end|>"
    assert choice["text"] == "The cats"


def test_an_answer_that_ends_shows_how_probable_that_was(server: Serving, tokenizer: Tokenizer) -> None:
    body = {"messages": ASK, "logprobs": True, "top_logprobs": 1, "max_tokens": 5, "temperature": 0}
    body["logit_bias"] = {str(tokenizer.end_of_turn_id): 100}
    (choice,) = good(server, "/v1/chat/completions", body)["choices"]
    assert choice["message"]["content"] == ""
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["<|im_end|>"]
    last = chunks(server, "/v1/chat/completions", body)[-1]["choices"][0]
    assert (last["logprobs"], last["finish_reason"]) == (choice["logprobs"], "stop")


def test_n_and_best_of(server: Serving) -> None:
    body = {"prompt": "The", "max_tokens": 6, "seed": 3, "logprobs": 0, "ignore_eos": True}
    all_of_them = good(server, "/v1/completions", {**body, "n": 5})["choices"]
    assert [choice["index"] for choice in all_of_them] == [0, 1, 2, 3, 4]
    assert len({choice["text"] for choice in all_of_them}) > 1
    means = [math.fsum(choice["logprobs"]["token_logprobs"]) / 6 for choice in all_of_them]
    best = good(server, "/v1/completions", {**body, "n": 2, "best_of": 5})
    order = sorted(range(5), key=lambda i: -means[i])
    assert [choice["text"] for choice in best["choices"]] == [all_of_them[i]["text"] for i in order[:2]]
    assert best["usage"]["completion_tokens"] == 30


def test_the_same_seed_gives_the_same_text(server: Serving) -> None:
    body = {"prompt": "The", "max_tokens": 12, "seed": 5}
    texts = {good(server, "/v1/completions", body)["choices"][0]["text"] for _ in range(3)}
    assert len(texts) == 1
    del body["seed"]
    assert len({good(server, "/v1/completions", body)["choices"][0]["text"] for _ in range(4)}) > 1


def test_chat_is_what_the_engine_makes(server: Serving, engine: Engine, tokenizer: Tokenizer) -> None:
    messages: list[Message] = [{"role": "user", "content": "The cats sat"}]
    prompt = encode_chat(tokenizer, messages, None, True).ids
    (expected,) = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=16, top_logprobs=3))
    body = {"messages": messages, "temperature": 0, "max_tokens": 16, "logprobs": True, "top_logprobs": 3}
    made = good(server, "/v1/chat/completions", {**body, "return_token_ids": True})
    (choice,) = made["choices"]
    assert choice["message"]["content"] == tokenizer.decode(expected.ids, skip_special=True)
    assert (choice["token_ids"], made["prompt_token_ids"]) == (expected.ids, prompt)
    for entry, logp, top in zip(
        choice["logprobs"]["content"], expected.logps, expected.top_logps, strict=True
    ):
        assert entry["logprob"] == pytest.approx(logp, abs=1e-5)
        assert [one["logprob"] for one in entry["top_logprobs"]] == pytest.approx(
            [logp for _, logp in top], abs=1e-5
        )
    joined = b"".join(bytes(entry["bytes"] or []) for entry in choice["logprobs"]["content"])
    assert joined == b"".join(tokenizer.token_bytes(token_id) for token_id in expected.ids)
    # Parts, the newer role and the newer limit mean the same.
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "The cats"}, {"type": "text", "text": " sat"}]}
    ]
    other = {"messages": parts, "temperature": 0, "max_completion_tokens": 16}
    assert good(server, "/v1/chat/completions", other)["choices"][0]["message"] == choice["message"]


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_says_what_the_whole_answer_says(server: Serving, n: int) -> None:
    body = {"messages": ASK, "max_tokens": 24, "seed": 1, "logprobs": True, "top_logprobs": 2, "n": n}
    whole = good(server, "/v1/chat/completions", body)
    got = chunks(server, "/v1/chat/completions", {**body, "stream_options": {"include_usage": True}})
    assert len({chunk["id"] for chunk in got}) == 1
    assert {chunk["object"] for chunk in got} == {"chat.completion.chunk"}
    assert got[-1]["choices"] == [] and got[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in got[:-1])
    for choice in whole["choices"]:
        own = [c for chunk in got for c in chunk["choices"] if c["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        assert "".join(c["delta"].get("content", "") for c in own) == choice["message"]["content"]
        entries = [entry for c in own if c["logprobs"] for entry in c["logprobs"]["content"]]
        assert [entry["token"] for entry in entries] == [
            entry["token"] for entry in choice["logprobs"]["content"]
        ]


def test_a_streamed_text_says_what_the_whole_text_says(server: Serving) -> None:
    body = {"prompt": ["The", "Hello"], "max_tokens": 16, "seed": 1, "logprobs": 1, "echo": True, "n": 2}
    whole = good(server, "/v1/completions", body)
    got = chunks(server, "/v1/completions", body)
    for choice in whole["choices"]:
        own = [c for chunk in got for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in own) == choice["text"]
        for name in ("tokens", "text_offset"):
            joined = [value for c in own if c["logprobs"] for value in c["logprobs"][name]]
            assert joined == choice["logprobs"][name]
        assert own[-1]["finish_reason"] == choice["finish_reason"]


def test_stop_strings_end_a_text_before_them(server: Serving) -> None:
    body = {"prompt": "The", "temperature": 0, "max_tokens": 30, "ignore_eos": True}
    text = good(server, "/v1/completions", body)["choices"][0]["text"]
    stop = text[8:10]
    (choice,) = good(server, "/v1/completions", {**body, "stop": stop})["choices"]
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"
    got = chunks(server, "/v1/completions", {**body, "stop": [stop, "never there"]})
    assert "".join(chunk["choices"][0]["text"] for chunk in got) == choice["text"]


def test_offsets_of_a_stream_that_holds_text_back(server: Serving) -> None:
    """What may become a stop string waits, and its tokens with it."""
    body = {"prompt": "The", "seed": 1, "max_tokens": 30, "ignore_eos": True, "logprobs": 1}
    (choice,) = good(server, "/v1/completions", body)["choices"]
    ends = {name[-1] for name in choice["logprobs"]["tokens"] if len(name) > 1 and name.isascii()}
    assert ends
    body["stop"] = [end + "\u0007" for end in sorted(ends)[:4]]
    (choice,) = good(server, "/v1/completions", body)["choices"]
    got = [chunk["choices"][0]["logprobs"] for chunk in chunks(server, "/v1/completions", body)]
    offsets = [offset for one in got if one for offset in one["text_offset"]]
    assert offsets == choice["logprobs"]["text_offset"]


def test_continuing_the_final_message(server: Serving) -> None:
    body = {"messages": ASK, "temperature": 0, "max_tokens": 12, "return_token_ids": True}
    (whole,) = good(server, "/v1/chat/completions", body)["choices"]
    text = whole["message"]["content"]
    for begun in ("", text[:1]):
        messages = [*ASK, {"role": "assistant", "content": begun}]
        asked = {**body, "messages": messages, "continue_final_message": True}
        made = good(server, "/v1/chat/completions", asked)
        if begun == "":
            assert made["choices"][0]["message"]["content"] == text
    refused = {**asked, "add_generation_prompt": True}
    assert server.post("/v1/chat/completions", refused).status_code == 400
    ends_with_question = {**body, "continue_final_message": True}
    assert server.post("/v1/chat/completions", ends_with_question).status_code == 400


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"weather", "time"}),
        ({"type": "function", "function": {"name": "time"}}, {"time"}),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": TOOLS[:1]}}, {"weather"}),
    ],
)
def test_forced_calls_are_of_their_schema(
    server: Serving, choice: Any, names: set[str], stream: bool
) -> None:
    body = {"messages": ASK, "tools": TOOLS, "tool_choice": choice, "max_tokens": 60, "seed": 2}
    body["parallel_tool_calls"] = False
    if stream:
        got = chunks(server, "/v1/chat/completions", body)
        deltas = [chunk["choices"][0] for chunk in got]
        calls = [call for one in deltas for call in one["delta"].get("tool_calls", [])]
        reason = deltas[-1]["finish_reason"]
        assert [call.pop("index") for call in calls] == [0]
    else:
        (made,) = good(server, "/v1/chat/completions", body)["choices"]
        calls, reason = made["message"]["tool_calls"], made["finish_reason"]
        assert made["message"]["content"] is None
    (call,) = calls
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert call["function"]["name"] in names
    schema = TOOLS[0]["function"]["parameters"]  # type: ignore[index]
    jsonschema.validate(json.loads(call["function"]["arguments"]), schema)
    assert reason == "tool_calls"


def test_parallel_calls_have_numbers_and_ids(server: Serving, tokenizer: Tokenizer) -> None:
    body = {"messages": ASK, "tools": TOOLS, "tool_choice": "required", "max_tokens": 150, "seed": 1}
    body["logit_bias"] = {str(tokenizer.encode("\n")[0]): 50}  # what stands between calls
    made = good(server, "/v1/chat/completions", {**body, "n": 4})
    several = [c["message"]["tool_calls"] for c in made["choices"] if len(c["message"]["tool_calls"]) > 1]
    assert several
    ids = [call["id"] for calls in several for call in calls]
    assert len(set(ids)) == len(ids)
    streamed = chunks(server, "/v1/chat/completions", body)
    calls = [call for chunk in streamed for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert [call["index"] for call in calls] == list(range(len(calls)))


def test_tools_that_may_not_be_called_are_not_told(server: Serving) -> None:
    body = {"messages": ASK, "temperature": 0, "max_tokens": 10}
    without = good(server, "/v1/chat/completions", body)
    none = good(server, "/v1/chat/completions", {**body, "tools": TOOLS, "tool_choice": "none"})
    assert none["choices"][0]["message"] == without["choices"][0]["message"]
    assert none["usage"] == without["usage"]
    auto = good(server, "/v1/chat/completions", {**body, "tools": TOOLS})
    assert auto["usage"]["prompt_tokens"] > without["usage"]["prompt_tokens"]


SCHEMA = {
    "type": "object", "required": ["city", "days"], "additionalProperties": False,
    "properties": {"city": {"type": "string", "maxLength": 5}, "days": {"enum": [1, 3]}},
}  # fmt: skip


@pytest.mark.parametrize(
    "form",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        {"tools": TOOLS, "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
    ],
)
def test_an_answer_by_a_schema(server: Serving, form: dict[str, Any]) -> None:
    (choice,) = good(server, "/v1/chat/completions", {"messages": ASK, "max_tokens": 80, **form})["choices"]
    if not choice["message"].get("tool_calls"):
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)


def test_other_forms_of_answers(server: Serving) -> None:
    def text(form: dict[str, Any]) -> str:
        body = {"prompt": "The", "max_tokens": 40, "seed": 4, "structured_outputs": form}
        made: str = good(server, "/v1/completions", body)["choices"][0]["text"]
        return made

    assert text({"choice": ["yes", "no"]}) in ("yes", "no")
    assert text({"regex": "[0-9]{3}"}).isdecimal()
    assert text({"grammar": 'start: "a" "b"'}) == "ab"
    body = {"messages": ASK, "max_tokens": 60, "response_format": {"type": "json_object"}, "seed": 1}
    (choice,) = good(server, "/v1/chat/completions", body)["choices"]
    assert choice["message"]["content"].startswith("{")


def test_prompt_logprobs(server: Serving, engine: Engine, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("The cats sat;")
    (expected,) = engine.score([prompt])
    body = {"prompt": prompt, "prompt_logprobs": 2, "max_tokens": 1}
    (choice,) = good(server, "/v1/completions", body)["choices"]
    rows = choice["prompt_logprobs"]
    assert rows[0] is None
    found = [row[str(token_id)]["logprob"] for row, token_id in zip(rows[1:], prompt[1:], strict=True)]
    assert found == pytest.approx(expected, abs=1e-5)
    assert all(
        sorted(one["rank"] for one in row.values() if one["rank"] in (1, 2)) == [1, 2] for row in rows[1:]
    )
    made = good(server, "/v1/chat/completions", {"messages": ASK, "prompt_logprobs": 1, "max_tokens": 1})
    assert len(made["prompt_logprobs"]) == made["usage"]["prompt_tokens"]


def test_beam_search_finds_no_less_than_greedy(server: Serving) -> None:
    body = {"prompt": "The cats", "max_tokens": 5, "return_token_ids": True, "ignore_eos": True}
    beams = good(server, "/v1/completions", {**body, "n": 3, "use_beam_search": True})
    assert len({tuple(choice["token_ids"]) for choice in beams["choices"]}) == 3
    assert beams["usage"]["completion_tokens"] == 15
    greedy = good(server, "/v1/completions", {**body, "temperature": 0})
    scored = [
        good(server, "/v1/completions", {
            "prompt": choice["prompt_token_ids"] + choice["token_ids"], "echo": True, "logprobs": 0,
            "max_tokens": 0,
        })["choices"][0]["logprobs"]["token_logprobs"]
        for choice in (beams["choices"][0], greedy["choices"][0])
    ]  # fmt: skip
    best, first = (math.fsum(row[-5:]) for row in scored)
    assert best >= first - 1e-4


def test_embeddings(server: Serving, tokenizer: Tokenizer) -> None:
    texts = ["The cats sat", "Hello, hello", "The cats sat"]
    made = good(server, "/v1/embeddings", {"input": texts})
    vectors = np.array([row["embedding"] for row in made["data"]])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-5)
    assert vectors[0] == pytest.approx(vectors[2], abs=1e-6)
    assert abs(vectors[0] @ vectors[1]) < 0.999
    coded = good(server, "/v1/embeddings", {"input": texts[1], "encoding_format": "base64"})
    raw = np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), dtype="<f4")
    assert raw == pytest.approx(vectors[1], abs=1e-6)
    ids = good(server, "/v1/embeddings", {"input": [tokenizer.encode(texts[1])]})
    assert ids["data"][0]["embedding"] == pytest.approx(vectors[1], abs=1e-5)
    assert server.post("/v1/embeddings", {"input": "x", "dimensions": 8}).status_code == 400


def test_scores_are_those_of_the_reward_model(server: Serving, directory: Path) -> None:
    conversations: list[list[Message]] = [
        [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": text}]
        for text in ("books", "The cats ate.")
    ]
    expected = load_judge(directory / "judge").score(conversations)
    made = good(server, "/v1/score", {"conversations": conversations})
    assert [row["score"] for row in made["data"]] == pytest.approx(expected, abs=1e-5)
    one = good(server, "/v1/score", {"model": "judge", "messages": conversations[1]})
    assert one["data"][0]["score"] == pytest.approx(expected[1], abs=1e-5)
    assert server.post("/v1/score", {"model": "tiny", "messages": conversations[0]}).status_code == 400
    assert server.post("/v1/score", {"messages": ASK}).status_code == 400
    body = {"model": "judge", "messages": ASK}
    assert server.post("/v1/chat/completions", body).status_code == 400


def test_tokens_and_templates(server: Serving, tokenizer: Tokenizer) -> None:
    found = good(server, "/tokenize", {"prompt": "The café 漢", "return_token_strs": True})
    assert found["tokens"] == tokenizer.encode("The café 漢")
    assert found["count"] == len(found["token_strs"]) == len(found["tokens"])
    assert found["max_model_len"] == CONTEXT
    assert good(server, "/detokenize", {"tokens": found["tokens"]}) == {"prompt": "The café 漢"}
    text = good(server, "/apply-template", {"messages": ASK})["prompt"]
    ids = good(server, "/tokenize", {"messages": ASK})["tokens"]
    assert (
        text == tokenizer.decode(ids) == "<|im_start|>user\nThe cats sat<|im_end|>\n<|im_start|>assistant\n"
    )
    with server.client() as client:
        info = client.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|endoftext|>"
    assert info["chat_template"] == tokenizer.chat_template


def test_text_that_looks_like_special_tokens_is_text(server: Serving, tokenizer: Tokenizer) -> None:
    ids = good(server, "/tokenize", {"messages": [{"role": "user", "content": "<|im_end|>"}]})["tokens"]
    assert ids.count(tokenizer.special_tokens["<|im_end|>"]) == 1


def test_metrics_count(server: Serving) -> None:
    with server.client() as client:

        def count(name: str) -> float:
            lines = client.get("/metrics").text.splitlines()
            return next((float(line.split()[-1]) for line in lines if line.startswith(name)), 0.0)

        name = 'fledge_completion_tokens_total{model="tiny"}'
        before = count(name)
        good(server, "/v1/completions", {"prompt": "The", "max_tokens": 7, "ignore_eos": True})
        assert count(name) == before + 7
        assert count('fledge_running{model="tiny"}') == count('fledge_waiting{model="tiny"}') == 0
        assert count("fledge_time_to_first_token_seconds_count") > 0


def test_the_description_names_every_address(server: Serving) -> None:
    with server.client() as client:
        told = client.get("/openapi.json").json()
        assert told["openapi"].startswith("3.1")
        for path, methods in told["paths"].items():
            for method in methods:
                response = client.request(method, path.replace("{model}", "tiny"), json={})
                assert response.status_code not in (404, 405), path
    names = told["components"]["schemas"]["ChatRequest"]["properties"]["model"]["enum"]
    assert names == ["tiny", "judge"]
