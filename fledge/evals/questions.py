"""Questions with known answers, and how many a model answers right or refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fledge.engine.engine import Engine
from fledge.engine.remote import Asked
from fledge.engine.text import LocalChat, TextCompletion, complete_ids
from fledge.errors import UserError
from fledge.evals.facts import Share, is_refusal, token_f1
from fledge.files import read_jsonl
from fledge.tokenizer.bpe import Tokenizer
from fledge.types import SamplingParams

# `params.n` completions for each text that is to be continued, or conversation that is to be answered.
Ask = Callable[[Sequence[Asked], SamplingParams], Sequence[TextCompletion]]


def ask_local(
    engine: Engine, tokenizer: Tokenizer, asked: Sequence[Asked], params: SamplingParams
) -> list[TextCompletion]:
    """`Ask` with a model at hand; texts, or conversations. A text begins as a document does."""
    texts = [one for one in asked if isinstance(one, str)]
    if texts:
        starts = [[tokenizer.start_id, *tokenizer.encode(text)] for text in texts]
        return complete_ids(engine, tokenizer, starts, params)
    chats = [one for one in asked if not isinstance(one, str)]
    return LocalChat(engine, tokenizer).replies(chats, params)


def read_questions(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of questions. Raises UserError with file and line."""
    lines = []
    for number, row in read_jsonl(path):
        if not isinstance(row.get("question"), str):
            raise UserError(f'{path}:{number}: the line has no field "question" with a text')
        if "answer" not in row or not isinstance(row["answer"], str | None):
            raise UserError(
                f'{path}:{number}: the field "answer" must be a text, or null where to refuse is right'
            )
        lines.append(row)
    if not lines:
        raise UserError(f"{path}: no questions in it")
    return lines


def ask_questions(
    name: str, lines: Sequence[dict[str, Any]], ask: Ask, before: str | None, max_tokens: int
) -> list[dict[str, Any]]:
    """Ask all questions of a file greedily, as users' turns; where there is a text that stands `before` each,
    plainly, for an answer of one line. A row with the answer and its scores for each."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, stop=() if before is None else ("\n",))
    asked: list[Asked] = [
        [{"role": "user", "content": line["question"]}]
        if before is None
        else f"{before}Question: {line['question']}\nAnswer:"
        for line in lines
    ]
    return [
        {
            "set": name,
            "question": line["question"],
            "gold": line["answer"],
            "answer": reply.text.strip(),
            "f1": None if line["answer"] is None else round(token_f1(reply.text, line["answer"]), 4),
            "refused": is_refusal(reply.text),
            "finish_reason": reply.finish_reason,
        }
        for line, reply in zip(lines, ask(asked, params), strict=True)
    ]


def scores(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Right: token F1 of at least 0.8. Both shares come with 95% Wilson intervals."""
    known = [answer for answer in answers if answer["gold"] is not None]
    return {
        "right": Share(sum(answer["f1"] >= 0.8 for answer in known), len(known)).as_dict() if known else None,
        "mean_f1": sum(answer["f1"] for answer in known) / len(known) if known else None,
        "refused": Share(sum(answer["refused"] for answer in answers), len(answers)).as_dict(),
    }
