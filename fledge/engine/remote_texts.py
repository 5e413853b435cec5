"""What `fledge generate` asks of a model behind an endpoint: prompts, and a JSONL file of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from fledge.engine.at_once import as_they_come
from fledge.engine.batch import Job, Results, asked_in, read_jobs
from fledge.engine.remote import Asked, EndpointError, RemoteChat, num_tokens
from fledge.engine.sampling import validate
from fledge.engine.settings import ROW_SETTINGS, local_only, row_params
from fledge.engine.terminal import print_all, print_stream
from fledge.engine.text import TextCompletion, terminal_safe
from fledge.errors import UserError
from fledge.types import Message, SamplingParams

# Settings of `fledge generate` that only a model at hand can follow, besides LOCAL_SETTINGS.
LOCAL_ONLY = {
    "show_logprobs", "choices", "show_probabilities", "beams", "length_penalty", "early_stopping",
    "stochastic", "strategy", "max_expansions", "max_seconds", "best_of", "reward_model", "speculate",
    "draft_model", "draft_tokens",
}  # fmt: skip
# What of a row's settings every endpoint knows.
REMOTE_ROW_SETTINGS = {
    "temperature", "top_p", "max_tokens", "seed", "stop", "presence_penalty", "frequency_penalty", "n",
}  # fmt: skip
# What a row asks for: each is a request of its own, with a seed of its own.
Requests = Sequence[tuple[Asked, SamplingParams]]


def print_remote(chat: RemoteChat, prompts: list[str], as_chat: bool, params: SamplingParams) -> None:
    """`params.n` completions of each prompt on stdout, with `params.echo` each behind its prompt: as they are
    made if there is one and stdout is a terminal. What is known about them goes to stderr."""
    started = time.perf_counter()
    shown = [prompt if params.echo else "" for prompt in prompts]
    asked: list[Asked] = [[Message(role="user", content=prompt)] if as_chat else prompt for prompt in prompts]
    if len(asked) * params.n == 1 and sys.stdout.isatty():
        print(terminal_safe(shown[0]), end="", flush=True)
        made = [print_stream(chat.stream_reply(asked[0], params))]
    else:
        made = chat.replies(asked, params)
        repeated = [i for i in range(len(prompts)) for _ in range(params.n)]
        print_all([prompts[i] for i in repeated], [shown[i] for i in repeated], made)
    counts = [num_tokens(one) for one in made]
    tokens = f"{sum(filter(None, counts)):,} tokens, " if None not in counts else ""
    cut = sum(one.finish_reason == "length" for one in made)
    ended = f"{len(made) - cut} at their end" + (f", {cut} cut off" if cut else "")
    print(f"{tokens}{time.perf_counter() - started:.1f} s; ended: {ended}", file=sys.stderr)


def read_remote_jobs(
    path: Path, defaults: SamplingParams, as_chat: bool, strict: bool
) -> list[Job[Requests]]:
    """`batch.read_jobs` for a model behind an endpoint. A row without a `seed` of its own has seeds from the
    default one on, which no other such row has."""
    if defaults.echo:
        raise UserError("--echo goes with a local model in --batch; leave it out, or leave out --endpoint")
    before = 0

    def read(row: Mapping[str, Any], number: int) -> Requests:
        nonlocal before
        params = _row_params(row, defaults)
        asked = asked_in(row, as_chat)
        if row.get("tools") and not isinstance(asked, str):
            raise UserError('"tools" go with a local model; leave them out, or leave out --endpoint')
        first = params.seed + (0 if "seed" in row else before)
        before += params.n
        return [(asked, replace(params, n=1, seed=first + sample)) for sample in range(params.n)]

    return read_jobs(path, read, strict)


def _row_params(row: Mapping[str, Any], defaults: SamplingParams) -> SamplingParams:
    for key, value in row.items():
        if key in ROW_SETTINGS and key not in REMOTE_ROW_SETTINGS and value is not None:
            raise local_only(key)
    params = row_params(row, defaults, None)
    validate(params)
    return params


def remote_results(chat: RemoteChat, strict: bool, jobs: Sequence[tuple[int, Requests]]) -> Results:
    """The completions of each row: `run_batch`'s `make`. A row that the endpoint refuses gets an "error"; an
    endpoint that answers nothing ends them (EndpointError), as with `strict` the first refusal does. Nothing
    more is asked then, but what is under way is waited for: it may be paid for."""
    asked = dict(jobs)
    made: dict[int, dict[int, TextCompletion]] = {index: {} for index in asked}
    refused: list[tuple[int, dict[str, Any]]] = []
    fatal: list[UserError] = []

    def wanted() -> Iterator[tuple[int, int]]:
        for index, requests in asked.items():
            for sample in range(len(requests)):
                if fatal:
                    return
                if index in made:  # no other of its requests was refused
                    yield index, sample

    def ask(one: tuple[int, int]) -> TextCompletion:
        try:
            return chat.reply(*asked[one[0]][one[1]])
        except UserError as error:
            if strict or isinstance(error, EndpointError):
                fatal.append(error)
            raise

    with closing(as_they_come(ask, wanted(), chat.parallel)) as answers:
        for (index, sample), answer in answers:
            if isinstance(answer, EndpointError):
                continue
            if isinstance(answer, UserError):
                if made.pop(index, None) is not None:
                    refused.append((index, {"error": str(answer)}))
                    if not strict:
                        yield refused[-1]
            elif isinstance(answer, Exception):
                raise answer
            elif index in made:
                made[index][sample] = answer
                if len(made[index]) == len(asked[index]):
                    found = made.pop(index)
                    yield index, {"completions": [_as_json(found[i]) for i in range(len(found))]}
    if strict:
        yield from refused
    if fatal:
        raise fatal[0]


def _as_json(made: TextCompletion) -> dict[str, Any]:
    tokens = num_tokens(made)
    counted = {} if tokens is None else {"tokens": tokens}
    return {"text": made.text, "finish_reason": made.finish_reason, **counted}
