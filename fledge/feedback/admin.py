"""The admin's pages: how far the project is, who does what, how far people agree, links, export."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from fledge.feedback import labelling, people
from fledge.feedback.agreement import disagreements, figures
from fledge.feedback.exports import FORMS, export_rows
from fledge.feedback.records import Labeler
from fledge.feedback.site import LETTERS, Body, opening_of, person_of, show, site_of, summary_of
from fledge.feedback.state import TASKS_PER_ITEM, answers_of, task_of
from fledge.feedback.store import edit_project, get_item, get_project, list_items

FORM_NAMES = {
    "messages": "conversations for SFT", "prompt-completion": "prompt and completion",
    "preference": "preference pairs: chosen, rejected", "unpaired": "single answers, good or bad",
    "ranked": "whole rankings with ties, order shown and labeler", "answers": "everything, as it was given",
}  # fmt: skip
DISAGREEMENTS_SHOWN = 50


def overview(request: Request) -> Response:
    """How the project stands."""
    site, person = site_of(request), person_of(request, admin=True)
    found = figures(site.store, site.project_id)
    flags = [
        {"flag": flag, "opening": opening_of(site.store, flag.task_id)} for flag in found.flags[::-1][:50]
    ]
    skips = [
        {"skip": skip, "opening": opening_of(site.store, skip.task_id)} for skip in found.skips[::-1][:50]
    ]
    failed = [item for item in list_items(site.store, site.project_id) if item.state == "failed"]
    return show(
        request, "admin.html", person, tab="overview", figures=found, now=_status(request), flags=flags,
        skips=skips, failed=failed, forms=[(form, FORM_NAMES.get(form, form)) for form in FORMS],
    )  # fmt: skip


def status(request: Request) -> dict[str, Any]:
    """How far the preparation and the answers are; what the overview asks for again and again."""
    person_of(request, admin=True)
    return _status(request)


def _status(request: Request) -> dict[str, Any]:
    site = site_of(request)
    progress = labelling.progress(site.store, site.project_id)
    return {
        **site.status(), "items": progress.items, "slots": progress.slots, "filled": progress.filled,
    }  # fmt: skip


def people_page(request: Request) -> Response:
    """Everybody, with what can be done about them."""
    site, person = site_of(request), person_of(request, admin=True)
    return show(request, "people.html", person, tab="people", everybody=people.list_labelers(site.store))


def instructions_page(request: Request) -> Response:
    """A form for what labelers read, and for the settings that may change."""
    return show(request, "instructions.html", person_of(request, admin=True), tab="instructions")


def disagreements_page(request: Request) -> Response:
    """The tasks that people answered most differently."""
    site, person = site_of(request), person_of(request, admin=True)
    found = disagreements(site.store, site.project_id, DISAGREEMENTS_SHOWN)
    rows = [{"found": row, "opening": opening_of(site.store, row.task.id)} for row in found]
    return show(request, "disagreements.html", person, tab="disagreements", rows=rows)


def task_answers(request: Request, task_id: int) -> Response:
    """One task with what everybody said, in the item's order, and which model wrote what."""
    site, person = site_of(request), person_of(request, admin=True)
    with site.store.reading() as connection:
        task = task_of(connection, task_id)
        given = answers_of(connection, task.project_id, task_id=task_id)
    if task.project_id != site.project_id:
        raise HTTPException(404)
    item = get_item(site.store, task_id // TASKS_PER_ITEM)
    rows = [
        {"given": row, **(summary_of(task.kind, row.answer) if row.answer else {"summary": "", "text": ""}),
         "shown": " ".join(LETTERS[task.outputs.index(place)] for place in row.order)}
        for row in given
    ]  # fmt: skip
    outputs = [item.outputs[place] for place in task.outputs]
    return show(
        request, "answers.html", person, tab="disagreements", task=task, item=item, outputs=outputs,
        rows=rows, letters=LETTERS,
    )  # fmt: skip


def export(request: Request, form: str) -> Response:
    """The labels as JSON Lines."""
    site = site_of(request)
    person_of(request, admin=True)
    if form not in FORMS:
        raise HTTPException(404)
    lines = [
        json.dumps(row, ensure_ascii=False) + "\n" for row in export_rows(site.store, site.project_id, form)
    ]
    name = f"{form}.jsonl"
    headers = {"content-disposition": f'attachment; filename="{name}"'}
    return Response(
        "".join(lines).encode("utf-8", "replace"), media_type="application/jsonl", headers=headers
    )


def export_person(request: Request, labeler_id: int) -> Response:
    """All that is stored of a person, as they may ask for it."""
    person_of(request, admin=True)
    text = json.dumps(people.export_labeler(site_of(request).store, labeler_id), indent=2)
    headers = {"content-disposition": f'attachment; filename="labeler-{labeler_id}.json"'}
    return Response(text, media_type="application/json", headers=headers)


def add_person(request: Request, body: Body) -> dict[str, Any]:
    """A new labeler or admin; their link is shown once."""
    person_of(request, admin=True)
    labeler, token = people.add_labeler(
        site_of(request).store, str(body.get("name", "")), body.get("role", "labeler")
    )
    return {"link": _link(request, token), "name": labeler.name}


def renew_link(request: Request, labeler_id: int, body: Body) -> dict[str, Any]:
    """Another link for a person; the old one ends."""
    admin = person_of(request, admin=True)
    token = people.renew_token(site_of(request).store, labeler_id, by=admin.id)
    return {
        "link": _link(request, token),
        "name": people.get_labeler(site_of(request).store, labeler_id).name,
    }


def revoke_link(request: Request, labeler_id: int, body: Body) -> dict[str, Any]:
    """End a person's link."""
    people.revoke(site_of(request).store, labeler_id, by=_not_self(request, labeler_id).id)
    return {}


def purge(request: Request, labeler_id: int, body: Body) -> dict[str, Any]:
    """Remove all that a person gave."""
    people.purge_labeler(site_of(request).store, labeler_id, by=_not_self(request, labeler_id).id)
    return {}


def _not_self(request: Request, labeler_id: int) -> Labeler:
    """The admin, who must not shut themselves out."""
    admin = person_of(request, admin=True)
    if admin.id == labeler_id:
        raise HTTPException(409, "this is you: another admin can do it")
    return admin


def _link(request: Request, token: str) -> str:
    return str(request.url_for("enter", token=token))


def save_settings(request: Request, body: Body) -> dict[str, Any]:
    """Change the instructions, how many label each item, or whether a judge fills in."""
    site, admin = site_of(request), person_of(request, admin=True)
    number, prefill, text = body.get("labelers_per_item"), body.get("prefill"), body.get("instructions")
    old = get_project(site.store, site.project_id).settings
    changes = {
        "instructions": text if isinstance(text, str) and text != old.instructions else None,
        "labelers_per_item": number if type(number) is int and number != old.labelers_per_item else None,
        "prefill": prefill if isinstance(prefill, bool) and prefill != old.prefill else None,
    }
    if any(value is not None for value in changes.values()):
        edit_project(site.store, site.project_id, by=admin.id, **changes)  # type: ignore[arg-type]
    return {"next": "/admin/instructions"}


GET: dict[str, Callable[..., Any]] = {
    "/admin": overview, "/admin/status": status, "/admin/people": people_page,
    "/admin/instructions": instructions_page, "/admin/disagreements": disagreements_page,
    "/admin/task/{task_id}": task_answers, "/admin/export/{form}": export,
    "/admin/people/{labeler_id}/export": export_person,
}  # fmt: skip
POST: dict[str, Callable[..., Any]] = {
    "/admin/people": add_person, "/admin/people/{labeler_id}/renew": renew_link,
    "/admin/people/{labeler_id}/revoke": revoke_link, "/admin/people/{labeler_id}/purge": purge,
    "/admin/instructions": save_settings,
}  # fmt: skip
