"""Every answer, whole and in chunks, is exactly what the `openai` package's own models describe."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from .real import Serving, events, load, make_tokenizer, save_random_judge, save_random_model, serving

openai = pytest.importorskip("openai")
from openai.types import CreateEmbeddingResponse, Model  # noqa: E402
from openai.types.chat import ChatCompletion, ChatCompletionChunk  # noqa: E402
from openai.types.completion import Completion  # noqa: E402
from pydantic import BaseModel  # noqa: E402

pytestmark = pytest.mark.peers

ASK = [{"role": "user", "content": "The cats sat"}]
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {
        "type": "object", "required": ["city"], "properties": {"city": {"enum": ["Paris"]}},
        "additionalProperties": False,
    }},
}  # fmt: skip
# What vLLM adds and others lack; nothing else may be there.
EXTRAS = {
    "prompt_logprobs", "prompt_token_ids", "choices.token_ids", "choices.prompt_logprobs",
    "choices.prompt_token_ids", "max_model_len", "kind",
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    root, tokenizer = tmp_path_factory.mktemp("served"), make_tokenizer()
    save_random_model(root / "tiny", tokenizer)
    save_random_judge(root / "judge", tokenizer)
    with serving(load(root / "tiny"), load(root / "judge", "judge")) as server:
        yield server


def client_of(server: Serving, **options: Any) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none-needed", **options)


def unknown_fields(value: Any, place: str = "") -> set[str]:
    """Where an object has fields that its model lacks."""
    found = set[str]()
    if isinstance(value, list):
        for one in value:
            found |= unknown_fields(one, place)
    elif isinstance(value, BaseModel):
        found |= {f"{place}{name}" for name in value.model_extra or {}}
        for name in type(value).model_fields:
            found |= unknown_fields(getattr(value, name), f"{place}{name}.")
    return found


def filled(answer: dict[str, Any]) -> dict[str, Any]:
    """With numbers where OpenAI's own server has null, and its package's models don't: the reason of a text
    that goes on, the log-probability of a prompt's first token."""
    for choice in answer["choices"]:
        choice["finish_reason"] = choice["finish_reason"] or "stop"
        if logprobs := choice["logprobs"]:
            logprobs["token_logprobs"] = [
                0.0 if logp is None else logp for logp in logprobs["token_logprobs"]
            ]
            logprobs["top_logprobs"] = [top or {} for top in logprobs["top_logprobs"]]
    return answer


def check(kind: type[BaseModel], text: str) -> None:
    if kind is Completion:
        text = json.dumps(filled(json.loads(text)))
    made = kind.model_validate_json(text, strict=True)
    assert unknown_fields(made) <= EXTRAS
    missing = {
        name for name, field in kind.model_fields.items() if field.is_required()
    } - made.model_fields_set
    assert not missing


TEXT = {"prompt": "The", "max_tokens": 6, "seed": 1}
CHAT = {"messages": ASK, "max_tokens": 6, "seed": 1}
EXTRA = {"return_token_ids": True, "prompt_logprobs": 1}
ONE_CALL = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 60}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "kinds"),
    [
        ("/v1/completions", TEXT, (Completion, Completion)),
        ("/v1/completions", {**TEXT, "n": 2, "logprobs": 2, "echo": True}, (Completion, Completion)),
        ("/v1/completions", {**TEXT, **EXTRA}, (Completion, Completion)),
        ("/v1/chat/completions", CHAT, (ChatCompletion, ChatCompletionChunk)),
        ("/v1/chat/completions", {**CHAT, "n": 2, "logprobs": True, "top_logprobs": 2},
         (ChatCompletion, ChatCompletionChunk)),
        ("/v1/chat/completions", {**CHAT, **EXTRA}, (ChatCompletion, ChatCompletionChunk)),
        ("/v1/chat/completions", {**CHAT, **ONE_CALL}, (ChatCompletion, ChatCompletionChunk)),
        ("/v1/chat/completions", {**CHAT, **ONE_CALL, "parallel_tool_calls": False},
         (ChatCompletion, ChatCompletionChunk)),
    ],
)  # fmt: skip
def test_answers_are_as_described(
    server: Serving,
    path: str,
    body: dict[str, Any],
    kinds: tuple[type[BaseModel], type[BaseModel]],
    stream: bool,
) -> None:
    if not stream:
        check(kinds[0], server.post(path, body).text)
        return
    for options in ({}, {"stream_options": {"include_usage": True}}):
        lines = events(server.post(path, {**body, "stream": True, **options}))
        for line in lines[:-1]:
            check(kinds[1], line)


def test_other_answers_are_as_described(server: Serving) -> None:
    check(CreateEmbeddingResponse, server.post("/v1/embeddings", {"input": "The"}).text)
    with server.client() as client:
        check(Model, client.get("/v1/models/tiny").text)


def test_the_client_reads_everything(server: Serving) -> None:
    client = client_of(server)
    assert [model.id for model in client.models.list()] == ["tiny", "judge"]
    assert client.completions.create(model="tiny", **TEXT).choices[0].text
    whole = client.chat.completions.create(model="tiny", **CHAT)
    assert whole.choices[0].message.content
    yes = {"structured_outputs": {"choice": ["yes"]}}
    with client.chat.completions.stream(model="tiny", **CHAT, extra_body=yes) as stream:
        assert stream.get_final_completion().choices[0].message.content == "yes"
    vectors = client.embeddings.create(model="tiny", input=["The", "cats"]).data  # it asks for base64
    assert len(vectors[0].embedding) == len(vectors[1].embedding) == 32
    call = client.chat.completions.create(model="tiny", **CHAT | ONE_CALL | {"parallel_tool_calls": False})
    (made,) = call.choices[0].message.tool_calls
    assert json.loads(made.function.arguments) == {"city": "Paris"}


def test_parsed_answers(server: Serving) -> None:
    class Trip(BaseModel):
        city: str
        days: bool

    made = client_of(server).chat.completions.parse(
        model="tiny", messages=ASK, response_format=Trip, max_tokens=300, seed=3,
        extra_body={"logit_bias": {}},
    )  # fmt: skip
    assert isinstance(made.choices[0].message.parsed, Trip)


def test_errors_have_the_clients_types(server: Serving) -> None:
    client = client_of(server, max_retries=0)
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="none", prompt="The")
    assert missing.value.code == "model_not_found" and missing.value.request_id
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=[])
    assert bad.value.param == "messages"
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="The", temperature=-1)


def test_an_error_in_the_middle_of_a_stream_is_raised(
    server: Serving, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    scheduler = server.service.models["tiny"].worker.scheduler
    assert scheduler is not None
    stream = client_of(server).completions.create(
        model="tiny", prompt="The", max_tokens=1000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    with monkeypatch.context() as patch, pytest.raises(openai.APIError) as caught:
        patch.setattr(scheduler, "_choose", lambda logits: 1 / 0)
        for _ in stream:
            pass
    assert "internal error" in str(caught.value)
    assert "ZeroDivisionError" in capfd.readouterr().err
