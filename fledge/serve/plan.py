"""A request as the engine takes it: ids, settings, constraint. Raises what the request has wrong."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fledge.engine.beam import Beams
from fledge.engine.settings import banned_sequences, constraint
from fledge.engine.text import encode_prompt
from fledge.errors import UserError
from fledge.serve.errors import ApiError
from fledge.serve.messages import chat_ids, plain_messages
from fledge.serve.openai import ChatRequest, CompletionRequest, Prompt, Sampling, StructuredOutputs
from fledge.serve.tools import ToolChoice, calls_grammar, tool_choice
from fledge.tokenizer.bpe import Tokenizer
from fledge.types import Grammar, SamplingParams

DEFAULT_COMPLETION_TOKENS = 16
# Scores of prompts that an answer may hold, candidates counted each.
MAX_ECHOED = 2**21
ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True)
class Plan:
    """What a model has to do: `params[i]` are those of prompt i. The first `n` of `params.n` completions are
    given, in the order of their probability if there are more (`best_of`)."""

    prompts: list[list[int]]
    params: list[SamplingParams]
    n: int
    beams: Beams | None = None
    choice: ToolChoice | None = None

    @property
    def made(self) -> int:
        """Completions of each prompt that are made."""
        return self.params[0].n

    @property
    def count(self) -> int:
        """Completions in all."""
        return len(self.prompts) * self.made


@dataclass(frozen=True)
class Room:
    """What a served model can take: tokens of a request, prompt and answer together; tokens of an answer."""

    tokens: int
    answer_tokens: int | None = None

    def answer(self, prompt_tokens: int, asked: int | None, name: str) -> int:
        """The most tokens of an answer to a prompt: what was asked for, as far as there is room (none if the
        prompt alone is asked about). ApiError for a prompt that leaves none."""
        left = self.tokens - prompt_tokens
        if left < 0 or (left == 0 and asked != 0):
            raise ApiError(
                400,
                f"{name} has {prompt_tokens} tokens; the model's context here holds {self.tokens} with the "
                "answer: shorten it",
                name,
                "context_length_exceeded",
            )
        limits = [left, *([] if asked is None else [asked])]
        return min(limits if self.answer_tokens is None else [*limits, self.answer_tokens])


def plan_completion(request: CompletionRequest, tokenizer: Tokenizer, room: Room) -> Plan:
    """`/v1/completions`."""
    if request.suffix:
        raise ApiError(400, "suffix: text cannot be filled in before a suffix here; leave it out", "suffix")
    prompts = prompt_ids(request.prompt or "", tokenizer)
    n = request.n or 1
    made = n if request.best_of is None else request.best_of
    if made < n:
        raise ApiError(400, f"best_of {made} is less than n {n}", "best_of")
    if made > n and request.stream:
        raise ApiError(400, "best_of cannot be streamed: what is best is known at the end", "best_of")
    wanted = [request.logprobs or 0, request.prompt_logprobs or 0]
    asked = DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    if asked == 0 and not request.echo and request.prompt_logprobs is None:
        raise ApiError(400, "max_tokens 0 gives nothing without echo or prompt_logprobs", "max_tokens")
    echo = request.prompt_logprobs is not None or (request.echo is True and request.logprobs is not None)
    params = SamplingParams(
        **_common(request, tokenizer), n=made, top_logprobs=max(wanted), echo=echo or asked == 0,
        stop_ids=_stop_ids(request), constraint=_text_constraint(request),
    )  # fmt: skip
    return _plan(prompts, params, n, asked, room, request, "prompt")


def plan_chat(request: ChatRequest, tokenizer: Tokenizer, room: Room) -> Plan:
    """`/v1/chat/completions`."""
    if tokenizer.chat_template is None or tokenizer.end_of_turn_id is None:
        raise ApiError(
            400, "this model has no chat template; use /v1/completions", "model", "no_chat_template"
        )
    choice = tool_choice(request.tools, request.tool_choice, request.parallel_tool_calls is not False)
    prompt = chat_ids(
        tokenizer, plain_messages(request.messages), choice.tools or None,
        request.add_generation_prompt, request.continue_final_message,
    )  # fmt: skip
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
    text = _text_constraint(request)
    grammar = calls_grammar(choice, text, tokenizer) if choice.mode != "none" else text
    stop_ids = _stop_ids(request)
    if not request.ignore_eos:
        stop_ids = (*stop_ids, tokenizer.end_of_turn_id)
    params = SamplingParams(
        **_common(request, tokenizer), n=request.n or 1, stop_ids=stop_ids, constraint=grammar,
        top_logprobs=max(request.top_logprobs or 0, request.prompt_logprobs or 0),
        echo=request.prompt_logprobs is not None,
    )  # fmt: skip
    asked = request.max_completion_tokens or request.max_tokens
    plan = _plan([prompt], params, params.n, asked, room, request, "messages")
    return replace(plan, choice=choice)


def _plan(
    prompts: list[list[int]], params: SamplingParams, n: int, asked: int | None, room: Room,
    request: Sampling, name: str,
) -> Plan:  # fmt: skip
    names = [name if len(prompts) == 1 else f"{name}[{i}]" for i in range(len(prompts))]
    most = [room.answer(len(ids), asked, where) for ids, where in zip(prompts, names, strict=True)]
    scores = sum(map(len, prompts)) * params.n * (1 + params.top_logprobs)
    if params.echo and scores > MAX_ECHOED:
        raise ApiError(400, f"{name}: the answer would echo {scores:,} scores; at most {MAX_ECHOED:,}", name)
    beams = _beams(request, params)
    if beams is not None:
        params = replace(params, temperature=params.temperature or 1.0)
    each = [replace(params, max_tokens=tokens, min_tokens=min(params.min_tokens, tokens)) for tokens in most]
    return Plan(prompts, each, n, beams)


def _beams(request: Sampling, params: SamplingParams) -> Beams | None:
    if not request.use_beam_search:
        return None
    if request.stream or params.echo or params.top_logprobs:
        name = "stream" if request.stream else "logprobs"
        raise ApiError(400, f"{name}: not possible with use_beam_search", name)
    penalty = 1.0 if request.length_penalty is None else request.length_penalty
    return Beams(params.n, penalty)


def prompt_ids(prompt: Prompt, tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of prompts of every form; of an empty text the end of another one."""
    if isinstance(prompt, str):
        return [encode_prompt(tokenizer, prompt)]
    found, single = list[list[int]](), list[int]()
    for one in prompt:
        if isinstance(one, int):
            single.append(one)
        else:
            found.append(encode_prompt(tokenizer, one) if isinstance(one, str) else list(one))
    return [single] if single else found


def _common(request: Sampling, tokenizer: Tokenizer) -> dict[str, Any]:
    """The settings that chats and texts share."""
    given = {
        "temperature": request.temperature, "min_p": request.min_p,
        "presence_penalty": request.presence_penalty, "frequency_penalty": request.frequency_penalty,
        "repetition_penalty": request.repetition_penalty, "min_tokens": request.min_tokens,
        "ignore_eos": request.ignore_eos,
        # The most probable token is left at 0 too, and the engine's least is above it.
        "top_p": None if request.top_p is None else max(request.top_p, 1e-9),
        "top_k": request.top_k if request.top_k and request.top_k > 0 else None,
    }  # fmt: skip
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    settings["seed"] = secrets.randbits(31) if request.seed is None else request.seed
    stop = request.stop or ()
    settings["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    settings["logit_bias"] = _biases(request.logit_bias or {})
    settings["banned"] = banned_sequences(request.bad_words or (), tokenizer)
    return settings


def _stop_ids(request: Sampling) -> tuple[int, ...]:
    return tuple(request.stop_token_ids or ())


def _biases(biases: Mapping[str, float]) -> dict[int, float]:
    found = {}
    for name, bias in biases.items():
        if not (name.isascii() and name.isdigit() and len(name) < 10):
            raise ApiError(400, f"logit_bias: {name[:40]!a} is no token id", "logit_bias", "invalid_value")
        found[int(name)] = bias
    return found


def _text_constraint(request: Sampling) -> Grammar | None:
    """What the text must be, from `response_format` or `structured_outputs`."""
    formed, structured = request.response_format, request.structured_outputs
    format_schema = None if formed is None else _format_schema(formed)
    if structured is None:
        return None if format_schema is None else constraint({"json_schema": json.dumps(format_schema)})
    if format_schema is not None:
        name = "structured_outputs"
        raise ApiError(400, "response_format and structured_outputs exclude each other", name)
    return constraint(_structured(structured))


def _format_schema(form: dict[str, Any]) -> dict[str, Any] | None:
    kind, name = form.get("type"), "response_format"
    if kind == "text":
        return None
    if kind == "json_object":
        return ANY_OBJECT
    if kind != "json_schema":
        raise ApiError(400, f"{name}.type must be text, json_object or json_schema", f"{name}.type")
    inner = form.get("json_schema")
    schema = inner.get("schema", {}) if isinstance(inner, dict) else None
    if not isinstance(schema, dict):
        where = f"{name}.json_schema"
        raise ApiError(400, f"{where} must have a schema, an object", where, "invalid_value")
    return schema


def _structured(given: StructuredOutputs) -> dict[str, Any]:
    schema: Any = given.json_
    if given.json_object:
        if schema is not None:
            raise UserError("structured_outputs: json and json_object: a request can have one of them")
        schema = ANY_OBJECT
    if isinstance(schema, dict):
        schema = json.dumps(schema)
    return {"json_schema": schema, "regex": given.regex, "choices": given.choice, "grammar": given.grammar}


def best_first(logps: Sequence[Sequence[float]]) -> list[int]:
    """Completions by their log-probability per token, the best first: OpenAI's `best_of`."""
    means = [math.fsum(one) / len(one) if one else 0.0 for one in logps]
    return sorted(range(len(means)), key=lambda i: -means[i])
