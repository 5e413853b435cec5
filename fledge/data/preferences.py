"""Preferences, one JSON object a line: pairs and unpaired judgements in TRL's field names, and rankings.

What is read becomes a `Ranking` (a prompt, K completions, their ranks; a pair is one with K = 2) or a
`Judgement` (one completion, good or not). docs/stages/reward.md describes the forms.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from fledge.data.readers import file_rows
from fledge.data.streams import BadLines
from fledge.errors import UserError
from fledge.types import Message

Turns = list[Message]
Row = dict[str, Any]
P = TypeVar("P")


@dataclass(frozen=True)
class Ranking:
    """Several completions of one prompt, ordered by one labeler."""

    prompt: Turns
    completions: list[Turns]
    """Each begins and ends with a turn of the assistant."""
    ranks: list[int]
    """1 is the best; equal ranks are ties."""
    tools: list[dict[str, Any]] | None = None
    margin: float = 0.0
    """By how much the better of a pair should win, in units of the reward."""
    kinds: list[str] | None = None
    """What each completion is, such as `right` or `padded`: only reports read it."""
    labeler: str | None = None
    order: list[int] | None = None
    """The order in which the completions were shown, as their numbers from 0."""
    simulated: bool = False
    """Whether a written rule made the ranks, not a person."""
    where: str = ""
    """File and line."""


@dataclass(frozen=True)
class Judgement:
    """One completion of a prompt that a labeler found good or not."""

    prompt: Turns
    completion: Turns
    label: bool
    tools: list[dict[str, Any]] | None = None
    labeler: str | None = None
    simulated: bool = False
    where: str = ""


def read_rankings(path: Path) -> list[Ranking]:
    """The pairs and rankings of a JSON Lines or Parquet file. Raises UserError with file and line."""
    return [_only(Ranking, row, "chosen and rejected, or completions and ranks") for row in _parsed(path)]


def read_judgements(path: Path) -> list[Judgement]:
    """The unpaired judgements of a JSON Lines or Parquet file. Raises UserError with file and line."""
    return [_only(Judgement, row, "prompt, completion and label") for row in _parsed(path)]


def _parsed(path: Path) -> Iterator[Ranking | Judgement]:
    empty = True
    for where, row in file_rows(path, BadLines(advice="")):
        empty = False
        yield parse_preference(row, where)
    if empty:
        raise UserError(f"{path}: holds no preferences")


def _only(kind: type[P], row: Ranking | Judgement, fields: str) -> P:
    if not isinstance(row, kind):
        raise UserError(f"{row.where}: another kind of preference; what is needed here has {fields}")
    return row


def parse_preference(row: Mapping[str, Any], where: str) -> Ranking | Judgement:
    """A line as what it says. Raises UserError that begins with `where`.

    Prompts and completions are texts (a user's turn, an assistant's turn) or lists of messages. Without a
    `prompt` it is what chosen and rejected begin with alike. A text that begins with "\\n\\nHuman:" is taken
    apart into turns, as in HH-RLHF (Bai et al. 2022).
    """
    row = {key: value for key, value in row.items() if value is not None}
    try:
        if "label" in row:
            return _judgement(row, where)
        if "completions" in row or "ranks" in row:
            return _ranking(row, where, *_completions(row), _field(row, "ranks", list))
        if "chosen" in row and "rejected" in row:
            pair = [_turns(row[name], "assistant", name) for name in ("chosen", "rejected")]
            prompt, completions = _split_prompt(row, pair)
            return _ranking(row, where, prompt, completions, [1, 2])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    raise UserError(
        f"{where}: no preference: it takes chosen and rejected, or completions and ranks, or "
        "completion and label"
    )


def ranking_row(ranking: Ranking) -> Row:
    """The line of a ranking, in the K-way form; `parse_preference` reads it back."""
    row = {key: value for key, value in vars(ranking).items() if value is not None and key != "where"}
    return {key: value for key, value in row.items() if value or key not in ("margin", "simulated")}


def pair_rows(ranking: Ranking) -> list[Row]:
    """The lines of all pairs of a ranking in TRL's form (`prompt`, `chosen`, `rejected`), ties left out."""
    rest = {key: value for key, value in ranking_row(ranking).items() if key in _SHARED}
    rows = []
    for better, worse in ordered_pairs(ranking.ranks):
        row = {"prompt": ranking.prompt, "chosen": ranking.completions[better], **rest}
        row["rejected"] = ranking.completions[worse]
        if ranking.kinds is not None:
            row["kinds"] = [ranking.kinds[better], ranking.kinds[worse]]
        rows.append(row)
    return rows


def judgement_row(judgement: Judgement) -> Row:
    """The line of a judgement in TRL's form (`prompt`, `completion`, `label`)."""
    row = {key: value for key, value in vars(judgement).items() if value is not None and key != "where"}
    return {key: value for key, value in row.items() if value or key != "simulated"}


_SHARED = ("tools", "margin", "labeler", "simulated")


def ordered_pairs(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """(better, worse) for all pairs of places with different ranks: at most C(K, 2), ties dropped."""
    return [
        (i, j) if ranks[i] < ranks[j] else (j, i)
        for i in range(len(ranks))
        for j in range(i + 1, len(ranks))
        if ranks[i] != ranks[j]
    ]


# Reading a line.


def _judgement(row: Row, where: str) -> Judgement:
    if not isinstance(row["label"], bool):
        raise UserError(f"label is {row['label']!r}; it must be true or false")
    completion = _turns(_field(row, "completion", (str, list)), "assistant", "completion")
    prompt, (completion,) = _split_prompt(row, [completion])
    shared = _shared(row)
    shared.pop("margin", None)
    return Judgement(prompt, completion, row["label"], **shared, where=where)


def _completions(row: Row) -> tuple[Turns, list[Turns]]:
    texts = _field(row, "completions", list)
    if len(texts) < 2:
        raise UserError(f"completions has {len(texts)}; a ranking takes two or more")
    turns = [_turns(text, "assistant", f"completions[{i}]") for i, text in enumerate(texts)]
    return _split_prompt(row, turns)


def _ranking(row: Row, where: str, prompt: Turns, completions: list[Turns], ranks: list[Any]) -> Ranking:
    count = len(completions)
    if len(ranks) != count or not all(type(rank) is int for rank in ranks):
        raise UserError(f"ranks is {ranks!r}; it must be {count} whole numbers, one for each completion")
    kinds, order = row.get("kinds"), row.get("order")
    if kinds is not None and not _is_list_of(kinds, str, count):
        raise UserError(f"kinds is {kinds!r}; it must be {count} words, one for each completion")
    if order is not None and not (_is_list_of(order, int, count) and sorted(order) == list(range(count))):
        raise UserError(f"order is {order!r}; it must hold the numbers 0 to {count - 1} of the completions")
    return Ranking(prompt, completions, ranks, **_shared(row), kinds=kinds, order=order, where=where)


def _shared(row: Row) -> Row:
    """The fields that all forms may have, checked."""
    margin = row.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise UserError(f"margin is {margin!r}; it must be a number")
    labeler = row.get("labeler")
    if not isinstance(labeler, str | int | None) or isinstance(labeler, bool):
        raise UserError(f"labeler is {labeler!r}; it must be a text")
    if not isinstance(row.get("simulated", False), bool):
        raise UserError(f"simulated is {row['simulated']!r}; it must be true or false")
    return {
        "tools": _field(row, "tools", list) if "tools" in row else None,
        "margin": float(margin),
        "labeler": None if labeler is None else str(labeler),
        "simulated": row.get("simulated", False),
    }


def _field(row: Row, name: str, kind: type | tuple[type, ...]) -> Any:
    value = row.get(name)
    if not isinstance(value, kind):
        names = {list: "a list", (str, list): "a text or a list of messages"}
        raise UserError(
            f"{name} {'is missing' if value is None else f'is {value!r}'}; it must be {names[kind]}"
        )
    return value


def _is_list_of(value: Any, kind: type, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(type(item) is kind for item in value)


_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant): ?")


def _turns(value: Any, role: str, name: str) -> Turns:
    """A text or a list of messages as messages."""
    if isinstance(value, str):
        parts = _TRANSCRIPT.split(value)
        if parts[0] or len(parts) == 1:
            return [cast(Message, {"role": role, "content": value})]
        roles = ["user" if speaker == "Human" else "assistant" for speaker in parts[1::2]]
        turns = [{"role": r, "content": text.strip()} for r, text in zip(roles, parts[2::2], strict=True)]
        return cast(Turns, turns)
    if not isinstance(value, list) or not value:
        raise UserError(f"{name} is {value!r}; it must be a text or a list of messages")
    for i, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f"{name}[{i}] is not a message with role and content")
    return cast(Turns, value)


def _split_prompt(row: Row, completions: list[Turns]) -> tuple[Turns, list[Turns]]:
    """The prompt, and what follows it in each completion."""
    begins = [turns[0]["role"] != "assistant" for turns in completions]
    if all(begins):  # whole conversations, whatever the prompt says
        return _checked(*_common_beginning(completions))
    if "prompt" in row:
        return _checked(_prompt(_turns(row["prompt"], "user", "prompt")), completions)
    texts = [str(turns[0].get("content")) for turns in completions]
    shared = _shared_text(texts)
    if len(completions) < 2 or not shared.strip() or any(len(turns) > 1 for turns in completions):
        raise UserError("prompt is missing, and the completions do not begin alike")
    rests = [_turns(text[len(shared) :].lstrip(), "assistant", "completion") for text in texts]
    return _checked([{"role": "user", "content": shared}], rests)


def _prompt(turns: Turns) -> Turns:
    """Without the empty turn that a transcript's closing "Assistant:" makes."""
    last = turns[-1]
    return turns[:-1] if last["role"] == "assistant" and last.get("content") == "" else turns


def _common_beginning(conversations: list[Turns]) -> tuple[Turns, list[Turns]]:
    """The messages that all begin with, and the rest of each, which begins with the assistant."""
    first = conversations[0]
    most = min(map(len, conversations)) - 1
    alike = (i for i in range(most) if any(turns[i] != first[i] for turns in conversations))
    count = next(alike, most)
    while count and first[count]["role"] != "assistant":
        count -= 1
    return first[:count], [turns[count:] for turns in conversations]


def _shared_text(texts: list[str]) -> str:
    """What texts begin with alike, up to a border between words."""
    first = min(texts, key=len)
    count = next((i for i, c in enumerate(first) if any(t[i] != c for t in texts)), len(first))
    while count > 0 and not first[count - 1].isspace():
        count -= 1
    return first[:count].rstrip()


def _checked(prompt: Turns, completions: list[Turns]) -> tuple[Turns, list[Turns]]:
    if not prompt or prompt[-1]["role"] not in ("user", "tool", "system"):
        raise UserError("the prompt must end with a turn of somebody else than the assistant")
    for turns in completions:
        if not turns or turns[0]["role"] != "assistant" or turns[-1]["role"] != "assistant":
            raise UserError("a completion must begin and end with a turn of the assistant")
    return prompt, completions


def prompt_key(preference: Ranking | Judgement) -> str:
    """Equal for preferences of the same prompt and tools: they are kept in one batch and one split."""
    return json.dumps([preference.prompt, preference.tools], sort_keys=True)
