"""`/v1/completions` and `/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from fledge.errors import UserError
from fledge.serve import responses as say
from fledge.serve.errors import ApiError
from fledge.serve.openai import ChatRequest, CompletionRequest, Fields, Sampling, ignored_fields, read_request
from fledge.serve.plan import Plan, Room, best_first, plan_chat, plan_completion
from fledge.serve.relay import Endpoint
from fledge.serve.responses import Made, Prompt
from fledge.serve.service import Service, told
from fledge.serve.streams import ChatChunks, TextChunks
from fledge.serve.tokens import TokenTexts, prompt_logprobs
from fledge.serve.visits import Visit, unless_gone, visit_of
from fledge.serve.worker import Run, Step
from fledge.tokenizer.bpe import Tokenizer
from fledge.types import Token

R = TypeVar("R", bound=Fields)
S = TypeVar("S", bound=Sampling)
Chunks = TextChunks | ChatChunks
EVENTS = "text/event-stream"


async def read(request: Request, kind: type[R]) -> R:
    """The request's body; what it has without meaning is noted for the warning."""
    body = await request.body()
    asked = await run_in_threadpool(read_request, kind, body)
    visit_of(request).ignored = ignored_fields(asked)
    return asked


async def elsewhere(service: Service, request: Request) -> Endpoint | None:
    """The way to the model of a request, if another server has it; what else it asks is that one's affair."""
    return None if service.relay is None else service.endpoint_of((await read(request, Fields)).model)


def answer(value: Any) -> Response:
    """A value as a whole answer."""
    return Response(say.as_json(value), media_type="application/json")


async def completions(service: Service, request: Request) -> Response:
    """Continue texts."""
    return await _generate(service, request, CompletionRequest, plan_completion, TextChunks, _text_answer)


async def chat_completions(service: Service, request: Request) -> Response:
    """Answer a conversation."""
    return await _generate(service, request, ChatRequest, plan_chat, ChatChunks, _chat_answer)


async def _generate(
    service: Service,
    request: Request,
    kind: type[S],
    plan_of: Callable[[S, Tokenizer, Room], Plan],
    chunks_of: Callable[[S, TokenTexts, str, Plan, list[list[Token]]], Chunks],
    answer_of: Callable[[S, TokenTexts, str, Plan, list[Made], list[list[Token]]], dict[str, Any]],
) -> Response:
    """Read a request, have it made, and give it as a stream of `chunks_of` or whole as of `answer_of`."""
    if (endpoint := await elsewhere(service, request)) is not None:
        return await endpoint.pass_on(request)
    asked = await read(request, kind)
    served = service.writer(asked.model)
    plan = await run_in_threadpool(plan_of, asked, served.tokenizer, served.room)
    texts = TokenTexts(served.tokenizer, bool(asked.return_tokens_as_token_ids))
    if asked.stream:
        run = await service.begin(request, served, plan, True)
        first = await _first(request, run)
        return _streamed(first, chunks_of(asked, texts, served.name, plan, run.echoed), visit_of(request))
    made, echoed = await service.whole(request, served, plan)
    return await run_in_threadpool(lambda: answer(answer_of(asked, texts, served.name, plan, made, echoed)))


def _text_answer(
    asked: CompletionRequest,
    texts: TokenTexts,
    model: str,
    plan: Plan,
    made: list[Made],
    echoed: list[list[Token]],
) -> dict[str, Any]:
    choices: list[dict[str, Any]] = []
    for i, ids in enumerate(plan.prompts):
        own = made[i * plan.made : (i + 1) * plan.made]
        if plan.made > plan.n:
            order = best_first([[token.logp for token in one.scored] for one in own])
            own = [own[place] for place in order[: plan.n]]
        for one in own:
            choices.append(say.text_choice(asked, texts, len(choices), Prompt(ids, echoed[i]), one))
    head = say.head("text_completion", "cmpl", model)
    return {**head, "choices": choices, "usage": _usage(plan, made)}


def _chat_answer(
    asked: ChatRequest, texts: TokenTexts, model: str, plan: Plan, made: list[Made], echoed: list[list[Token]]
) -> dict[str, Any]:
    with_tools = plan.choice is not None and plan.choice.mode != "none"
    choices = [say.chat_choice(asked, texts, i, one, with_tools) for i, one in enumerate(made)]
    head = say.head("chat.completion", "chatcmpl", model)
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


def _streamed(steps: AsyncIterator[list[Step]], chunks: Chunks, visit: Visit) -> Response:
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
