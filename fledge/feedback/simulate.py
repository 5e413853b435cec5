"""Labels by a written rule, with noise: to try the whole path, and to measure alignment exactly.

Simulated labelers are marked as such in the store, in every row of an export and on every page, and take
nobody's place: people are still asked everything.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence

from fledge.engine.remote import EndpointError
from fledge.errors import UserError
from fledge.feedback.forms import Answer, Message, competition_ranks, to_shown
from fledge.feedback.labelling import prefill_of, record_answer, shown_order
from fledge.feedback.people import add_labeler, list_labelers
from fledge.feedback.records import Item
from fledge.feedback.state import answers_of, item_of, project_of
from fledge.feedback.store import Store, add_prefill, list_items, list_tasks

Rule = Callable[[Sequence[Message], str, str | None], float]
"""(prompt, output, reference answer or None) -> a score; more is better, equal scores are ties."""


def shorter(prompt: Sequence[Message], output: str, gold: str | None) -> float:
    """The fewer characters, the better."""
    return -len(output)


def longer(prompt: Sequence[Message], output: str, gold: str | None) -> float:
    """The more characters, the better."""
    return len(output)


def gold_first(prompt: Sequence[Message], output: str, gold: str | None) -> float:
    """The more words in common with the reference answer, the better (F1 of the words, 0 to 1)."""
    if gold is None:
        raise UserError("rule gold-first: a prompt has no reference answer ('gold' in the prompt file)")
    said, wanted = Counter(output.casefold().split()), Counter(gold.casefold().split())
    common = (said & wanted).total()
    return 2 * common / (said.total() + wanted.total()) if common else 0.0


RULES: dict[str, Rule] = {"shorter": shorter, "longer": longer, "gold-first": gold_first}


def find_rule(name: str) -> Rule:
    """A rule by name; UserError that lists them."""
    if name not in RULES:
        raise UserError(f"unknown rule {name!r}; choose from {', '.join(RULES)}")
    return RULES[name]


def rule_answer(kind: str, rule: Rule, item: Item, outputs: Sequence[int]) -> Answer | None:
    """What a rule says to a task, in the item's order; None where it has nothing to say.

    A ranking and a choice follow the scores. A rating spreads the ranks over 7 (best) to 1 and answers no
    question. A demonstration is the reference answer, a correction too where the output differs from it.
    """
    texts = [item.outputs[place].text for place in outputs]
    if kind in ("demonstration", "correction"):
        return {"text": item.gold} if item.gold and item.gold.strip() and [item.gold] != texts else None
    ranks = competition_ranks([-rule(item.prompt, text, item.gold) for text in texts])
    if kind == "ranking":
        return {"ranks": ranks}
    if kind == "pairwise":
        return {"choice": "tie" if ranks[0] == ranks[1] else "a" if ranks[0] < ranks[1] else "b"}
    steps = max(len(ranks) - 1, 1)
    overall = [7 - round(6 * (rank - 1) / steps) if len(ranks) > 1 else 4 for rank in ranks]
    return {"ratings": [{"overall": value, "questions": {}} for value in overall]}


def add_noise(answer: Answer, noise: float, rng: random.Random) -> Answer:
    """An answer with mistakes. In a ranking each two neighbours, from the worst up, change places with
    probability `noise`; a choice turns round, a tie becomes a choice, a rating moves by 1 likewise.
    """
    if "ranks" in answer:
        ranks = list(answer["ranks"])
        order = sorted(range(len(ranks)), key=ranks.__getitem__)
        for place in range(len(order) - 1, 0, -1):
            if rng.random() < noise:
                i, j = order[place - 1], order[place]
                ranks[i], ranks[j] = ranks[j], ranks[i]
                order[place - 1], order[place] = j, i
        return {"ranks": ranks}
    if "choice" in answer:
        if rng.random() >= noise:
            return answer
        return {"choice": {"a": "b", "b": "a"}.get(answer["choice"]) or rng.choice("ab")}
    if "ratings" in answer:
        moved = []
        for rating in answer["ratings"]:
            step = rng.choice((-1, 1)) if rng.random() < noise else 0
            moved.append({**rating, "overall": min(7, max(1, rating["overall"] + step))})
        return {"ratings": moved}
    return answer


def simulate(
    store: Store,
    project_id: int,
    rule: Rule,
    name: str,
    *,
    labelers: int = 3,
    noise: float = 0.1,
    seed: int = 0,
) -> int:
    """Let `labelers` simulated people answer every task that has its outputs by a rule called `name`.

    Each makes mistakes of their own (`noise`, 0 to 1). What they have answered before stays; so after new
    outputs it can be called again. Returns how many answers are new.
    """
    if not 0 <= noise <= 1:
        raise UserError(f"noise is {noise}; it must be from 0 to 1")
    if labelers < 1:
        raise UserError(f"simulated labelers: {labelers}; at least 1")
    names = [f"rule {name} {number}" for number in range(1, labelers + 1)]
    known = {one.name: one.id for one in list_labelers(store) if one.simulated and not one.purged}
    people = [known.get(name) or add_labeler(store, name, simulated=True)[0].id for name in names]
    tasks = list_tasks(store, project_id)
    new = 0
    with store.writing() as connection:
        done = {(given.task_id, given.labeler.id) for given in answers_of(connection, project_id)}
        project_seed = project_of(connection, project_id).settings.seed
        for task in tasks:
            item = item_of(connection, task.item_id)
            said = None if item.author_id else rule_answer(task.kind, rule, item, task.outputs)
            for number, person in enumerate(people):
                if said is None or (task.id, person) in done:
                    continue
                rng = random.Random(f"{seed}/{task.id}/{number}")
                order = shown_order(project_seed, task, person)
                shown = to_shown(task.kind, add_noise(said, noise, rng), order)
                record_answer(store, connection, task, person, shown, order, seconds=0)
                new += 1
    return new


def prefill_by_rule(store: Store, project_id: int, rule: Rule, name: str) -> int:
    """Let a rule answer every task beforehand, where nothing is pre-filled yet; how many it answered.

    People see it as such, and only while the project's `prefill` is on.
    """
    tasks = list_tasks(store, project_id)
    items = {item.id: item for item in list_items(store, project_id)}  # all that the tasks are of, and newer
    new = 0
    for task in tasks:
        item = items[task.item_id]
        if item.author_id or has_prefill(store, task.id):
            continue
        try:
            said = rule_answer(task.kind, rule, item, task.outputs)
        except UserError as error:  # one that the rule cannot take is left to people
            if isinstance(error, EndpointError):
                raise
            continue
        if said is not None:
            add_prefill(store, task.id, said, f"rule {name}")
            new += 1
    return new


def has_prefill(store: Store, task_id: int) -> bool:
    """Whether a task has a judge's answer already."""
    with store.reading() as connection:
        return prefill_of(connection, task_id) is not None
