"""All addresses that write no text: models, tokens, templates, embeddings, scores, health, metrics."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from fledge.files import read_json
from fledge.serve.embeddings import embed
from fledge.serve.errors import ApiError
from fledge.serve.generating import answer, elsewhere, read
from fledge.serve.messages import chat_ids, chat_text, plain_messages
from fledge.serve.metrics import CONTENT_TYPE
from fledge.serve.models import Served
from fledge.serve.openai import (
    DetokenizeRequest,
    EmbeddingRequest,
    ScoreRequest,
    TemplateRequest,
    TokenizeRequest,
)
from fledge.serve.plan import prompt_ids
from fledge.serve.responses import as_json, head
from fledge.serve.service import Service
from fledge.serve.tokens import TokenTexts
from fledge.serve.visits import unless_gone, visit_of
from fledge.tokenizer.bpe import Tokenizer

T = TypeVar("T")

# Padded tokens that are read between two steps of those who stream.
PIECE_TOKENS = 4096
# Texts or conversations of a request that are made vectors or judged.
MAX_ROWS = 2048


async def health(service: Service, request: Request) -> Response:
    """Whether requests are taken."""
    lost = [name for name, served in service.models.items() if served.worker.ended]
    if service.stopping or not lost:
        return answer({"status": "stopping" if service.stopping else "ok"})
    body = as_json({"status": "broken", "models": lost})
    return Response(body, 503, media_type="application/json")


async def metrics(service: Service, request: Request) -> Response:
    """Prometheus's counters."""
    writing = {name: served.worker.running for name, served in service.models.items()}
    waiting = {name: max(0, service.live.get(name, 0) - running) for name, running in writing.items()}
    gauges = [
        ("fledge_running", "Completions that are being made.", writing),
        ("fledge_waiting", "Completions that wait for a place.", waiting),
    ]
    return Response(service.metrics.text(gauges), media_type=CONTENT_TYPE)


async def models(service: Service, request: Request) -> Response:
    """All models."""
    data = [_described(served) for served in service.models.values()]
    if service.relay is not None:
        data += service.relay.models.values()
    return answer({"object": "list", "data": data})


async def model(service: Service, request: Request) -> Response:
    """One model."""
    name = request.path_params["model"]
    if (endpoint := service.endpoint_of(name)) is not None:
        return answer(endpoint.models[name])
    return answer(_described(service.find(name)))


def _described(served: Served) -> dict[str, Any]:
    kind = "reward" if served.judge is not None else "text"
    if kind == "text" and served.tokenizer.chat_template is not None:
        kind = "chat"
    return {
        "id": served.name, "object": "model", "created": served.created, "owned_by": "fledge",
        "max_model_len": served.room.tokens, "kind": kind,
    }  # fmt: skip


async def tokenize(service: Service, request: Request) -> Response:
    """The ids of a text or of a conversation."""
    asked = await read(request, TokenizeRequest)
    served = service.find(asked.model)
    if (asked.prompt is None) == (asked.messages is None):
        raise ApiError(400, "either prompt or messages is needed", "prompt", "missing_required_parameter")

    def work() -> dict[str, Any]:
        if asked.messages is not None:
            ids = chat_ids(
                served.tokenizer, plain_messages(asked.messages), asked.tools,
                asked.add_generation_prompt, asked.continue_final_message,
            )  # fmt: skip
        else:
            ids = _ids_with_special(served.tokenizer, asked.prompt or "")
            if asked.add_special_tokens is not False:
                ids = [*served.tokenizer.prefix_ids, *ids]
        found = {"count": len(ids), "max_model_len": served.room.tokens, "tokens": ids}
        if asked.return_token_strs:
            texts = TokenTexts(served.tokenizer)
            found["token_strs"] = [texts.name(token_id) for token_id in ids]
        return found

    return answer(await run_in_threadpool(work))


def _ids_with_special(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text in which the text of a special token is that token, as in transformers and vLLM, whose
    clients ask for the ids of such tokens so. (What is to be continued is read as plain text.)"""
    special = tokenizer.special_tokens
    names = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
    ids: list[int] = []
    after: Literal["start", "special", "text"] = "start"
    for part in re.split(f"({names})", text) if names else [text]:
        if part in special:
            ids.append(special[part])
            after = "special"
        elif part:
            ids += tokenizer.encode_piece(part, after)
            after = "text"
    return ids


async def detokenize(service: Service, request: Request) -> Response:
    """The text of ids."""
    asked = await read(request, DetokenizeRequest)
    served = service.find(asked.model)
    size = served.tokenizer.vocab_size
    if any(token_id >= size for token_id in asked.tokens):
        raise ApiError(400, f"tokens: the tokenizer has ids from 0 to {size - 1}", "tokens", "invalid_value")
    return answer({"prompt": await run_in_threadpool(served.tokenizer.decode, asked.tokens)})


async def tokenizer_info(service: Service, request: Request) -> Response:
    """What the tokenizer's own files say of it: special tokens, chat template."""
    served = service.find(request.query_params.get("model"))
    path = served.directory / "tokenizer_config.json"
    found = read_json(path) if path.exists() else {}
    special = served.tokenizer.special_tokens
    names = {token_id: name for name, token_id in special.items()}
    told = {"eos_token": names.get(served.tokenizer.eos_id), **served.tokenizer.special_tokens_map}
    template = {"chat_template": served.tokenizer.chat_template}
    return answer({**found, **told, **template, "max_model_len": served.room.tokens})


async def apply_template(service: Service, request: Request) -> Response:
    """A conversation as its model's template writes it."""
    asked = await read(request, TemplateRequest)
    served = service.find(asked.model)
    text = await run_in_threadpool(
        chat_text, served.tokenizer, plain_messages(asked.messages), asked.tools,
        asked.add_generation_prompt, asked.continue_final_message,
    )  # fmt: skip
    return answer({"prompt": text})


async def embeddings(service: Service, request: Request) -> Response:
    """Texts as vectors."""
    if (endpoint := await elsewhere(service, request)) is not None:
        return await endpoint.pass_on(request)
    asked = await read(request, EmbeddingRequest)
    served = service.writer(asked.model)
    engine, given = served.engine, asked.input
    assert engine is not None
    width = getattr(engine.model.config, "hidden_size", 0)
    if asked.dimensions not in (None, width):
        raise ApiError(400, f"dimensions: this model's embeddings have {width}; leave it out", "dimensions")
    rows = await run_in_threadpool(prompt_ids, given, served.tokenizer)
    _check_count(len(rows), "input")
    found, usage = await _read_rows(service, request, served, rows, partial(embed, engine))
    as_text = asked.encoding_format == "base64"

    def written() -> Response:
        data = [
            {"object": "embedding", "index": i, "embedding": _in_base64(found[i]) if as_text else found[i]}
            for i in range(len(rows))
        ]
        return answer({"object": "list", "data": data, "model": served.name, "usage": usage})

    return await run_in_threadpool(written)


def _check_count(rows: int, name: str) -> None:
    if rows > MAX_ROWS:
        raise ApiError(400, f"{name}: {rows:,} are too many for one request; send at most {MAX_ROWS:,}", name)


async def score(service: Service, request: Request) -> Response:
    """The rewards of conversations."""
    asked = await read(request, ScoreRequest)
    name = asked.model
    if name is None:
        name = next((one for one, served in service.models.items() if served.judge is not None), None)
    served = service.find(name)
    judge = served.judge
    if judge is None:
        raise ApiError(400, f"{served.name} is no reward model: it writes", "model", "wrong_model")
    if (asked.messages is None) == (asked.conversations is None):
        message = "either messages or conversations is needed"
        raise ApiError(400, message, "messages", "missing_required_parameter")
    asked_about = asked.conversations or [asked.messages or []]
    _check_count(len(asked_about), "conversations")
    rows = await run_in_threadpool(
        lambda: [judge.encode(plain_messages(messages), asked.tools) for messages in asked_about]
    )
    found, usage = await _read_rows(service, request, served, rows, judge.score_ids)
    data = [{"index": i, "object": "score", "score": found[i]} for i in range(len(rows))]
    return answer({**head("list", "score", served.name), "data": data, "usage": usage})


async def _read_rows(
    service: Service,
    request: Request,
    served: Served,
    rows: list[list[int]],
    read_part: Callable[[list[list[int]]], Sequence[T]],
) -> tuple[dict[int, T], dict[str, int]]:
    """What the model makes of each row, by its number, with others let on in between; and the usage."""
    _check_lengths(rows, served)
    visit = visit_of(request)
    service.take(visit, served, 1)
    visit.model, visit.prompt_tokens = served.name, sum(map(len, rows))
    found: dict[int, T] = {}
    for part in _pieces(rows):
        work = partial(read_part, [rows[i] for i in part])
        found.update(zip(part, await unless_gone(request, served.worker.call(work)), strict=True))
    return found, {"prompt_tokens": visit.prompt_tokens, "total_tokens": visit.prompt_tokens}


def _check_lengths(rows: Sequence[Sequence[int]], served: Served) -> None:
    size = None if served.engine is None else served.engine.model.config.vocab_size
    for i, row in enumerate(rows):
        if len(row) > served.room.tokens:
            message = (
                f"text {i} has {len(row)} tokens; this model reads {served.room.tokens} here: shorten it"
            )
            raise ApiError(400, message, "input", "context_length_exceeded")
        if size is not None and max(row) >= size:
            raise ApiError(400, f"text {i}: the ids go from 0 to {size - 1}", "input", "invalid_value")


def _pieces(rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Numbers of rows that are read together: of similar lengths, so that little is padding."""
    part: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if part and (len(part) + 1) * len(rows[i]) > PIECE_TOKENS:
            yield part
            part = []
        part.append(i)
    if part:
        yield part


def _in_base64(vector: Sequence[float]) -> str:
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()
