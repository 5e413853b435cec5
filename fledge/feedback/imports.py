"""Labels of others: read from the forms they are published in, as rows of our own forms, or into a store.

Whatever the format, a row comes out as one of `exports.py`: `ranked` (a pair is a ranking of two), `unpaired`
or `prompt-completion`. Nothing is invented: who labelled and in which order is given where the file says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy import Connection

from fledge.data.preferences import Ranking, parse_preference
from fledge.data.readers import file_rows
from fledge.data.streams import BadLines
from fledge.errors import UserError
from fledge.feedback.database import tasks
from fledge.feedback.exports import Row
from fledge.feedback.forms import Kind, check_prompt, check_text, competition_ranks
from fledge.feedback.records import Output, Project
from fledge.feedback.state import project_of
from fledge.feedback.store import Store
from fledge.files import read_json

FORMATS = ("trl", "hh-rlhf", "summarize-from-feedback", "ultrafeedback", "label-studio")


def read_labels(path: Path, format: str, buckets: Sequence[str] = ()) -> Iterator[Row]:
    """The labels in a file, as rows of our forms. Raises UserError with file and line for a broken one.

    Formats:

    - trl: what `exports.py` writes and TRL reads: `messages`; `prompt` and `completion`, perhaps with
      `label`; `chosen` and `rejected`; `completions` and `ranks`.
    - hh-rlhf: `chosen` and `rejected` as transcripts (Bai et al. 2022).
    - summarize-from-feedback: comparisons of two summaries (Stiennon et al. 2020).
    - ultrafeedback: completions that a model scored (Cui et al. 2023); rows are marked simulated.
    - label-studio: the JSON export of a Ranker. Where it sorts into buckets, `buckets` names them from
      best to worst; outputs of one bucket are ties.
    """
    if format == "label-studio":
        yield from _label_studio(path, buckets)
        return
    readers: dict[str, Callable[[Row, str], Iterator[Row]]] = {
        "trl": _trl,
        "hh-rlhf": _hh_rlhf,
        "summarize-from-feedback": _summaries,
        "ultrafeedback": _ultrafeedback,
    }
    if format not in readers:
        raise UserError(f"import: unknown format {format!r}; choose from {', '.join(FORMATS)}")
    for where, row in _rows(path):
        yield from readers[format](row, where)


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    if path.suffix != ".json":
        yield from file_rows(path, BadLines(advice=""))
        return
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: not a list of JSON objects")
    yield from ((f"{path}: entry {number}", row) for number, row in enumerate(rows, start=1))


def _get(row: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    if not isinstance(row.get(name), kind):
        raise UserError(f"{where}: no {name!r} of type {kind.__name__}")
    return row[name]


# --- formats --------------------------------------------------------------------------------------


def _trl(row: Row, where: str) -> Iterator[Row]:
    if "messages" in row or ("completion" in row and row.get("label") is None):
        if "messages" in row:
            turns = _get(row, "messages", list, where)
            prompt, completion = turns[:-1], turns[-1:]
        else:
            prompt, completion = row.get("prompt"), row["completion"]
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        made = {"prompt": check_prompt(prompt, where), "completion": completion}
        _text(made["completion"], where)
        yield made | {name: row[name] for name in ("labeler", "simulated") if name in row}
        return
    parsed = parse_preference(row, where)
    made = {name: value for name, value in vars(parsed).items() if value is not None and name != "where"}
    if isinstance(parsed, Ranking) and isinstance(row.get("models"), list):
        made["models"] = row["models"]
    yield made


def _hh_rlhf(row: Row, where: str) -> Iterator[Row]:
    pair = {name: _get(row, name, str, where) for name in ("chosen", "rejected")}
    for name, text in pair.items():
        if not text.startswith("\n\nHuman:"):
            raise UserError(f"{where}: {name} does not begin with an empty line and 'Human:'")
    yield from _trl(pair, where)


def _summaries(row: Row, where: str) -> Iterator[Row]:
    if "summaries" not in row and "summary" in row:
        raise UserError(f"{where}: ratings of single summaries; only comparisons can be read")
    info, summaries = _get(row, "info", dict, where), _get(row, "summaries", list, where)
    choice = row.get("choice")
    if len(summaries) != 2 or choice not in (0, 1):
        raise UserError(f"{where}: a comparison has two summaries, and a choice of 0 or 1")
    texts = [_get(summary, "text", str, where).strip() for summary in summaries]
    if isinstance(info.get("article"), str):
        prompt = f"{info['article']}\n\nTL;DR:"
    else:
        head = [f"{name.upper()}: {info[name]}" for name in ("subreddit", "title") if info.get(name)]
        prompt = "\n".join([*head, f"POST: {_get(info, 'post', str, where)}", "TL;DR:"])
    models = [str(summary.get("policy", "unknown")) for summary in summaries]
    yield _ranked(
        prompt, texts, [1 + (place != choice) for place in (0, 1)], models, row.get("worker"), where
    )


def _ultrafeedback(row: Row, where: str) -> Iterator[Row]:
    completions = _get(row, "completions", list, where)
    texts = [_get(made, "response", str, where) for made in completions]
    scores = [made.get("fine-grained_score", made.get("overall_score")) for made in completions]
    if not all(isinstance(score, int | float) and not isinstance(score, bool) for score in scores):
        raise UserError(f"{where}: every completion needs a number 'fine-grained_score' or 'overall_score'")
    if len(texts) < 2:
        return  # nothing to compare
    ranks = competition_ranks([-score for score in scores])
    models = [str(made.get("model", "unknown")) for made in completions]
    instruction = _get(row, "instruction", str, where)
    yield _ranked(instruction, texts, ranks, models, "ultrafeedback", where) | {"simulated": True}


def _label_studio(path: Path, buckets: Sequence[str]) -> Iterator[Row]:
    for where, task in _rows(path):
        data = _get(task, "data", dict, where)
        lists = [value for value in data.values() if _is_item_list(value)]
        if len(lists) != 1:
            raise UserError(f"{where}: data must hold one list of objects with an id, what was ranked")
        texts = {str(one["id"]): _item_text(one, where) for one in lists[0]}
        prompt = data.get("prompt", data.get("text"))
        if not isinstance(prompt, str | list):
            raise UserError(f"{where}: data has no 'prompt'")
        for annotation in _get(task, "annotations", list, where):
            if annotation.get("was_cancelled"):
                continue
            by = annotation.get("completed_by")
            labeler = by.get("id") if isinstance(by, dict) else by
            for result in annotation.get("result") or []:
                if result.get("type") == "ranker":
                    ranks = _ranker_ranks(result.get("value", {}).get("ranker"), list(texts), buckets, where)
                    row = _ranked(prompt, list(texts.values()), ranks, list(texts), labeler, where)
                    yield row | {"seconds": float(annotation.get("lead_time") or 0)}


def _is_item_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) and "id" in v for v in value)


def _item_text(item: Row, where: str) -> str:
    text = next((item[name] for name in ("body", "html", "text", "title") if item.get(name)), None)
    if not isinstance(text, str):
        raise UserError(f"{where}: item {item['id']!r} has no text in 'body', 'html', 'text' or 'title'")
    return text


def _ranker_ranks(value: Any, ids: list[str], buckets: Sequence[str], where: str) -> list[int]:
    """Ranks in the order of `ids`. One list is an order; several are buckets of ties."""
    lists = {"": value} if isinstance(value, list) else value
    if not isinstance(lists, dict) or not all(isinstance(part, list) for part in lists.values()):
        raise UserError(f"{where}: the ranker's value is neither a list of ids nor lists by bucket")
    if len(lists) == 1:
        (order,) = lists.values()
        levels = [[str(one)] for one in order]
    else:
        if missing := sorted(set(lists) - set(buckets)):
            raise UserError(
                f"{where}: sorted into buckets; name all from best to worst (missing: {missing[0]!r})"
            )
        levels = [[str(one) for one in lists.get(name, [])] for name in buckets]
    level_of = {one: number for number, level in enumerate(levels) for one in level}
    if set(level_of) != set(ids):
        raise UserError(f"{where}: the ranker ranks {len(level_of)} ids, the list has {len(ids)}")
    return competition_ranks([level_of[one] for one in ids])


def _ranked(
    prompt: Any, texts: Sequence[str], ranks: Sequence[int], models: Sequence[str], labeler: Any, where: str
) -> Row:
    row: Row = {
        "prompt": check_prompt(prompt, where),
        "completions": [[{"role": "assistant", "content": text}] for text in texts],
        "ranks": list(ranks),
        "models": list(models),
        "simulated": False,
    }
    return row if labeler is None else {**row, "labeler": str(labeler)}


# --- into a store ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Imported:
    """What an import did."""

    answers: int
    left_out: list[str]
    """Why, one line each: only with `skip_unfit`."""


def import_labels(
    store: Store, project_id: int, rows: Iterator[Row], source: str, *, skip_unfit: bool = False
) -> Imported:
    """Add rows to a project as items with answers, all or none.

    Rankings go into projects with the kind ranking, prompt-completion rows into those with demonstration.
    Several labelers of the same outputs share an item, so their agreement can be measured. Each labeler of
    the file becomes an imported (or simulated) one of the store. `source` names the file. A row that fits no
    item (more than 9 completions, completions of several messages, only good or bad) is an error, or with
    `skip_unfit` left out.
    """
    left_out = []
    with store.writing() as connection:
        project = project_of(connection, project_id)
        filing = _Filing(store, connection, project, source)
        number = 0
        for number, row in enumerate(rows, start=1):
            try:
                filing.add(row, f"{source}: label {number}")
            except UserError as error:
                if not skip_unfit:
                    raise
                left_out.append(str(error))
    return Imported(number - len(left_out), left_out)


def kind_of(row: Row) -> Kind:
    """The task that a row answers."""
    return "ranking" if "ranks" in row else "demonstration"


class _Filing:
    """One import: which items and labelers it has made so far."""

    def __init__(self, store: Store, connection: Connection, project: Project, source: str) -> None:
        self.store, self.connection, self.project, self.source = store, connection, project, source
        self.items: dict[str, list[tuple[int, list[str]]]] = {}
        self.labelers: dict[tuple[str, bool], int] = {}
        self.given: set[tuple[int, int]] = set()

    def add(self, row: Row, where: str) -> None:
        """An item where there is none yet, a labeler likewise, and the answer."""
        kind = kind_of(row)
        if "label" in row:
            raise UserError(f"{where}: good or bad is no task of a project; convert such a file instead")
        if kind not in self.project.settings.kinds:
            raise UserError(f"{where}: project {self.project.settings.name} has no task kind {kind}")
        check_prompt(row["prompt"], where)
        if kind == "demonstration":
            text = check_text(_text(row["completion"], where), where)
            labeler = self._labeler(row)
            item, _ = self._item(row, [], [], labeler, where)
            self._answer(item, kind, labeler, {"text": text}, [], row)
            return
        texts = [_text(turns, where) for turns in row["completions"]]
        if not 2 <= len(texts) <= 9:
            raise UserError(f"{where}: {len(texts)} completions; a project takes 2 to 9")
        labeler = self._labeler(row)
        models = [str(model) for model in row.get("models", ["unknown"] * len(texts))]
        item, filed = self._item(row, texts, models, labeler, where)
        # the item may hold the same outputs in another order
        places, left = [], list(range(len(filed)))
        for text in texts:
            places.append(next(place for place in left if filed[place] == text))
            left.remove(places[-1])
        ranks = [0] * len(texts)
        for place, rank in zip(places, competition_ranks(row["ranks"]), strict=True):
            ranks[place] = rank
        order = [places[place] for place in row.get("order", [])]
        self._answer(item, kind, labeler, {"ranks": ranks}, order, row)

    def _labeler(self, row: Row) -> int:
        name, simulated = str(row.get("labeler", self.source)), bool(row.get("simulated"))
        if (name, simulated) not in self.labelers:
            body = {"name": name, "role": "labeler", "simulated": simulated, "imported": not simulated}
            made = self.store.append(self.connection, "labeler_added", {**body, "token_hash": None})
            self.labelers[name, simulated] = made
        return self.labelers[name, simulated]

    def _item(
        self, row: Row, texts: list[str], models: list[str], labeler: int, where: str
    ) -> tuple[int, list[str]]:
        prompt = check_prompt(row["prompt"], where)
        key = json.dumps([prompt, sorted(texts)])
        for item, filed in self.items.setdefault(key, []):
            if (item, labeler) not in self.given:
                return item, filed
        body = {"project_id": self.project.id, "prompt": prompt, "gold": None, "source": self.source}
        item = self.store.append(self.connection, "item_added", body)
        if texts:
            outputs = [vars(Output(text, model)) for text, model in zip(texts, models, strict=True)]
            self.store.append(self.connection, "outputs_added", {"item_id": item, "outputs": outputs})
        self.items[key].append((item, texts))
        return item, texts

    def _answer(self, item: int, kind: str, labeler: int, answer: Row, order: list[int], row: Row) -> None:
        self.given.add((item, labeler))
        query = sql.select(tasks.c.id).where(tasks.c.item_id == item, tasks.c.kind == kind)
        body = {"task_id": self.connection.scalar(query), "answer": answer, "order": order}
        body["seconds"] = round(float(row.get("seconds", 0)), 3)
        self.store.append(self.connection, "answered", body, labeler)


def _text(turns: Any, where: str) -> str:
    if (
        not isinstance(turns, list)
        or len(turns) != 1
        or not isinstance(turns[0], dict)
        or turns[0].get("role") != "assistant"
        or not isinstance(turns[0].get("content"), str)
    ):
        raise UserError(f"{where}: a completion must be one text, or one message of the assistant")
    return str(turns[0]["content"])
