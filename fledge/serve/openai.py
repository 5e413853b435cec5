"""The fields of requests, in OpenAI's names and (for what OpenAI lacks) vLLM's; nothing here runs anything.

Unknown fields are kept aside (`model_extra`), so that they can be named in a warning.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from fledge.serve.errors import ApiError

# Alternatives shown for each token, at most.
MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOPS = 64

Finite = Annotated[float, Field(allow_inf_nan=False)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Prompt = str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
Object = dict[str, Any]
# The chat template checks them; this is for the description.
Message = Annotated[Object, WithJsonSchema({
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": {
            "type": "object",
            "required": ["type", "text"],
            "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        }}]},
    },
})]  # fmt: skip
Messages = Annotated[list[Message], Field(min_length=1)]
# Known, and without any meaning here: no warning.
WITHOUT_EFFECT = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention",
}  # fmt: skip


class Fields(BaseModel):
    """What all requests have."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = Field(None, description="A model of /v1/models; by default the first.")


class StreamOptions(BaseModel):
    """How to stream."""

    model_config = ConfigDict(extra="allow", strict=True)

    include_usage: bool | None = Field(None, description="A last chunk with the number of tokens.")


class StructuredOutputs(BaseModel):
    """What the text must be (vLLM); one of them."""

    model_config = ConfigDict(extra="allow", strict=True)

    json_: str | Object | None = Field(None, alias="json", description="A JSON schema, or its text.")
    json_object: bool | None = Field(None, description="Any JSON object.")
    regex: str | None = Field(None, description="A regular expression (Rust's syntax).")
    choice: list[str] | None = Field(None, description="Texts, one of which it is.")
    grammar: str | None = Field(None, description="A Lark grammar (llguidance's kind).")


class Sampling(Fields):
    """How completions are made."""

    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        None, description="Default 1."
    )
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(None, description="How many.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    presence_penalty: Finite | None = None
    frequency_penalty: Finite | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = None
    response_format: Object | None = Field(None, description="text, json_object or json_schema.")
    user: str | None = None
    # What follows is vLLM's.
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = Field(None, description="0 and -1: every token.")
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    structured_outputs: StructuredOutputs | None = None
    use_beam_search: bool | None = Field(None, description="n is the number of beams.")
    length_penalty: Finite | None = Field(None, description="Of beam search.")
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None


class CompletionRequest(Sampling):
    """/v1/completions."""

    prompt: Prompt | None = Field(None, description="Texts, or lists of ids; by default a new document.")
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(None, description="Default 16.")
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    suffix: str | None = Field(None, description="Not supported: refused unless empty.")


class ChatRequest(Sampling):
    """/v1/chat/completions."""

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: list[Object] | None = None
    tool_choice: str | Object | None = Field(None, description="none, auto, required, or a function's name.")
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = Field(None, description="Go on with the last message (vLLM).")


class EmbeddingRequest(Fields):
    """/v1/embeddings."""

    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None


class TokenizeRequest(Fields):
    """/tokenize: a prompt, or messages."""

    prompt: str | None = None
    add_special_tokens: bool | None = Field(None, description="With what texts begin with.")
    messages: Messages | None = None
    tools: list[Object] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Fields):
    """/detokenize."""

    tokens: list[Annotated[int, Field(ge=0)]]


class TemplateRequest(Fields):
    """/apply-template."""

    messages: Messages
    tools: list[Object] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class ScoreRequest(Fields):
    """/v1/score: conversations that end with the assistant's turn."""

    messages: Messages | None = None
    conversations: Annotated[list[Messages], Field(min_length=1)] | None = None
    tools: list[Object] | None = None


R = TypeVar("R", bound=Fields)


_TYPES = ("str", "int", "float", "bool", "dict", "list")


def read_request(kind: type[R], body: bytes) -> R:
    """The request in a body. Raises ApiError (400) that names the field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        raise ApiError(400, f"the body is no valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    # Where types can be chosen from, the name of the one that failed stands in the place too.
    place = [str(part) for part in first["loc"] if part not in _TYPES and not set(str(part)) & set("[-(")]
    param = ".".join(place) or None
    if first["type"] == "missing":
        raise ApiError(400, f"{param} is missing", param, "missing_required_parameter")
    raise ApiError(400, f"{param or 'the body'}: {first['msg']}", param, "invalid_value")


def ignored_fields(request: Fields) -> list[str]:
    """Fields that mean nothing to this server, and were not left out."""
    names = [name for name, value in (request.model_extra or {}).items() if value is not None]
    for field in ("stream_options", "structured_outputs"):
        inner = getattr(request, field, None)
        names += [f"{field}.{name}" for name in (inner.model_extra or {})] if inner is not None else []
    return sorted(name for name in names if name not in WITHOUT_EFFECT)
