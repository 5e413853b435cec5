"""What every page of the labelling server begins with: the project it serves, who asks, and what is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import sqlalchemy as sql
from fastapi import Depends, Request
from starlette.responses import Response

from fledge.feedback import labelling, people
from fledge.feedback.database import answers, tasks
from fledge.feedback.records import Labeler
from fledge.feedback.state import TASKS_PER_ITEM, all_labelers
from fledge.feedback.store import Store, get_item, get_project
from fledge.web.pages import environment, opening, page
from fledge.web.security import json_body
from fledge.web.sign_in import token_of

TEMPLATES = environment("fledge.feedback")
LETTERS = "ABCDEFGHI"
CHOICE_NAMES = {"a": "A is better", "b": "B is better", "tie": "tie", "both_bad": "both bad"}
Body = Annotated[dict[str, Any], Depends(json_body)]


@dataclass(frozen=True)
class Site:
    """What the server serves. `status` says how the preparation of outputs stands: `running` and, if it came
    to an end too early, `error`."""

    store: Store
    project_id: int
    status: Callable[[], dict[str, Any]] = lambda: {"running": False, "error": None}


class SignInNeeded(Exception):
    """Nobody known asks, or a labeler asks for what is the admin's."""


def site_of(request: Request) -> Site:
    """What this server serves."""
    site: Site = request.app.state.site
    return site


def person_of(request: Request, admin: bool = False) -> Labeler:
    """Who asks; raises SignInNeeded if nobody known does, or none with the role."""
    person = people.sign_in(site_of(request).store, token_of(request) or "")
    if person is None or (admin and person.role != "admin"):
        raise SignInNeeded
    return person


def show(request: Request, name: str, person: Labeler, **values: Any) -> Response:
    """A page with what the bar at its top needs."""
    site = site_of(request)
    settings = get_project(site.store, site.project_id).settings
    progress = labelling.progress(site.store, site.project_id, person.id)
    return page(
        TEMPLATES, name, project=settings, person=person, progress=progress, simulated=has_simulated(site),
        **values,
    )  # fmt: skip


def has_simulated(site: Site) -> bool:
    """Whether a rule gave labels to this project."""
    with site.store.reading() as connection:
        rules = [labeler.id for labeler in all_labelers(connection).values() if labeler.simulated]
        joined = sql.join(answers, tasks, answers.c.task_id == tasks.c.id)
        query = sql.select(answers.c.task_id).select_from(joined).where(answers.c.labeler_id.in_(rules))
        return connection.scalar(query.where(tasks.c.project_id == site.project_id).limit(1)) is not None


def opening_of(store: Store, task_id: int) -> str:
    """The beginning of a task's last message, on one line."""
    return opening(get_item(store, task_id // TASKS_PER_ITEM).prompt[-1]["content"])


def summary_of(kind: str, shown: dict[str, Any]) -> dict[str, str]:
    """An answer in the order shown, in words: `summary`, and `text` where it is one."""
    if kind == "pairwise":
        return {"summary": CHOICE_NAMES[shown["choice"]], "text": ""}
    if kind == "ranking":
        levels: dict[int, list[str]] = {}
        for letter, rank in zip(LETTERS, shown["ranks"], strict=False):
            levels.setdefault(rank, []).append(letter)
        return {"summary": " > ".join(" = ".join(levels[rank]) for rank in sorted(levels)), "text": ""}
    if kind == "rating":
        parts = []
        for letter, rating in zip(LETTERS, shown["ratings"], strict=False):
            yes = [key.replace("_", " ") for key, value in rating["questions"].items() if value]
            parts.append(f"{letter} {rating['overall']}" + (f" ({', '.join(yes)})" if yes else ""))
        return {"summary": "overall: " + ", ".join(parts), "text": ""}
    return {"summary": "wrote", "text": shown["text"]}
