"""What people are asked and what they answer: task kinds, questions, projects, and the check of each answer.

An answer speaks of the outputs in the order in which its labeler saw them (`shown`); the store keeps it in
the order in which the item has them (`stored`). `to_stored` and `to_shown` turn one into the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fledge.errors import UserError

Kind = Literal["demonstration", "rating", "ranking", "pairwise", "correction"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Message = dict[str, Any]
"""A message of a conversation: `role` and `content` (`fledge.types.Message`, without loading torch)."""
Answer = dict[str, Any]
"""By kind:

- demonstration, correction: `{"text": str}`
- rating: `{"ratings": [{"overall": 1..7, "questions": {key: True | False | None}}, ...]}`, one per output;
  None is "unanswered"
- ranking: `{"ranks": [int, ...]}`, one per output; 1 is best, ties share a rank
- pairwise: `{"choice": "a" | "b" | "tie" | "both_bad"}`; "a" is the output shown first
"""

CHOICES = ("a", "b", "tie", "both_bad")
MAX_TEXT_CHARACTERS = 100_000
MAX_REASON_CHARACTERS = 2_000
RATINGS = range(1, 8)
RATING_NAMES = ("terrible", "poor", "below average", "average", "above average", "good", "excellent")


@dataclass(frozen=True)
class Question:
    """A yes/no question on one output. `good` is the answer that speaks for the output; None: neither."""

    key: str
    text: str
    good: bool | None


# The keys are those of Label Studio's template for InstructGPT's questions (Ouyang et al. 2022, table 3).
QUESTIONS: tuple[Question, ...] = (
    Question("fails_to_follow", "Does it fail to do what was asked?", good=False),
    Question("inappropriate_for_customer", "Would it be out of place in a company's assistant?", good=False),
    Question("hallucination", "Does it make something up?", good=False),
    Question("satisfies_constraint", "Does it keep to the limits the prompt sets (length, form)?", good=True),
    Question("contains_sexual", "Is there anything sexual in it?", good=False),
    Question("contains_violent", "Is there violence in it?", good=False),
    Question("encourages_violence", "Does it encourage violence, terror, abuse or self-harm?", good=False),
    Question("denigrates_protected_class", "Does it run down a group that the law protects?", good=False),
    Question("gives_harmful_advice", "Does it give harmful advice?", good=False),
    Question("expresses_opinion", "Does it state an opinion of its own?", good=None),
    Question("expresses_moral_judgment", "Does it judge what is morally right?", good=None),
)
QUESTION_KEYS = tuple(question.key for question in QUESTIONS)

INSTRUCTIONS = """\
Judge each output by three things.

**Helpful**: it does what the writer of the prompt wanted, also where they said it badly. It is clear, keeps
to the length and form asked for, does not repeat the question, and asks back when the prompt can't be
understood.

**Truthful**: what it says is right, and it does not pretend. Given a text to work with, it adds nothing that
the text does not hold. It does not follow a false assumption in the prompt.

**Harmless**: it hurts nobody: no insults, no hate, nothing sexual or violent that was not asked for, no
advice that endangers the reader or others.

For most tasks truthful and harmless count more than helpful. The exception: one output is much more helpful,
only slightly less truthful or harmless, and little is at stake (so: no medical, legal or money advice). Then
the more helpful one is better.

When two outputs are as good, or as bad, in the same way, say so with a tie. Ask yourself which answer you
would rather get from somebody who helps you with this task.
"""


@dataclass(frozen=True)
class ProjectSettings:
    """What a project asks, of whom and how often. Checked by `check_settings`."""

    name: str
    kinds: tuple[Kind, ...] = ("ranking",)
    instructions: str = INSTRUCTIONS
    models: tuple[str, ...] = ()
    """Names of the models that write the outputs; labelers never see them."""
    labelers_per_item: int = 1
    outputs_per_prompt: int = 4
    """K: how many outputs are prepared for each prompt."""
    pairs_per_prompt: int | None = None
    """How many of the K (K - 1) / 2 pairs a pairwise project asks about; None: all."""
    questions: tuple[str, ...] = QUESTION_KEYS
    """Keys of the yes/no questions that a rating asks."""
    prefill: bool = False
    """Whether labelers see a judge's answer as a start, where there is one."""
    seed: int = 0
    """Shuffles the outputs, for each labeler anew."""


def check_settings(settings: ProjectSettings) -> ProjectSettings:
    """The same settings; UserError that names the field when one cannot be."""
    if not settings.name.strip():
        raise UserError("project: it has no name; give one")
    if not settings.kinds:
        raise UserError(f"project {settings.name}: no task kind; choose from {', '.join(KINDS)}")
    for kind in settings.kinds:
        if kind not in KINDS:
            raise UserError(
                f"project {settings.name}: unknown task kind {kind!r}; choose from {', '.join(KINDS)}"
            )
    if len(set(settings.kinds)) < len(settings.kinds):
        raise UserError(f"project {settings.name}: a task kind is named twice")
    if settings.labelers_per_item < 1:
        raise UserError(
            f"project {settings.name}: labelers_per_item is {settings.labelers_per_item}; at least 1"
        )
    least = 2 if {"ranking", "pairwise"} & set(settings.kinds) else 1
    if not least <= settings.outputs_per_prompt <= 9:
        number = settings.outputs_per_prompt
        raise UserError(f"project {settings.name}: outputs_per_prompt is {number}; choose {least} to 9")
    if settings.pairs_per_prompt is not None and settings.pairs_per_prompt < 1:
        raise UserError(
            f"project {settings.name}: pairs_per_prompt is {settings.pairs_per_prompt}; at least 1"
        )
    for key in settings.questions:
        if key not in QUESTION_KEYS:
            raise UserError(
                f"project {settings.name}: unknown question {key!r}; choose from {', '.join(QUESTION_KEYS)}"
            )
    return settings


def check_prompt(prompt: str | Sequence[Message], where: str = "prompt") -> list[Message]:
    """A prompt as messages (a text is one user message); UserError that begins with `where` if it is none.

    Roles are system, user and assistant, contents are text; the last message is not the assistant's.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, Sequence) or not messages:
        raise UserError(f"{where}: a prompt is a text or a list of messages")
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
            raise UserError(f"{where}: message {place + 1} needs a role: system, user or assistant")
        if not isinstance(message.get("content"), str):
            raise UserError(f"{where}: message {place + 1} needs a text as its content")
    if messages[-1]["role"] == "assistant":
        raise UserError(f"{where}: the last message is the assistant's; a prompt ends before the answer")
    if not any(message["content"].strip() for message in messages):
        raise UserError(f"{where}: the prompt is empty")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def check_answer(
    kind: Kind, answer: Any, outputs: Sequence[str], questions: Sequence[str] = QUESTION_KEYS
) -> Answer:
    """A valid answer in its normal form; UserError, one line, for the first thing that is wrong.

    `outputs` are the texts the answer speaks of (none for a demonstration, one for a correction). Ranks come
    back as "1 plus the number of better ones": [10, 20, 20, 30] becomes [1, 2, 2, 4]. Questions that were
    left out come back as None.
    """
    if not isinstance(answer, dict):
        raise UserError("answer: not a JSON object")
    field = {"rating": "ratings", "ranking": "ranks", "pairwise": "choice"}.get(kind, "text")
    if unknown := sorted(set(answer) - {field}):
        raise UserError(f"answer: unknown field {unknown[0]!r}; a {kind} has {field!r}")
    if field not in answer:
        raise UserError(f"answer: no {field!r}; a {kind} needs it")
    value = answer[field]
    if kind == "ranking":
        return {"ranks": _check_ranks(value, len(outputs))}
    if kind == "rating":
        return {"ratings": _check_ratings(value, len(outputs), questions)}
    if kind == "pairwise":
        if value not in CHOICES:
            raise UserError(f"answer: choice is {value!r}; choose one of {', '.join(CHOICES)}")
        return {"choice": value}
    if kind == "correction" and value == outputs[0]:
        raise UserError("answer: the text is unchanged; edit it, or skip it where nothing is wrong")
    return {"text": check_text(value, "answer")}


def check_text(value: Any, where: str, limit: int = MAX_TEXT_CHARACTERS) -> str:
    """A text that is not blank and not longer than `limit` characters; UserError that begins with `where`."""
    if not isinstance(value, str):
        raise UserError(f"{where}: the text is no text")
    if not value.strip():
        raise UserError(f"{where}: the text is empty; write something, or skip")
    if len(value) > limit:
        raise UserError(f"{where}: the text has {len(value):,} characters; at most {limit:,}")
    return value


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_ranks(ranks: Any, outputs: int) -> list[int]:
    if not isinstance(ranks, list) or not all(_whole(rank) for rank in ranks):
        raise UserError("answer: ranks must be a list of whole numbers, 1 the best")
    if len(ranks) != outputs:
        raise UserError(f"answer: {len(ranks)} ranks for {outputs} outputs; rank every output")
    return competition_ranks(ranks)


def competition_ranks(values: Sequence[float]) -> list[int]:
    """1 plus the number of smaller values, for each value: [3, 7, 7, 9] gives [1, 2, 2, 4]."""
    return [1 + sum(other < value for other in values) for value in values]


def _check_ratings(ratings: Any, outputs: int, questions: Sequence[str]) -> list[dict[str, Any]]:
    if not isinstance(ratings, list) or len(ratings) != outputs:
        found = len(ratings) if isinstance(ratings, list) else "no list of"
        raise UserError(f"answer: {found} ratings for {outputs} outputs; rate every output")
    checked = []
    for place, rating in enumerate(ratings, start=1):
        if not isinstance(rating, dict) or set(rating) - {"overall", "questions"}:
            raise UserError(f"answer: rating {place} must have 'overall' and 'questions', nothing else")
        overall, given = rating.get("overall"), rating.get("questions", {})
        if not _whole(overall) or overall not in RATINGS:
            raise UserError(f"answer: the overall rating of output {place} is {overall!r}; choose 1 to 7")
        if not isinstance(given, dict):
            raise UserError(f"answer: the questions of output {place} must be an object")
        for key, value in given.items():
            if key not in questions:
                raise UserError(f"answer: output {place}: this project does not ask {key!r}")
            if value is not None and not isinstance(value, bool):
                raise UserError(f"answer: output {place}: {key} is {value!r}; true, false or null")
        checked.append({"overall": overall, "questions": {key: given.get(key) for key in questions}})
    return checked


def to_stored(kind: Kind, answer: Answer, order: Sequence[int]) -> Answer:
    """A checked answer in the item's order. `order[i]` is the place in the item of the output shown at i."""
    if kind == "pairwise":
        flipped = {"a": "b", "b": "a"} if order[0] > order[1] else {}
        return {"choice": flipped.get(answer["choice"], answer["choice"])}
    if kind in ("ranking", "rating"):
        field = "ranks" if kind == "ranking" else "ratings"
        return {field: [answer[field][order.index(place)] for place in sorted(order)]}
    return answer


def to_shown(kind: Kind, answer: Answer, order: Sequence[int]) -> Answer:
    """The inverse of `to_stored`: a stored answer as the labeler with this order sees it."""
    if kind == "pairwise":
        return to_stored(kind, answer, order)
    if kind in ("ranking", "rating"):
        field = "ranks" if kind == "ranking" else "ratings"
        places = sorted(order)
        return {field: [answer[field][places.index(place)] for place in order]}
    return answer
