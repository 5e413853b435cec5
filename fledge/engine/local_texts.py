"""What `fledge generate` asks of a model at hand: prompts, and a JSONL file of them."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fledge.engine import terminal
from fledge.engine.batch import Job, Results, asked_in, read_jobs
from fledge.engine.choices import choice_logps
from fledge.engine.constraints import choices_of
from fledge.engine.engine import Engine
from fledge.engine.generation import Generation, Request
from fledge.engine.scheduler import slots_needed
from fledge.engine.search_texts import Search, search_texts
from fledge.engine.settings import row_params
from fledge.engine.stops import TextStream
from fledge.engine.text import (
    LocalChat,
    TextCompletion,
    complete_ids,
    encode_prompt,
    joined,
    stream_ids,
    terminal_safe,
    text_stream,
)
from fledge.errors import UserError
from fledge.tokenizer.bpe import Tokenizer
from fledge.types import Grammar, Message, SamplingParams, Token


def print_local(
    engine: Engine, tokenizer: Tokenizer, prompts: list[str], as_chat: bool, params: SamplingParams,
    search: Search, show_logprobs: int | None, show_probabilities: bool,
) -> None:  # fmt: skip
    """`params.n` completions of each prompt on stdout, or what a search finds, with `params.echo` each behind
    its prompt: as they are made if there is one and stdout is a terminal. What is known about them goes to
    stderr."""
    if as_chat:
        chat = LocalChat(engine, tokenizer)
        params = chat.until_end_of_turn(params)
        prompt_ids = [chat.prompt([Message(role="user", content=prompt)]) for prompt in prompts]
    else:
        prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    choices = choices_of(params.constraint)
    if show_probabilities and choices is None:
        raise UserError("--show-probabilities goes with --choices TEXT ...")
    started = time.perf_counter()
    found = [] if search is None else search_texts(engine, tokenizer, prompt_ids, params, search)
    counts = [params.n] * len(prompts) if search is None else list(map(len, found))
    repeated = [i for i, count in enumerate(counts) for _ in range(count)]
    shown = [prompts[i] if params.echo else "" for i in repeated]
    if search is not None:
        made = [completion for texts in found for completion, _ in texts]
        terminal.print_all([prompts[i] for i in repeated], shown, made)
        for i, (_, known) in enumerate(itertools.chain.from_iterable(found), start=1):
            print(f"{i}: {known}" if len(made) > 1 else known, file=sys.stderr)
    elif len(repeated) == 1 and sys.stdout.isatty() and show_logprobs is None:
        print(terminal_safe(shown[0]), end="", flush=True)
        made = [terminal.print_stream(stream_ids(engine, tokenizer, prompt_ids[0], params))]
    else:
        made = complete_ids(engine, tokenizer, prompt_ids, params)
        terminal.print_all([prompts[i] for i in repeated], shown, made)
    if show_logprobs is not None:
        for completion in made:
            terminal.print_logprobs(tokenizer, completion)
    terminal.print_summary(made, time.perf_counter() - started, terminal.mask_cost(engine))
    terminal.print_speculation(engine, prompt_ids, params)
    if show_probabilities and choices is not None:
        scores = choice_logps(engine, tokenizer, prompt_ids, choices, params.stop_ids)
        terminal.print_probabilities(prompts, choices, scores)


def read_local_jobs(
    path: Path, engine: Engine, tokenizer: Tokenizer, defaults: SamplingParams, as_chat: bool, strict: bool
) -> list[Job[Request]]:
    """`batch.read_jobs` for a model at hand. A row without a `seed` of its own draws from the random numbers
    of the default seed and its number."""

    def read(row: Mapping[str, Any], number: int) -> Request:
        params = row_params(row, defaults, tokenizer)
        prompt, params = _prompt(row, params, engine, tokenizer, as_chat)
        return Request(prompt, params, 0 if "seed" in row else number)

    return read_jobs(path, read, strict)


def _prompt(
    row: Mapping[str, Any], params: SamplingParams, engine: Engine, tokenizer: Tokenizer, as_chat: bool
) -> tuple[list[int], SamplingParams]:
    asked = asked_in(row, as_chat)
    if isinstance(asked, str):
        return encode_prompt(tokenizer, asked), params
    tools = row.get("tools")
    if not isinstance(tools, list | None):
        raise UserError('"tools" must be a list')
    chat = LocalChat(engine, tokenizer)
    return chat.prompt(asked, tools), chat.until_end_of_turn(params)


def local_results(
    engine: Engine, tokenizer: Tokenizer, probabilities: bool, jobs: Sequence[tuple[int, Request]]
) -> Results:
    """The completions of each row, and with `probabilities` those of its choices: `run_batch`'s `make`."""
    if not jobs:
        return
    asked = dict(jobs)
    needs = [slots_needed(len(one.prompt), one.params.max_tokens, engine.context) for one in asked.values()]
    samples = sum(max(1, one.params.n) for one in asked.values())
    slots = min(max(1, *needs), engine.most_slots())
    scheduler = engine.new_scheduler(min(samples, engine.batch_size), slots)
    running: dict[int, tuple[list[Generation], list[TextStream]]] = {}
    shares: dict[int, dict[str, Any]] = {}
    todo = list(reversed(asked))
    while todo or running:
        while todo and len(running) < 2 * engine.batch_size:
            index = todo.pop()
            request = asked[index]
            texts = [text_stream(engine, tokenizer, request.params) for _ in range(request.params.n)]
            try:
                running[index] = scheduler.submit(replace(request, should_stop=_stopped(texts))), texts
            except UserError as error:
                yield index, {"error": str(error)}
        if probabilities:
            new = {index: asked[index] for index in running if index not in shares}
            shares.update(_shares(engine, tokenizer, new))
        scheduler.step()
        for index, (made, texts) in list(running.items()):
            if all(generation.done for generation in made):
                del running[index]
                result, added = _result(asked[index].params, made, texts, tokenizer), shares.pop(index, {})
                failed = next((one for one in (added, result) if "error" in one), None)
                yield index, failed or {**result, **added}


def _shares(engine: Engine, tokenizer: Tokenizer, asked: Mapping[int, Request]) -> dict[int, dict[str, Any]]:
    """What is added to each row: the probabilities of its choices, where it has such."""
    alike: dict[tuple[Grammar | None, tuple[int, ...]], list[int]] = {}
    for index, request in asked.items():
        alike.setdefault((request.params.constraint, request.params.stop_ids), []).append(index)
    added: dict[int, dict[str, Any]] = {index: {} for index in asked}
    for (grammar, stop_ids), indexes in alike.items():
        choices = choices_of(grammar)
        if choices is None:
            continue
        prompts = [asked[index].prompt for index in indexes]
        try:
            scores = choice_logps(engine, tokenizer, prompts, choices, stop_ids)
        except UserError as error:  # of one prompt, so each on its own
            if len(asked) == 1:
                return {indexes[0]: {"error": str(error)}}
            for index in indexes:
                added |= _shares(engine, tokenizer, {index: asked[index]})
            continue
        for index, score in zip(indexes, scores, strict=True):
            shares = zip(choices, score.probabilities, strict=True)
            added[index]["probabilities"] = {choice: round(share, 6) for choice, share in shares}
            added[index]["probabilities_method"] = score.method
    return added


def _stopped(texts: list[TextStream]) -> Callable[[int, int], bool]:
    def should_stop(sample: int, token_id: int) -> bool:
        texts[sample].push(token_id)
        return texts[sample].stopped

    return should_stop


def _result(
    params: SamplingParams, made: list[Generation], texts: list[TextStream], tokenizer: Tokenizer
) -> dict[str, Any]:
    try:
        completions = [joined(text, g.completion()) for text, g in zip(texts, made, strict=True)]
    except UserError as error:
        return {"error": str(error)}
    result = {"completions": [_as_json(made, tokenizer, params) for made in completions]}
    if params.echo:
        result["prompt_logprobs"] = [_token_as_json(token, tokenizer) for token in completions[0].echoed]
    return result


def _as_json(made: TextCompletion, tokenizer: Tokenizer, params: SamplingParams) -> dict[str, Any]:
    row = {"text": made.text, "finish_reason": made.finish_reason, "tokens": len(made.ids)}
    if params.top_logprobs:
        parts = zip(made.ids, made.logps, made.sampled_logps, made.top_logps, strict=True)
        row["logprobs"] = [_token_as_json(Token(*part), tokenizer) for part in parts]
    return row


def _token_as_json(token: Token, tokenizer: Tokenizer) -> dict[str, Any]:
    """In OpenAI's names, with ids: the text of half a character says nothing."""
    top = [{"id": i, "token": tokenizer.decode([i]), "logprob": round(logp, 6)} for i, logp in token.top]
    row = {"id": token.id, "token": tokenizer.decode([token.id]), "logprob": round(token.logp, 6)}
    return {**row, "top_logprobs": top}
