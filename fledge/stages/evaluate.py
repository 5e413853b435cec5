"""`fledge evaluate`: bits per byte on texts, answers to questions, and what several samples are worth."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fledge.config import check_at_least, to_toml
from fledge.data.conversations import read_texts
from fledge.data.mixture import load_sources
from fledge.data.prompts import Prompt
from fledge.data.sources import split_documents
from fledge.device import ComputeName, DeviceName, keep_freed_memory, pick_compute_dtype, pick_device
from fledge.engine.engine import Engine
from fledge.engine.text import LocalChat, TextCompletion, complete_ids, load_engine
from fledge.errors import UserError
from fledge.evals.bits import bits_per_byte
from fledge.evals.facts import Share, is_refusal, token_f1
from fledge.evals.task_samples import CheckedTask, name_of, read_task, sample_task
from fledge.files import new_directory, read_jsonl, read_text, write_json, write_text
from fledge.model.ngram import is_ngram
from fledge.report.evaluate import write_evaluation_report
from fledge.report.samples import WAYS
from fledge.rewards.reward_model import Judge, load_judge
from fledge.tokenizer.bpe import Tokenizer
from fledge.types import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure a model: bits per byte on texts, questions it answers right, tasks with several samples."""

    model: Path
    """Model directory."""
    out: Path = Path("runs/evaluate")
    """New directory for the figures, the answers and report.html."""
    data: tuple[str, ...] = ()
    """Texts to score in bits per byte: a mixture file (.toml), or NAME=PATH."""
    held_out: float | None = None
    """Score only the documents that `fledge pretrain --validation-share` of this size held out."""
    baseline: Path | None = None
    """Model directory to score the same texts, such as an n-gram model: what counting alone gets."""
    questions: tuple[Path, ...] = ()
    """JSONL files of {"question": ..., "answer": ...}; answer null: the right answer is a refusal."""
    ask: Literal["chat", "plain"] = "chat"
    """chat: as a user's turn. plain: "Question: ... Answer:", for models that are no assistants."""
    few_shot: Path | None = None
    """Text file put before each plain question, such as a few answered ones."""
    max_tokens: int = 48
    """Most tokens of an answer to a question; decoding is greedy."""
    tasks: tuple[Path, ...] = ()
    """Directories of `fledge task`, or JSONL files of prompts: problems whose answers a program checks."""
    reward: tuple[str, ...] = ()
    """By what an answer to a problem is right, as in exact or countdown; by default the task's own."""
    right_from: float | None = None
    """Reward from which an answer is right; by default the most that verifiers give."""
    samples: int = 8
    """Answers to each problem, of which one is chosen by vote, by verifier, or by --reward-model."""
    reward_model: Path | None = None
    """Reward model that chooses among the answers, too."""
    temperature: float = 1.0
    """Randomness of these answers."""
    completion_tokens: int = 256
    """Most tokens of an answer to a problem; one that is cut off is wrong."""
    seed: int = 0
    """Seed of these answers."""
    window_tokens: int = 256
    """Context in which texts are scored."""
    limit: int | None = None
    """Ask only the first questions or problems of each file."""
    batch_size: int = 128
    """Answers made at once."""
    device: DeviceName = "auto"
    """Where to run."""
    compute: ComputeName = "auto"
    """Type of matrix products; auto is bf16 where it is fast."""
    overwrite: bool = False
    """Replace what --out holds."""


def main(config: Config) -> None:
    """Measure, print tables, and write `summary.json`, `answers.jsonl`, `samples.jsonl`, `report.html`."""
    if not config.data and not config.questions and not config.tasks:
        raise UserError("nothing to measure: give --data texts, --questions files or --tasks")
    _check(config)
    questions = {path: _read_questions(path)[: config.limit] for path in config.questions}
    tasks = [read_task(path, config.reward, config.right_from, config.limit) for path in config.tasks]
    shown = read_text(config.few_shot) + "\n" if config.few_shot else ""
    started = time.perf_counter()
    keep_freed_memory()
    device = pick_device(config.device)
    engine, tokenizer = _load(config, config.model)
    judge = load_judge(config.reward_model, device) if config.reward_model else None
    answers = [
        row
        for path in config.questions
        for row in _answers(config, path.stem, questions[path], shown, engine, tokenizer)
    ]
    sampled = {task.name: _sampled(config, task, engine, tokenizer, judge) for task in tasks}
    summary = {
        "stage": "evaluate",
        "model": str(config.model),
        "bits_per_byte": _bits(config, engine, tokenizer),
        "baseline": _baseline(config),
        "questions": {
            path.stem: _scores([a for a in answers if a["set"] == path.stem]) for path in config.questions
        },
        "tasks": {name: figures for name, (figures, _) in sampled.items()},
        "seconds": round(time.perf_counter() - started, 1),
    }
    with new_directory(config.out, overwrite=config.overwrite) as directory:
        write_text(directory / "config.toml", to_toml(config))
        write_text(directory / "answers.jsonl", _lines(answers))
        if sampled:
            rows = [row for _, found in sampled.values() for row in found]
            write_text(directory / "samples.jsonl", _lines(rows))
        write_json(directory / "summary.json", summary)
        write_evaluation_report(directory)
    _print(Console(), summary)


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _load(config: Config, model: Path) -> tuple[Engine, Tokenizer]:
    device = pick_device(config.device)
    engine, tokenizer = load_engine(model, device=device, batch_size=config.batch_size)
    if not is_ngram(model):
        engine.compute_dtype = pick_compute_dtype(device, config.compute)
    return engine, tokenizer


def _baseline(config: Config) -> dict[str, Any] | None:
    """The same texts by another model; bits per byte compare whatever the tokenizers."""
    if config.baseline is None:
        return None
    return {"model": str(config.baseline), "bits_per_byte": _bits(config, *_load(config, config.baseline))}


def _check(config: Config) -> None:
    check_at_least(config, 1, "max_tokens", "window_tokens", "limit", "batch_size")
    check_at_least(config, 1, "samples", "completion_tokens")
    check_at_least(config, 0, "seed")
    if not 0 < config.temperature < math.inf:
        raise UserError(f"--temperature {config.temperature}: must be above 0, or all samples are the same")
    if config.baseline and not config.data:
        raise UserError("--baseline scores the texts of --data; name some")
    if config.ask == "plain" and config.reward_model:
        raise UserError("--reward-model judges the turns of chats: leave --ask plain out")
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
    for flag, paths in (("questions", config.questions), ("tasks", config.tasks)):
        names = [name_of(path) for path in paths]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"--{flag}: two files are called {twice!r}; results go by the name, rename one")


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


def _sampled(
    config: Config, task: CheckedTask, engine: Engine, tokenizer: Tokenizer, judge: Judge | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What several answers to a task's problems are worth, as `sample_task` has it."""

    def ask(problems: Sequence[Prompt], params: SamplingParams) -> Sequence[TextCompletion]:
        if config.ask == "chat":
            return LocalChat(engine, tokenizer).replies([one.messages for one in problems], params)
        texts = [str(one.messages[-1].get("content") or "") for one in problems]
        starts = [[tokenizer.start_id, *tokenizer.encode(text)] for text in texts]
        return complete_ids(engine, tokenizer, starts, params)

    params = SamplingParams(
        config.temperature, max_tokens=config.completion_tokens, seed=config.seed, n=config.samples
    )
    return sample_task(task, ask, params, judge)


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
    title = escape(summary["model"])
    if bits := summary["bits_per_byte"]:
        baseline = summary["baseline"]
        table = Table("text", "bits per byte", *(["baseline"] if baseline else []), title=title)
        for name, figure in bits.items():
            beside = [f"{baseline['bits_per_byte'][name]:.3f}"] if baseline else []
            table.add_row(escape(name), f"{figure:.3f}", *beside)
        console.print(table)
    if summary["questions"]:
        columns = ("questions", "asked", "right (95% interval)", "refused (95% interval)")
        table = Table(*columns, title=title)
        for name, scores in summary["questions"].items():
            cells = [percent(scores["right"]) if scores["right"] else "-", percent(scores["refused"])]
            table.add_row(escape(name), str(scores["refused"]["n"]), *cells)
        console.print(table)
    for name, figures in summary["tasks"].items():
        curves = figures["curves"]
        heads = [WAYS[way] for way in curves]
        table = Table("samples", "tokens", *heads, title=f"{escape(name)}: share of problems right")
        table.add_row("greedy", f"{figures['greedy']['tokens']:.0f}", percent(figures["greedy"]))
        for row in zip(*curves.values(), strict=True):
            shares = [percent({**point, "rate": point["mean"]}) for point in row]
            table.add_row(str(row[0]["k"]), f"{row[0]['tokens']:.0f}", *shares)
        console.print(table)


def percent(share: dict[str, Any]) -> str:
    """`63.2% (58.9%-67.3%)`."""
    return f"{share['rate']:.1%} ({share['low']:.1%}-{share['high']:.1%})"
