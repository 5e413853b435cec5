"""`fledge evaluate`: bits per byte on texts, and answers to questions with known answers."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fledge.config import check_at_least, to_toml
from fledge.data.conversations import read_texts
from fledge.data.mixture import load_sources
from fledge.data.sources import split_documents
from fledge.device import ComputeName, DeviceName, keep_freed_memory, pick_compute_dtype, pick_device
from fledge.engine.engine import Engine
from fledge.engine.text import LocalChat, complete_ids, load_engine
from fledge.errors import UserError
from fledge.evals.bits import bits_per_byte
from fledge.evals.facts import Share, is_refusal, token_f1
from fledge.files import new_directory, read_jsonl, read_text, write_json, write_text
from fledge.tokenizer.bpe import Tokenizer
from fledge.types import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure a model: bits per byte on texts, and how many questions it answers right or refuses."""

    model: Path
    """Model directory."""
    out: Path = Path("runs/evaluate")
    """New directory for summary.json and answers.jsonl."""
    data: tuple[str, ...] = ()
    """Texts to score in bits per byte: a mixture file (.toml), or NAME=PATH."""
    held_out: float | None = None
    """Score only the documents that `fledge pretrain --validation-share` of this size held out."""
    questions: tuple[Path, ...] = ()
    """JSONL files of {"question": ..., "answer": ...}; answer null: the right answer is a refusal."""
    ask: Literal["chat", "plain"] = "chat"
    """chat: as a user's turn. plain: "Question: ... Answer:", for models that are no assistants."""
    few_shot: Path | None = None
    """Text file put before each plain question, such as a few answered ones."""
    max_tokens: int = 48
    """Most tokens of an answer; decoding is greedy."""
    window_tokens: int = 256
    """Context in which texts are scored."""
    limit: int | None = None
    """Ask only the first questions of each file."""
    batch_size: int = 128
    """Questions answered at once."""
    device: DeviceName = "auto"
    """Where to run."""
    compute: ComputeName = "auto"
    """Type of matrix products; auto is bf16 where it is fast."""
    overwrite: bool = False
    """Replace what --out holds."""


def main(config: Config) -> None:
    """Score, print a table, and write `summary.json` and `answers.jsonl`."""
    if not config.data and not config.questions:
        raise UserError("nothing to measure: give --data texts or --questions files")
    _check(config)
    questions = {path: _read_questions(path)[: config.limit] for path in config.questions}
    shown = read_text(config.few_shot) + "\n" if config.few_shot else ""
    started = time.perf_counter()
    keep_freed_memory()
    device = pick_device(config.device)
    engine, tokenizer = load_engine(config.model, device=device, batch_size=config.batch_size)
    engine.compute_dtype = pick_compute_dtype(device, config.compute)
    bits = _bits(config, engine, tokenizer)
    answers = [
        row
        for path in config.questions
        for row in _answers(config, path.stem, questions[path], shown, engine, tokenizer)
    ]
    summary = {
        "stage": "evaluate",
        "model": str(config.model),
        "bits_per_byte": bits,
        "questions": {
            path.stem: _scores([a for a in answers if a["set"] == path.stem]) for path in config.questions
        },
        "seconds": round(time.perf_counter() - started, 1),
    }
    with new_directory(config.out, overwrite=config.overwrite) as directory:
        write_text(directory / "config.toml", to_toml(config))
        rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answers)
        write_text(directory / "answers.jsonl", rows)
        write_json(directory / "summary.json", summary)
    _print(Console(), summary)


def _check(config: Config) -> None:
    check_at_least(config, 1, "max_tokens", "window_tokens", "limit", "batch_size")
    if config.few_shot and config.ask != "plain":
        raise UserError("--few-shot goes with --ask plain: a chat is asked as it is")
    if config.held_out is not None and not 0 < config.held_out < 1:
        raise UserError(f"--held-out {config.held_out}: must be between 0 and 1")
    if config.out.exists():
        if not config.overwrite:
            raise UserError(f"{config.out}: exists already; choose another --out or pass --overwrite")
        if not (config.out / "answers.jsonl").is_file():
            raise UserError(
                f"{config.out}: holds no evaluation, so --overwrite leaves it; choose another --out"
            )
    stems = [path.stem for path in config.questions]
    for path in config.questions:
        if stems.count(path.stem) > 1:
            raise UserError(
                f"--questions: two files are called {path.stem!r}; results go by the name, rename one"
            )


def _bits(config: Config, engine: Engine, tokenizer: Tokenizer) -> dict[str, float]:
    figures: dict[str, float] = {}
    window = min(config.window_tokens, engine.context - 1)
    for source in load_sources(config.data) if config.data else []:
        documents, encode = read_texts(source, tokenizer)
        if config.held_out is not None:
            documents = split_documents(documents, config.held_out)[1]
        if not documents:
            raise UserError(f"{source.path}: no text to score")
        size = sum(len(text.encode()) for text in documents)
        figures[source.name] = bits_per_byte(
            engine, encode(documents), size, tokenizer.start_id, tokenizer.special_ids, window
        )
    return figures


def _answers(
    config: Config, name: str, lines: list[dict[str, Any]], shown: str, engine: Engine, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """Ask all questions of a file; `shown` stands before each plain one."""
    params = SamplingParams(temperature=0.0, max_tokens=config.max_tokens)
    if config.ask == "chat":
        chat = LocalChat(engine, tokenizer)
        made = chat.replies([[{"role": "user", "content": line["question"]}] for line in lines], params)
    else:
        plain = SamplingParams(temperature=0.0, max_tokens=config.max_tokens, stop=("\n",))
        prompts = [
            [tokenizer.start_id, *tokenizer.encode(f"{shown}Question: {line['question']}\nAnswer:")]
            for line in lines
        ]
        made = complete_ids(engine, tokenizer, prompts, plain)
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
        for line, reply in zip(lines, made, strict=True)
    ]


def _read_questions(path: Path) -> list[dict[str, Any]]:
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


def _scores(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Right: token F1 of at least 0.8. Both shares come with 95% Wilson intervals."""
    known = [answer for answer in answers if answer["gold"] is not None]
    return {
        "right": Share(sum(answer["f1"] >= 0.8 for answer in known), len(known)).as_dict() if known else None,
        "mean_f1": sum(answer["f1"] for answer in known) / len(known) if known else None,
        "refused": Share(sum(answer["refused"] for answer in answers), len(answers)).as_dict(),
    }


def _print(console: Console, summary: dict[str, Any]) -> None:
    if summary["bits_per_byte"]:
        table = Table("text", "bits per byte", title=escape(summary["model"]))
        for name, figure in summary["bits_per_byte"].items():
            table.add_row(escape(name), f"{figure:.3f}")
        console.print(table)
    if summary["questions"]:
        columns = ("questions", "asked", "right (95% interval)", "refused (95% interval)")
        table = Table(*columns, title=escape(summary["model"]))
        for name, scores in summary["questions"].items():
            cells = [percent(scores["right"]) if scores["right"] else "-", percent(scores["refused"])]
            table.add_row(escape(name), str(scores["refused"]["n"]), *cells)
        console.print(table)


def percent(share: dict[str, Any]) -> str:
    """`63.2% (58.9%-67.3%)`."""
    return f"{share['rate']:.1%} ({share['low']:.1%}-{share['high']:.1%})"
