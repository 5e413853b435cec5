"""`/v1/completions` and `/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from fledge.errors import UserError
from fledge.serve import responses as say
from fledge.serve.errors import ApiError
from fledge.serve.models import Served
from fledge.serve.openai import ChatRequest, CompletionRequest, Fields, ignored_fields, read_request
from fledge.serve.plan import Plan, best_first, plan_chat, plan_completion
from fledge.serve.responses import Made, Prompt
from fledge.serve.service import Service, told
from fledge.serve.streams import ChatChunks, TextChunks
from fledge.serve.tokens import TokenTexts, prompt_logprobs
from fledge.serve.visits import Visit, unless_gone, visit_of
from fledge.serve.worker import Run, Step

R = TypeVar("R", bound=Fields)
EVENTS = "text/event-stream"


async def read(request: Request, kind: type[R]) -> R:
    """The request's body; what it has without meaning is noted for the warning."""
    body = await request.body()
    asked = await run_in_threadpool(read_request, kind, body)
    visit_of(request).ignored = ignored_fields(asked)
    return asked


def answer(value: Any) -> Response:
    """A value as a whole answer."""
    return Response(say.as_json(value), media_type="application/json")


async def completions(service: Service, request: Request) -> Response:
    """Continue texts."""
    asked = await read(request, CompletionRequest)
    if (relay := service.relay_of(asked.model)) is not None:
        return await relay.pass_on(request)
    served = service.writer(asked.model)
    plan = await run_in_threadpool(plan_completion, asked, served.tokenizer, served.room)
    if asked.stream:
        run = await service.begin(request, served, plan, True)
        first = await _first(request, run)
        texts = TokenTexts(served.tokenizer, bool(asked.return_tokens_as_token_ids))
        return _streamed(first, TextChunks(asked, texts, served.name, plan, run.echoed), visit_of(request))
    made, echoed = await service.whole(request, served, plan)
    return await run_in_threadpool(lambda: answer(_text_answer(asked, served, plan, made, echoed)))


async def chat_completions(service: Service, request: Request) -> Response:
    """Answer a conversation."""
    asked = await read(request, ChatRequest)
    if (relay := service.relay_of(asked.model)) is not None:
        return await relay.pass_on(request)
    served = service.writer(asked.model)
    plan = await run_in_threadpool(plan_chat, asked, served.tokenizer, served.room)
    if asked.stream:
        run = await service.begin(request, served, plan, True)
        first = await _first(request, run)
        texts = TokenTexts(served.tokenizer, bool(asked.return_tokens_as_token_ids))
        return _streamed(first, ChatChunks(asked, texts, served.name, plan, run.echoed), visit_of(request))
    made, echoed = await service.whole(request, served, plan)
    return await run_in_threadpool(lambda: answer(_chat_answer(asked, served, plan, made, echoed)))


def _text_answer(
    asked: CompletionRequest, served: Served, plan: Plan, made: list[Made], echoed: list[Any]
) -> dict[str, Any]:
    texts = TokenTexts(served.tokenizer, bool(asked.return_tokens_as_token_ids))
    choices: list[dict[str, Any]] = []
    for i, ids in enumerate(plan.prompts):
        own = made[i * plan.made : (i + 1) * plan.made]
        if plan.made > plan.n:
            order = best_first([[token.logp for token in one.scored] for one in own])
            own = [own[place] for place in order[: plan.n]]
        for one in own:
            choices.append(say.text_choice(asked, texts, len(choices), Prompt(ids, echoed[i]), one))
    head = say.head("text_completion", "cmpl", served.name)
    return {**head, "choices": choices, "usage": _usage(plan, made)}


def _chat_answer(
    asked: ChatRequest, served: Served, plan: Plan, made: list[Made], echoed: list[Any]
) -> dict[str, Any]:
    texts = TokenTexts(served.tokenizer, bool(asked.return_tokens_as_token_ids))
    with_tools = plan.choice is not None and plan.choice.mode != "none"
    choices = [say.chat_choice(asked, texts, i, one, with_tools) for i, one in enumerate(made)]
    head = say.head("chat.completion", "chatcmpl", served.name)
    whole = {**head, "choices": choices, "usage": _usage(plan, made)}
    if asked.prompt_logprobs is not None:
        whole["prompt_logprobs"] = prompt_logprobs(texts, plan.prompts[0], echoed[0], asked.prompt_logprobs)
    if asked.return_token_ids:
        whole["prompt_token_ids"] = plan.prompts[0]
    return whole


def _usage(plan: Plan, made: list[Made]) -> dict[str, int]:
    completion_tokens = sum(one.end.made for one in made if one.end is not None)
    return say.usage(sum(map(len, plan.prompts)), completion_tokens)


async def _first(request: Request, run: Run) -> AsyncIterator[list[Step]]:
    """The steps of a run, the first of which is there: what is wrong at once still gets a status."""
    steps = told(run, visit_of(request))
    one = await unless_gone(request, anext(steps))

    async def all_steps() -> AsyncIterator[list[Step]]:
        yield one
        async for more in steps:
            yield more

    return all_steps()


def _streamed(steps: AsyncIterator[list[Step]], chunks: TextChunks | ChatChunks, visit: Visit) -> Response:
    """Events made of steps; an error ends them."""

    async def events() -> AsyncIterator[bytes]:
        try:
            async for some in steps:
                if out := b"".join(chunks.steps(some)):
                    yield out
            yield b"".join(chunks.last(visit.completion_tokens))
        except (ApiError, UserError) as error:
            shown = error if isinstance(error, ApiError) else ApiError(400, str(error))
            visit.status = shown.status
            yield say.event(shown.body()) + say.DONE

    return StreamingResponse(events(), media_type=EVENTS, headers=say.NOT_KEPT)
