"""`fledge evaluate`: bits per byte on texts, answers to questions, and what several samples are worth."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
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
from fledge.engine.remote import check_remote, connect
from fledge.engine.text import TextCompletion, load_engine
from fledge.errors import UserError
from fledge.evals.bits import bits_per_byte
from fledge.evals.questions import Ask, ask_local, ask_questions, read_questions, scores
from fledge.evals.task_samples import CheckedTask, name_of, read_task, sample_task
from fledge.files import new_directory, read_text, write_json, write_text
from fledge.model.ngram import is_ngram
from fledge.report.evaluate import write_evaluation_report
from fledge.report.samples import WAYS
from fledge.rewards.reward_model import Judge, load_judge
from fledge.tokenizer.bpe import Tokenizer
from fledge.types import SamplingParams

# What reads probabilities, or computes here.
LOCAL_ONLY = {"data", "held_out", "baseline", "window_tokens", "compute"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure a model: bits per byte on texts, questions it answers right, tasks with several samples."""

    model: str
    """Model directory; with --endpoint, a name there."""
    endpoint: str | None = None
    """Address of an OpenAI-compatible server, as http://localhost:8000/v1, that answers instead."""
    endpoint_key: str | None = None
    """Name of the environment variable that holds the endpoint's key."""
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
    """Answers made at once; of an endpoint at most 16."""
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
    questions = {path: read_questions(path)[: config.limit] for path in config.questions}
    tasks = [read_task(path, config.reward, config.right_from, config.limit) for path in config.tasks]
    shown = read_text(config.few_shot) + "\n" if config.few_shot else ""
    started = time.perf_counter()
    keep_freed_memory()
    judge = load_judge(config.reward_model, pick_device(config.device)) if config.reward_model else None
    with _model(config) as (ask, bits):
        answers = [
            row
            for path in config.questions
            for row in ask_questions(
                path.stem, questions[path], ask, shown if config.ask == "plain" else None, config.max_tokens
            )
        ]
        sampled = {task.name: _sampled(config, task, ask, judge) for task in tasks}
    local = config.endpoint is None
    summary = {
        "stage": "evaluate",
        "model": str(Path(config.model)) if local else f"{config.model} at {config.endpoint}",
        "bits_per_byte": bits,
        "baseline": _baseline(config),
        "questions": {
            path.stem: scores([a for a in answers if a["set"] == path.stem]) for path in config.questions
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


@contextmanager
def _model(config: Config) -> Iterator[tuple[Ask, dict[str, float]]]:
    """How the model is asked, and its bits per byte."""
    if config.endpoint is None:
        engine, tokenizer = _load(config, Path(config.model))
        yield partial(ask_local, engine, tokenizer), _bits(config, engine, tokenizer)
        return
    model = connect(config.endpoint, config.model, config.endpoint_key, os.environ, config.batch_size)
    with closing(model):
        yield model.replies, {}


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
    check_remote(config, LOCAL_ONLY, known=() if config.reward_model is None else ("device",))
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


def _sampled(
    config: Config, task: CheckedTask, ask: Ask, judge: Judge | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What several answers to a task's problems are worth, as `sample_task` has it."""

    def ask_problems(problems: Sequence[Prompt], params: SamplingParams) -> Sequence[TextCompletion]:
        if config.ask == "chat":
            return ask([one.messages for one in problems], params)
        return ask([str(one.messages[-1].get("content") or "") for one in problems], params)

    params = SamplingParams(
        config.temperature, max_tokens=config.completion_tokens, seed=config.seed, n=config.samples
    )
    return sample_task(task, ask_problems, params, judge)


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
