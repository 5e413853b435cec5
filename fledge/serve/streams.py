"""What a model makes, step by step, as the chunks of OpenAI's streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fledge.serve.openai import ChatRequest, CompletionRequest, Sampling
from fledge.serve.plan import Plan
from fledge.serve.responses import DONE, Made, chat_reason, event, head, usage
from fledge.serve.tokens import Place, TokenTexts, chat_logprobs, prompt_logprobs, text_logprobs
from fledge.serve.tools import CallStream
from fledge.serve.worker import Step
from fledge.types import Token


class _Head:
    """What all chunks of a stream begin with; with `include_usage` all but the last have no numbers."""

    def __init__(self, asked: Sampling, kind: str, prefix: str, model: str, plan: Plan) -> None:
        options = asked.stream_options
        self._head, self._plan = head(kind, prefix, model), plan
        self._with_usage = options is not None and bool(options.include_usage)

    def chunk(self, choice: dict[str, Any], **more: Any) -> bytes:
        """A chunk with one choice."""
        numbers = {"usage": None} if self._with_usage else {}
        return event({**self._head, "choices": [choice], **numbers, **more})

    def last(self, made: int) -> Iterator[bytes]:
        """What follows the last choice."""
        if self._with_usage:
            numbers = usage(sum(map(len, self._plan.prompts)), made)
            yield event({**self._head, "choices": [], "usage": numbers})
        yield DONE


class TextChunks:
    """The chunks of `/v1/completions`."""

    def __init__(
        self, asked: CompletionRequest, texts: TokenTexts, model: str, plan: Plan,
        echoed: Sequence[list[Token]],
    ) -> None:  # fmt: skip
        self._asked, self._texts, self._plan, self._echoed = asked, texts, plan, echoed
        self._head = _Head(asked, "text_completion", "cmpl", model, plan)
        self._places: dict[int, Place] = {}  # of each choice, behind the tokens so far

    def steps(self, steps: Sequence[Step]) -> Iterator[bytes]:
        """The chunks of some steps."""
        for step in steps:
            yield self._head.chunk(self._choice(step))

    def last(self, made: int) -> Iterator[bytes]:
        """The end; `made`: tokens in all."""
        return self._head.last(made)

    def _choice(self, step: Step) -> dict[str, Any]:
        asked, prompt = self._asked, self._plan.prompts[step.place // self._plan.made]
        made, begins = Made(), step.place not in self._places
        place = self._places.setdefault(step.place, Place())
        made.add(step)
        text, tokens = step.text, list[Token | int](made.scored)
        if begins and asked.echo:
            text = self._texts.tokenizer.decode(prompt, skip_special=True) + text
            tokens = [prompt[0], *self._echoed[step.place // self._plan.made], *tokens]
        reason = made.finish_reason if step.end is not None else None
        choice: dict[str, Any] = {
            "index": step.place,
            "text": text,
            "finish_reason": reason,
            "logprobs": None,
        }
        if asked.logprobs is not None and tokens:
            choice["logprobs"] = text_logprobs(self._texts, tokens, asked.logprobs, place)
        if begins and asked.prompt_logprobs is not None:
            echoed = self._echoed[step.place // self._plan.made]
            choice["prompt_logprobs"] = prompt_logprobs(self._texts, prompt, echoed, asked.prompt_logprobs)
        if asked.return_token_ids:
            choice["token_ids"] = [token.id for token in step.tokens]
            if begins:
                choice["prompt_token_ids"] = prompt
        return choice


class ChatChunks:
    """The chunks of `/v1/chat/completions`: the role first, then text and calls, the reason last."""

    def __init__(
        self, asked: ChatRequest, texts: TokenTexts, model: str, plan: Plan, echoed: Sequence[list[Token]]
    ) -> None:
        self._asked, self._texts, self._plan, self._echoed = asked, texts, plan, echoed
        self._head = _Head(asked, "chat.completion.chunk", "chatcmpl", model, plan)
        self._begun = False
        with_tools = plan.choice is not None and plan.choice.mode != "none"
        self._calls = [CallStream() if with_tools else None for _ in range(plan.made)]
        self._called = [0] * plan.made
        self._held: list[list[Token]] = [[] for _ in range(plan.made)]
        self._ends: list[list[Token]] = [[] for _ in range(plan.made)]  # what ended each answer

    def steps(self, steps: Sequence[Step]) -> Iterator[bytes]:
        """The chunks of some steps."""
        if not self._begun:
            yield from self._begin()
        for step in steps:
            yield from self._step(step)

    def last(self, made: int) -> Iterator[bytes]:
        """The end; `made`: tokens in all."""
        return self._head.last(made)

    def _begin(self) -> Iterator[bytes]:
        self._begun = True
        more: dict[str, Any] = {}
        if self._asked.return_token_ids:
            more["prompt_token_ids"] = self._plan.prompts[0]
        if (top := self._asked.prompt_logprobs) is not None:
            more["prompt_logprobs"] = prompt_logprobs(
                self._texts, self._plan.prompts[0], self._echoed[0], top
            )
        for place in range(self._plan.made):
            yield self._head.chunk(self._choice(place, {"role": "assistant", "content": ""}), **more)

    def _step(self, step: Step) -> Iterator[bytes]:
        place, calls = step.place, list[dict[str, Any]]()
        content, stream = step.text, self._calls[place]
        if stream is not None:
            content, calls = stream.push(step.text)
            if step.end is not None:
                rest, more = stream.finish()
                content, calls = content + rest, calls + more
        self._held[place] += step.tokens
        if content:
            yield self._head.chunk(self._choice(place, {"content": content}))
        for call in calls:
            call = {"index": self._called[place], **call}
            self._called[place] += 1
            yield self._head.chunk(self._choice(place, {"tool_calls": [call]}))
        if step.end is not None:
            made = Made(end=step.end)
            reason = chat_reason(made, self._called[place] > 0)
            self._ends[place] = made.scored
            yield self._head.chunk(self._choice(place, {}, reason))

    def _choice(self, place: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        """With the tokens that no chunk before has."""
        tokens = self._held[place]
        self._held[place] = []
        choice: dict[str, Any] = {"index": place, "delta": delta, "logprobs": None, "finish_reason": reason}
        scored = [*tokens, *self._ends[place]]
        if self._asked.logprobs and scored:
            choice["logprobs"] = chat_logprobs(self._texts, scored, self._asked.top_logprobs or 0)
        if self._asked.return_token_ids and tokens:
            choice["token_ids"] = [token.id for token in tokens]
        return choice
