"""What `fledge generate` asks of a model behind an endpoint: prompts, and a JSONL file of them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from fledge.engine.at_once import as_they_come
from fledge.engine.batch import Progress, _journal, _line
from fledge.engine.remote import Asked, EndpointError, RemoteChat, num_tokens
from fledge.engine.sampling import validate
from fledge.engine.settings import ROW_SETTINGS, row_params
from fledge.engine.terminal import print_all
from fledge.engine.text import TextCompletion, terminal_safe
from fledge.errors import UserError
from fledge.files import open_binary, parse_json_object
from fledge.tokenizer.bpe import Tokenizer
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


def asked_with(prompt: str, as_chat: bool) -> Asked:
    """A prompt as what is sent: a user's turn, or the text itself."""
    return [Message(role="user", content=prompt)] if as_chat else prompt


def print_remote(chat: RemoteChat, prompts: list[str], as_chat: bool, params: SamplingParams) -> None:
    """`params.n` completions of each prompt on stdout, with `params.echo` each behind its prompt: as they are
    made if there is one and stdout is a terminal. What is known about them goes to stderr."""
    started = time.perf_counter()
    shown = [prompt if params.echo else "" for prompt in prompts]
    asked = [asked_with(prompt, as_chat) for prompt in prompts]
    if len(asked) * params.n == 1 and sys.stdout.isatty():
        print(terminal_safe(shown[0]), end="", flush=True)
        made = [_print_stream(chat, asked[0], params)]
    else:
        made = chat.replies(asked, params)
        repeated = [i for i in range(len(prompts)) for _ in range(params.n)]
        print_all([prompts[i] for i in repeated], [shown[i] for i in repeated], made)
    counts = [num_tokens(one) for one in made]
    tokens = f"{sum(filter(None, counts)):,} tokens, " if None not in counts else ""
    cut = sum(one.finish_reason == "length" for one in made)
    ended = f"{len(made) - cut} at their end" + (f", {cut} cut off" if cut else "")
    print(f"{tokens}{time.perf_counter() - started:.1f} s; ended: {ended}", file=sys.stderr)


def _print_stream(chat: RemoteChat, asked: Asked, params: SamplingParams) -> TextCompletion:
    """Print one completion as it is made."""
    stream = chat.stream_reply(asked, params)
    with closing(stream):
        while True:
            try:
                piece = next(stream)
            except StopIteration as end:
                print()
                made: TextCompletion = end.value
                return made
            print(terminal_safe(piece), end="", flush=True)


@dataclass(frozen=True)
class RemoteJob:
    """A row: what it asks for (once for each of `params`), or what is wrong with it."""

    where: str
    row: dict[str, Any]
    asked: Asked
    params: list[SamplingParams]
    error: str | None = None


def read_remote_jobs(path: Path, defaults: SamplingParams, as_chat: bool, strict: bool) -> list[RemoteJob]:
    """A job for every line that is not blank, as `batch.read_jobs` reads them. A row without a `seed` of its
    own has seeds from the default one on, which no other such row has. Raises UserError, with `strict` also
    for the first bad row."""
    jobs, before = list[RemoteJob](), 0
    with open_binary(path) as file:
        for line_number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where, row = f"{path}:{line_number}", dict[str, Any]()
            try:
                row = parse_json_object(line, where)
                params = _row_params(row, defaults)
                first = params.seed + (0 if "seed" in row else before)
                each = [replace(params, n=1, seed=first + number) for number in range(params.n)]
                jobs.append(RemoteJob(where, row, _asked(row, as_chat), each))
                before += params.n
            except UserError as error:
                message = str(error).removeprefix(f"{where}: ")
                if strict:
                    raise UserError(f"{where}: {message}") from None
                jobs.append(RemoteJob(where, row, "", [], message))
    if not jobs:
        raise UserError(f"{path}: no rows in it")
    return jobs


def _row_params(row: Mapping[str, Any], defaults: SamplingParams) -> SamplingParams:
    for key, value in row.items():
        if key in ROW_SETTINGS and key not in REMOTE_ROW_SETTINGS and value is not None:
            raise UserError(f"{key} goes with a local model; leave it out, or leave out --endpoint")
    # What would need a tokenizer is refused above.
    params = row_params(row, defaults, cast(Tokenizer, None))
    validate(params)
    return params


def _asked(row: Mapping[str, Any], as_chat: bool) -> Asked:
    messages, text = row.get("messages"), row.get("prompt")
    if (messages is None) == (text is None):
        raise UserError('a row has either "prompt" or "messages"')
    if text is not None:
        if not isinstance(text, str):
            raise UserError(f'"prompt" must be a text, not {text!r}')
        return asked_with(text, as_chat)
    if not isinstance(messages, list) or not messages:
        raise UserError('"messages" must be a list with at least one message')
    if row.get("tools"):
        raise UserError('"tools" go with a local model; leave them out, or leave out --endpoint')
    return messages


def run_remote_batch(
    chat: RemoteChat,
    path: Path,
    defaults: SamplingParams,
    as_chat: bool,
    out: Path,
    job_id: str,
    strict: bool,
    overwrite: bool,
    progress: Progress,
) -> dict[str, int]:
    """`batch.run_batch` with a model behind an endpoint, for the rows of a file. A row that the endpoint
    refuses gets an "error"; an endpoint that answers nothing ends the command (EndpointError), which then can
    be run again."""
    if defaults.echo:
        raise UserError("--echo goes with a local model in --batch; leave it out, or leave out --endpoint")
    jobs = read_remote_jobs(path, defaults, as_chat, strict)
    partial = out.with_name(out.name + ".partial")
    if out.exists() and not overwrite and not partial.exists():
        raise UserError(f"{out}: exists already; choose another --out or pass --overwrite")
    counts = {"rows": len(jobs), "kept": 0, "errors": 0, "tokens": 0}
    with _journal(partial, job_id, overwrite) as (file, finished):
        counts["kept"] = len(finished)
        todo = [index for index in range(len(jobs)) if index not in finished]
        with closing(_results(chat, jobs, todo)) as results:
            for index, result in results:
                if strict and "error" in result:
                    raise UserError(f"{jobs[index].where}: {result['error']}")
                file.write(_line({"row": index, "result": result}))
                file.flush()
                finished[index] = result
                counts["tokens"] += sum(made.get("tokens", 0) for made in result.get("completions", []))
                progress(len(finished), len(jobs), counts["tokens"])
        counts["errors"] = sum("error" in result for result in finished.values())
        temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
        with temporary.open("wb") as whole:
            whole.writelines(_line(finished[index]) for index in range(len(jobs)))
            whole.flush()
            os.fsync(whole.fileno())
        temporary.replace(out)
        partial.unlink()
    return counts


def _results(
    chat: RemoteChat, jobs: Sequence[RemoteJob], todo: Sequence[int]
) -> Generator[tuple[int, dict[str, Any]], None, None]:
    """(row, result) of every unfinished job as it ends."""
    for index in todo:
        if jobs[index].error is not None:
            yield index, {**jobs[index].row, "error": jobs[index].error}
    asked = [(index, number) for index in todo for number in range(len(jobs[index].params))]
    made: dict[int, dict[int, TextCompletion]] = {index: {} for index, _ in asked}

    def ask(one: tuple[int, int]) -> TextCompletion:
        job = jobs[one[0]]
        return chat.reply(job.asked, job.params[one[1]])

    with closing(as_they_come(ask, asked, chat.parallel)) as answers:
        for place, answer in answers:
            index, number = asked[place]
            if isinstance(answer, EndpointError) or not isinstance(answer, UserError | TextCompletion):
                raise answer
            if index not in made:  # another of its completions was refused
                continue
            if isinstance(answer, UserError):
                del made[index]
                yield index, {**jobs[index].row, "error": str(answer)}
                continue
            made[index][number] = answer
            if len(made[index]) == len(jobs[index].params):
                found = made.pop(index)
                completions = [_as_json(found[number]) for number in range(len(found))]
                yield index, {**jobs[index].row, "completions": completions}


def _as_json(made: TextCompletion) -> dict[str, Any]:
    tokens = num_tokens(made)
    counted = {} if tokens is None else {"tokens": tokens}
    return {"text": made.text, "finish_reason": made.finish_reason, **counted}
