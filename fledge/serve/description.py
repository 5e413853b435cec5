"""The server's OpenAPI description, made of the request models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import fledge
from fledge.serve import openai

_POST: dict[str, tuple[type[openai.Fields], str]] = {
    "/v1/completions": (openai.CompletionRequest, "Continue texts."),
    "/v1/chat/completions": (openai.ChatRequest, "Answer a conversation."),
    "/v1/embeddings": (openai.EmbeddingRequest, "Texts as vectors."),
    "/v1/score": (openai.ScoreRequest, "Rewards of conversations."),
    "/tokenize": (openai.TokenizeRequest, "Ids of a text."),
    "/detokenize": (openai.DetokenizeRequest, "The text of ids."),
    "/apply-template": (openai.TemplateRequest, "A conversation as text."),
}
_GET = {
    "/health": "Whether requests are taken.",
    "/v1/models": "All models.",
    "/v1/models/{model}": "One model.",
    "/tokenizer_info": "What the tokenizer's files say.",
}
_STREAMED = ("/v1/completions", "/v1/chat/completions")
_ERRORS = {
    400: "The request is wrong", 401: "A key is needed", 403: "Not from there", 404: "No such model",
    408: "The request did not come", 413: "Too long", 415: "No JSON", 429: "Too many wait",
    500: "The server's fault", 503: "The server is stopping", 504: "It took too long",
}  # fmt: skip
_JSON = "application/json"
_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def describe(names: Sequence[str]) -> dict[str, Any]:
    """OpenAPI 3.1, of a server with models of these names."""
    known = {"enum": list(names)}
    schemas: dict[str, Any] = {"Error": _ERROR_SCHEMA}
    paths: dict[str, Any] = {}
    for path, summary in _GET.items():
        parameters = []
        if path.endswith("{model}"):
            parameters = [{"name": "model", "in": "path", "required": True, "schema": known}]
        elif path == "/tokenizer_info":
            parameters = [{"name": "model", "in": "query", "schema": known}]
        paths[path] = {"get": {"summary": summary, "parameters": parameters, "responses": _responses(path)}}
    text = {"schema": {"type": "string"}}
    counters = {"200": {"description": "Prometheus's text form", "content": {"text/plain": text}}}
    paths["/metrics"] = {"get": {"summary": "Counters.", "responses": {**_responses(""), **counters}}}
    for path, (model, summary) in _POST.items():
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schema["properties"]["model"] = {**known, "description": "By default the first that fits."}
        schemas[model.__name__] = schema
        body = {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}
        paths[path] = {
            "post": {
                "summary": summary,
                "requestBody": {"required": True, "content": {_JSON: body}},
                "responses": _responses(path),
            }
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "fledge", "version": fledge.__version__},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def _responses(path: str) -> dict[str, Any]:
    whole: dict[str, Any] = {_JSON: {"schema": {"type": "object"}}}
    if path in _STREAMED:
        event = {"type": "object", "properties": {"data": {"type": "string"}}}
        whole["text/event-stream"] = {"schema": event}
    error = {_JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
    errors = {str(status): {"description": text, "content": error} for status, text in _ERRORS.items()}
    return {"200": {"description": "Done", "content": whole}, **errors}
