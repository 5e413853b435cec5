"""Labels as JSON Lines that training reads: TRL's field names, and rankings with ties.

The same store gives the same bytes, whoever asks and when. Labelers appear by their handle, not their name,
and every row says whether it was simulated.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

from fledge.errors import UserError
from fledge.feedback.agreement import figures
from fledge.feedback.forms import Message, competition_ranks
from fledge.feedback.records import Item, StoredAnswer
from fledge.feedback.state import answers_of
from fledge.feedback.store import Store, get_project, list_items
from fledge.files import new_directory, write_text

FORMS = ("messages", "prompt-completion", "preference", "unpaired", "ranked", "answers")
Row = dict[str, Any]
NEUTRAL = 4
"""An overall rating above it is good, below it bad; itself it says nothing."""


def export_rows(store: Store, project_id: int, form: str) -> list[Row]:
    """All current answers of a project in one of FORMS, by task, then labeler.

    - messages, prompt-completion: demonstrations and corrections, to learn from.
    - preference: every pair of outputs that one labeler put in an order; ties give none.
    - ranked: K outputs with ranks (1 the best, ties alike) and the order shown; ratings and choices too.
    - unpaired: rated outputs, good (5 to 7) or bad (1 to 3); both outputs of "both bad".
    - answers: everything, skips and flags too, as it was given.
    """
    if form not in FORMS:
        raise UserError(f"export: unknown form {form!r}; choose from {', '.join(FORMS)}")
    with store.reading() as connection:
        given = answers_of(connection, project_id)
    items = {item.id: item for item in list_items(store, project_id)}  # all that were answered, and newer
    if form == "answers":
        rows = _answer_rows(store, project_id, items, given)
    else:
        kept = [answer for answer in given if answer.answer is not None]
        made = {
            "messages": _message_rows,
            "prompt-completion": _completion_rows,
            "preference": _preference_rows,
            "unpaired": _unpaired_rows,
            "ranked": _ranked_rows,
        }[form]
        rows = [row for answer in kept for row in made(items[answer.item_id], answer)]
    return [_clean(row) for row in rows]


def _clean(value: Any) -> Any:
    """Without halves of surrogate pairs: a model can make them, no file can hold them."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list | tuple):
        return [_clean(part) for part in value]
    return {_clean(k): _clean(v) for k, v in value.items()} if isinstance(value, dict) else value


def _origin(given: StoredAnswer) -> Row:
    return {"task": given.kind, "labeler": given.labeler.handle, "simulated": given.labeler.simulated}


def _turn(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def _completion_rows(item: Item, given: StoredAnswer) -> Iterator[Row]:
    if given.answer and "text" in given.answer:
        yield {"prompt": item.prompt, "completion": _turn(given.answer["text"]), **_origin(given)}


def _message_rows(item: Item, given: StoredAnswer) -> Iterator[Row]:
    for row in _completion_rows(item, given):
        yield {"messages": row.pop("prompt") + row.pop("completion"), **row}


def _ranked_rows(item: Item, given: StoredAnswer) -> Iterator[Row]:
    answer = given.answer or {}
    outputs = [item.outputs[place] for place in given.outputs]
    row = {
        "prompt": item.prompt,
        "completions": [_turn(output.text) for output in outputs],
        "ranks": [],
        "order": [given.outputs.index(place) for place in given.order],
        "models": [output.model for output in outputs],
        **_origin(given),
    }
    if "ranks" in answer:
        row["ranks"] = answer["ranks"]
    elif "choice" in answer:
        row["ranks"] = {"a": [1, 2], "b": [2, 1]}.get(answer["choice"], [1, 1])
        row["both_bad"] = answer["choice"] == "both_bad"
    elif "ratings" in answer and len(outputs) > 1:
        row["ratings"] = [rating["overall"] for rating in answer["ratings"]]
        row["ranks"] = competition_ranks([-rating for rating in row["ratings"]])
    elif given.kind == "correction":  # what a person wrote is better than what they mended
        row["completions"] = [_turn(answer["text"]), *row["completions"]]
        row["models"] = [given.labeler.handle, *row["models"]]
        row["ranks"] = [1, 2]
    if len(row["order"]) < len(row["completions"]):
        del row["order"]  # nobody was shown these completions in an order that is known
    if row["ranks"]:
        yield row


def _preference_rows(item: Item, given: StoredAnswer) -> Iterator[Row]:
    for row in _ranked_rows(item, given):
        ranks, turns, models = row["ranks"], row["completions"], row["models"]
        for i, j in combinations(range(len(ranks)), 2):
            if ranks[i] != ranks[j]:
                better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
                yield {
                    "prompt": item.prompt,
                    "chosen": turns[better],
                    "rejected": turns[worse],
                    "models": [models[better], models[worse]],
                    **_origin(given),
                }


def _unpaired_rows(item: Item, given: StoredAnswer) -> Iterator[Row]:
    answer = given.answer or {}
    for number, place in enumerate(given.outputs):
        output = item.outputs[place]
        row = {"prompt": item.prompt, "completion": _turn(output.text)}
        if "ratings" in answer and answer["ratings"][number]["overall"] != NEUTRAL:
            rating = answer["ratings"][number]
            yield {
                **row,
                "label": rating["overall"] > NEUTRAL,
                **rating,
                "model": output.model,
                **_origin(given),
            }
        elif answer.get("choice") == "both_bad":
            yield {**row, "label": False, "model": output.model, **_origin(given)}


def _answer_rows(
    store: Store, project_id: int, items: Mapping[int, Item], given: Sequence[StoredAnswer]
) -> list[Row]:
    project = get_project(store, project_id).settings.name
    flagged: dict[tuple[int, int], list[str]] = defaultdict(list)
    for flag in figures(store, project_id).flags:
        flagged[flag.task_id, flag.labeler.id].append(flag.reason)
    return [
        {
            "project": project,
            "item": answer.item_id,
            "source": items[answer.item_id].source,
            "prompt": items[answer.item_id].prompt,
            "outputs": [vars(items[answer.item_id].outputs[place]) for place in answer.outputs],
            "state": answer.state,
            "answer": answer.answer,
            "reason": answer.reason,
            "flags": flagged[answer.task_id, answer.labeler.id],
            "order": [answer.outputs.index(place) for place in answer.order],
            "seconds": answer.seconds,
            "at": datetime.fromtimestamp(answer.at, UTC).isoformat(timespec="milliseconds"),
            "judge": answer.judge,
            "changed": answer.changed,
            "revisions": answer.revisions,
            **_origin(answer),
        }
        for answer in given
    ]


# --- splits and files -----------------------------------------------------------------------------


def prompt_share(row: Row, seed: int = 0) -> float:
    """A number in [0, 1) drawn by hash from a row's prompt: the same for all rows of the prompt.

    Case and white space make no other prompt, so near-equal ones stay together too.
    """
    turns = row["messages"][:-1] if "messages" in row else row["prompt"]
    words = [[turn["role"], " ".join(str(turn.get("content")).casefold().split())] for turn in turns]
    digest = hashlib.sha256(json.dumps([seed, words]).encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def split_rows(rows: Sequence[Row], shares: Mapping[str, float], seed: int = 0) -> dict[str, list[Row]]:
    """Rows by the name of their share; all rows of one prompt fall into one.

    Raises UserError unless the shares are positive and make 1.
    """
    if not shares or any(share <= 0 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-9:
        raise UserError(f"shares: {dict(shares)} must be positive and make 1, as in train 0.9, test 0.1")
    splits: dict[str, list[Row]] = {name: [] for name in shares}
    for row in rows:
        place, names = prompt_share(row, seed), list(shares)
        while len(names) > 1 and place >= shares[names[0]]:
            place -= shares[names.pop(0)]
        splits[names[0]].append(row)
    return splits


def jsonl(rows: Sequence[Row]) -> str:
    """Rows as JSON Lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_export(
    store: Store,
    project_id: int,
    form: str,
    path: Path,
    *,
    shares: Mapping[str, float] | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, int]:
    """Write a form to a file; with `shares` to a folder, a file for each. How many rows, by file name."""
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists already; choose another name or pass --overwrite")
    rows = export_rows(store, project_id, form)
    if shares is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, jsonl(rows))
        return {path.name: len(rows)}
    splits = split_rows(rows, shares, seed)
    with new_directory(path, overwrite) as folder:
        for name, part in splits.items():
            write_text(folder / f"{name}.jsonl", jsonl(part))
    return {f"{name}.jsonl": len(part) for name, part in splits.items()}
