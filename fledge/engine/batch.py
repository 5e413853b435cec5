"""A JSONL file of prompts in, one of completions out. Killed at any moment, the same call goes on.

Rows are written to a journal as they end (`OUT.partial`: a line that says which job it is, then a line for
each row); when all are there, the file itself appears, in the input's order.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fledge.engine.choices import choice_logps
from fledge.engine.constraints import choices_of
from fledge.engine.engine import Engine
from fledge.engine.generation import Generation, Request
from fledge.engine.scheduler import slots_needed
from fledge.engine.settings import row_params
from fledge.engine.stops import TextStream
from fledge.engine.text import LocalChat, TextCompletion, encode_prompt, joined, text_stream
from fledge.errors import UserError
from fledge.files import open_binary, parse_json_object
from fledge.tokenizer.bpe import Tokenizer, check_text
from fledge.types import Grammar, Message, SamplingParams, Token

# (rows done, rows in all, tokens made by this call)
Progress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class Job:
    """A row: what it asks for, or what is wrong with it."""

    where: str
    row: dict[str, Any]
    prompt: list[int]
    params: SamplingParams
    number: int
    error: str | None = None


def read_jobs(
    path: Path, engine: Engine, tokenizer: Tokenizer, defaults: SamplingParams, as_chat: bool, strict: bool
) -> list[Job]:
    """A job for every line that is not blank. A row without a `seed` of its own draws from the random numbers
    of the default seed and its number. Raises UserError, with `strict` also for the first bad row."""
    jobs: list[Job] = []
    with open_binary(path) as file:
        for line_number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where, row = f"{path}:{line_number}", dict[str, Any]()
            try:
                row = parse_json_object(line, where)
                params = row_params(row, defaults, tokenizer)
                prompt, params = _prompt(row, params, engine, tokenizer, as_chat)
                number = 0 if "seed" in row else len(jobs)
                jobs.append(Job(where, row, prompt, params, number))
            except UserError as error:
                message = str(error).removeprefix(f"{where}: ")
                if strict:
                    raise UserError(f"{where}: {message}") from None
                jobs.append(Job(where, row, [], defaults, 0, message))
    if not jobs:
        raise UserError(f"{path}: no rows in it")
    return jobs


def _prompt(
    row: Mapping[str, Any], params: SamplingParams, engine: Engine, tokenizer: Tokenizer, as_chat: bool
) -> tuple[list[int], SamplingParams]:
    messages, text = row.get("messages"), row.get("prompt")
    if (messages is None) == (text is None):
        raise UserError('a row has either "prompt" or "messages"')
    if text is not None:
        if not isinstance(text, str):
            raise UserError(f'"prompt" must be a text, not {text!r}')
        check_text(text, "prompt")
        if not as_chat:
            return encode_prompt(tokenizer, text), params
        messages = [Message(role="user", content=text)]
    if not isinstance(messages, list) or not messages:
        raise UserError('"messages" must be a list with at least one message')
    tools = row.get("tools")
    if not isinstance(tools, list | None):
        raise UserError('"tools" must be a list')
    chat = LocalChat(engine, tokenizer)
    return chat.prompt(messages, tools), chat.until_end_of_turn(params)


def run_batch(
    engine: Engine,
    tokenizer: Tokenizer,
    jobs: Sequence[Job],
    out: Path,
    job_id: str,
    strict: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda done, total, tokens: None,
    probabilities: bool = False,
) -> dict[str, int]:
    """Write `out`: each row as it was, with "completions" or "error", and with `probabilities` those of its
    choices. Rows that an earlier, killed call with
    the same `job_id` has finished are kept. Returns counts: rows, kept, errors, tokens.

    Raises UserError if `out` exists (without `overwrite`), if its journal is of another job or in use, and
    with `strict` for the first row that fails.
    """
    partial = out.with_name(out.name + ".partial")
    if out.exists() and not overwrite and not partial.exists():
        raise UserError(f"{out}: exists already; choose another --out or pass --overwrite")
    counts = {"rows": len(jobs), "kept": 0, "errors": 0, "tokens": 0}
    with _journal(partial, job_id, overwrite) as (file, finished):
        counts["kept"] = len(finished)
        for index, result in _results(engine, tokenizer, jobs, finished, probabilities):
            if strict and "error" in result:
                raise UserError(f"{jobs[index].where}: {result['error']}")
            file.write(_line({"row": index, "result": result}))
            file.flush()
            finished[index] = result
            counts["tokens"] += sum(made["tokens"] for made in result.get("completions", []))
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


@contextmanager
def _journal(path: Path, job_id: str, overwrite: bool) -> Iterator[tuple[BinaryIO, dict[int, Any]]]:
    """The journal, open for more rows, and the rows that it has; a half line at its end is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{path}: another command is writing it; wait for its end") from None
        file.seek(0)
        finished, whole = dict[int, Any](), 0
        header = file.readline()
        if header.endswith(b"\n"):
            if header == _line({"job": job_id}):
                whole = len(header)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    entry = parse_json_object(line, str(path))
                    finished[entry["row"]] = entry["result"]
                    whole += len(line)
            elif not overwrite:
                raise UserError(
                    f"{path}: is of a job with another input, model or settings; "
                    "delete it, choose another --out or pass --overwrite"
                )
        file.truncate(whole)
        if not whole:
            file.write(_line({"job": job_id}))
            file.flush()
        yield file, finished


def _results(
    engine: Engine,
    tokenizer: Tokenizer,
    jobs: Sequence[Job],
    finished: Mapping[int, Any],
    probabilities: bool,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row, result) of every unfinished job as it ends."""
    todo = [index for index in range(len(jobs)) if index not in finished]
    for index in todo:
        if jobs[index].error is not None:
            yield index, {**jobs[index].row, "error": jobs[index].error}
    todo = [index for index in todo if jobs[index].error is None]
    if not todo:
        return
    needs = [slots_needed(len(jobs[i].prompt), jobs[i].params.max_tokens, engine.context) for i in todo]
    samples = sum(max(1, jobs[i].params.n) for i in todo)
    slots = min(max(1, *needs), engine.most_slots())
    scheduler = engine.new_scheduler(min(samples, engine.batch_size), slots)
    running: dict[int, tuple[list[Generation], list[TextStream]]] = {}
    shares: dict[int, dict[str, Any]] = {}
    todo.reverse()
    while todo or running:
        while todo and len(running) < 2 * engine.batch_size:
            index = todo.pop()
            job = jobs[index]
            texts = [text_stream(engine, tokenizer, job.params) for _ in range(job.params.n)]
            request = Request(job.prompt, job.params, job.number, _stopped(texts))
            try:
                running[index] = scheduler.submit(request), texts
            except UserError as error:
                yield index, {**job.row, "error": str(error)}
        if probabilities:
            new = {index: jobs[index] for index in running if index not in shares}
            shares.update(_shares(engine, tokenizer, new))
        scheduler.step()
        for index, (made, texts) in list(running.items()):
            if all(generation.done for generation in made):
                del running[index]
                result = _result(jobs[index], made, texts, tokenizer)
                added = shares.pop(index, {})
                if "error" in added:
                    result = {**jobs[index].row, **added}
                yield index, result if "error" in result else {**result, **added}


def _shares(engine: Engine, tokenizer: Tokenizer, jobs: Mapping[int, Job]) -> dict[int, dict[str, Any]]:
    """What is added to each row: the probabilities of its choices, where it has such."""
    alike: dict[tuple[Grammar | None, tuple[int, ...]], list[int]] = {}
    for index, job in jobs.items():
        alike.setdefault((job.params.constraint, job.params.stop_ids), []).append(index)
    added: dict[int, dict[str, Any]] = {index: {} for index in jobs}
    for (grammar, stop_ids), indexes in alike.items():
        choices = choices_of(grammar)
        if choices is None:
            continue
        prompts = [jobs[index].prompt for index in indexes]
        try:
            scores = choice_logps(engine, tokenizer, prompts, choices, stop_ids)
        except UserError as error:  # of one prompt, so each on its own
            if len(jobs) == 1:
                return {indexes[0]: {"error": str(error)}}
            for index in indexes:
                added |= _shares(engine, tokenizer, {index: jobs[index]})
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
    job: Job, made: list[Generation], texts: list[TextStream], tokenizer: Tokenizer
) -> dict[str, Any]:
    try:
        completions = [joined(text, g.completion()) for text, g in zip(texts, made, strict=True)]
    except UserError as error:
        return {**job.row, "error": str(error)}
    result = {**job.row, "completions": [_as_json(made, tokenizer, job.params) for made in completions]}
    if job.params.echo:
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


def _line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"
