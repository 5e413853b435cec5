"""The labelling server: which address does what. Pages are in `pages/`, what is stored in `labelling.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp

from fledge.errors import UserError
from fledge.feedback import admin, labelling, people
from fledge.feedback.forms import MAX_TEXT_CHARACTERS, QUESTIONS, RATING_NAMES, to_shown
from fledge.feedback.records import Assignment, Labeler
from fledge.feedback.site import (
    TEMPLATES,
    Body,
    SignInNeeded,
    Site,
    opening_of,
    person_of,
    show,
    site_of,
    summary_of,
)
from fledge.web.pages import asset, page
from fledge.web.security import protected
from fledge.web.sign_in import signed_in, signed_out

FOLDERS = [Path(__file__).parent / "pages", Path(__file__).parents[1] / "web" / "assets"]
HISTORY_ROWS = 500
SKIP_REASONS = (
    "The prompt makes no sense", "I do not know enough about this", "The outputs are too alike or all broken",
    "I do not want to read this",
)  # fmt: skip
KEYS: dict[str, list[tuple[list[str], str]]] = {
    "ranking": [
        (["1", "\N{HORIZONTAL ELLIPSIS}", "9"], "place of the chosen output; the next one is chosen"),
        (["A", "B", "\N{HORIZONTAL ELLIPSIS}"], "choose an output"),
        (["\N{LEFTWARDS ARROW}", "\N{RIGHTWARDS ARROW}"], "choose the output before, behind"),
        (["\N{UPWARDS ARROW}", "\N{DOWNWARDS ARROW}"], "better, worse: ties first, then passes"),
        (["0"], "take its place away"),
    ],
    "rating": [
        (["1", "\N{HORIZONTAL ELLIPSIS}", "7"], "overall rating"),
        (["\N{UPWARDS ARROW}", "\N{DOWNWARDS ARROW}"], "choose a question"),
        (["Y", "N", "U"], "yes, no, leave open"),
        (["A", "B", "\N{HORIZONTAL ELLIPSIS}"], "show an output"),
        (["\N{LEFTWARDS ARROW}", "\N{RIGHTWARDS ARROW}"], "the output before, behind"),
    ],
    "pairwise": [
        (["A", "\N{LEFTWARDS ARROW}"], "A is better"), (["B", "\N{RIGHTWARDS ARROW}"], "B is better"),
        (["T", "="], "tie"), (["X"], "both bad"),
    ],
    "demonstration": [(["Esc"], "leave the text, so that single keys work"), (["E"], "back to the text")],
    "correction": [(["Esc"], "leave the text, so that single keys work"), (["E"], "back to the text")],
}  # fmt: skip
SHARED_KEYS = [
    (["Ctrl", "Enter"], "submit, from anywhere"), (["P"], "previous task"), (["S"], "skip"), (["L"], "flag"),
    (["V"], "outputs as written, without formatting"), (["?"], "this list"),
]  # fmt: skip


def make_app(site: Site) -> ASGIApp:
    """The server of one project."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.site = site
    app.add_exception_handler(UserError, _mistake)
    app.add_exception_handler(SignInNeeded, _sign_in_needed)
    app.add_exception_handler(HTTPException, _http_error)
    for path, function in {**GET, **admin.GET}.items():
        app.get(path)(function)
    for path, function in {**POST, **admin.POST}.items():
        app.post(path)(function)
    return protected(app)


# --- pages ----------------------------------------------------------------------------------------


def home(request: Request) -> Response:
    """Instructions and a way in."""
    person = person_of(request)
    return show(request, "home.html", person, headline="Help a language model become a good assistant")


def enter(request: Request, token: str) -> Response:
    """A personal link."""
    if people.sign_in(site_of(request).store, token) is None:
        raise SignInNeeded
    return signed_in(request, token)


def assets(name: str) -> Response:
    """Scripts, styles and pictures."""
    found = asset(FOLDERS, name)
    if found is None:
        raise HTTPException(404)
    return found


def next_page(request: Request) -> Response:
    """The person's next task, or why there is none."""
    site, person = site_of(request), person_of(request)
    task = labelling.next_task(site.store, person.id, site.project_id)
    if task is not None:
        return RedirectResponse(f"/task/{task.task_id}", 303)
    waiting = labelling.progress(site.store, site.project_id).items["waiting"]
    if waiting and site.status()["running"]:
        return show(
            request, "waiting.html", person, heading="The next prompts are being prepared", waiting=waiting
        )
    return show(request, "waiting.html", person, heading="Nothing is left for you now", waiting=0)


def history(request: Request) -> Response:
    """What the person has done."""
    site, person = site_of(request), person_of(request)
    done = labelling.history(site.store, person.id, site.project_id)[-HISTORY_ROWS:][::-1]
    rows = [{**vars(row), "opening": opening_of(site.store, row.task_id)} for row in done]
    return show(request, "history.html", person, rows=rows)


def task_page(request: Request, task_id: int) -> Response:
    """One task, as this person sees it."""
    site, person = site_of(request), person_of(request)
    task = labelling.open_task(site.store, person.id, task_id)
    if task.project_id != site.project_id:
        raise HTTPException(404)
    before = [row.task_id for row in labelling.history(site.store, person.id, site.project_id)]
    place = before.index(task_id) if task_id in before else len(before)
    previous = f"/task/{before[place - 1]}" if place else None
    others = labelling.others(site.store, person.id, task_id) if task.answer is not None else []
    return show(
        request, "task.html", person, task=task, data=task_data(task, previous), previous=previous,
        questions=[question for question in QUESTIONS if question.key in task.questions],
        rating_names=RATING_NAMES, skip_reasons=SKIP_REASONS, key_help=[*KEYS[task.kind], *SHARED_KEYS],
        others=[told(task, other.answer, other.labeler) for other in others if other.answer],
    )  # fmt: skip


def task_data(task: Assignment, previous: str | None) -> dict[str, Any]:
    """What the page's script needs: no model names, nobody else's answers."""
    start = task.draft.body if task.draft else task.answer or (task.prefill.answer if task.prefill else None)
    data: dict[str, Any] = {
        "id": task.task_id,
        "kind": task.kind,
        "order": list(task.order),
        "previous": previous,
        "start": start,
    }
    data["seconds"] = task.draft.seconds if task.draft else 0
    if task.kind == "correction":
        data["original"] = task.outputs[0]
    return data


def told(task: Assignment, given: dict[str, Any], labeler: Labeler) -> dict[str, Any]:
    """Somebody's answer in the letters that this page shows."""
    shown = to_shown(task.kind, given, task.order)
    return {"who": labeler.handle, "simulated": labeler.simulated, **summary_of(task.kind, shown)}


def write_page(request: Request) -> Response:
    """A form for a prompt of the labeler's own."""
    person = person_of(request)
    written = request.query_params.get("written", "")
    number = int(written) if written.isdecimal() and len(written) < 6 else 0
    return show(request, "write.html", person, written=number, limit=MAX_TEXT_CHARACTERS)


# --- what people do -------------------------------------------------------------------------------


def draft(request: Request, task_id: int, body: Body) -> dict[str, Any]:
    """Keep what the page holds."""
    person = person_of(request)
    labelling.save_draft(
        site_of(request).store, person.id, task_id, body.get("body", {}), body.get("seconds", 0)
    )
    return {}


def answer(request: Request, task_id: int, body: Body) -> dict[str, Any]:
    """Record an answer."""
    person, order = person_of(request), body.get("order")
    labelling.submit(
        site_of(request).store, person.id, task_id, body.get("answer", {}),
        order=order if isinstance(order, list) else [], seconds=body.get("seconds", 0), key=_key(body),
    )  # fmt: skip
    return {"next": "/next"}


def skip(request: Request, task_id: int, body: Body) -> dict[str, Any]:
    """Leave a task to others."""
    person = person_of(request)
    labelling.skip(
        site_of(request).store, person.id, task_id, body.get("reason", ""), seconds=body.get("seconds", 0),
        key=_key(body),
    )  # fmt: skip
    return {"next": "/next"}


def flag(request: Request, task_id: int, body: Body) -> dict[str, Any]:
    """Tell the admin."""
    person = person_of(request)
    labelling.flag(site_of(request).store, person.id, task_id, body.get("reason", ""), key=_key(body))
    return {}


def write(request: Request, body: Body) -> dict[str, Any]:
    """Record a prompt with its ideal answer."""
    site, person = site_of(request), person_of(request)
    labelling.write_prompt(
        site.store, person.id, site.project_id, body.get("prompt", ""), body.get("text", ""),
        seconds=body.get("seconds", 0), key=_key(body),
    )  # fmt: skip
    written = body.get("written", 0)
    return {"next": f"/write?written={written + 1 if isinstance(written, int) else 1}"}


def _key(body: dict[str, Any]) -> str | None:
    key = body.get("key")
    return key if isinstance(key, str) and key else None


def leave(request: Request, body: Body) -> Response:
    """Sign out of this browser; the link goes on to work."""
    return signed_out(request, JSONResponse({"next": "/"}))


# --- errors ---------------------------------------------------------------------------------------


async def _mistake(request: Request, error: Exception) -> Response:
    return _error(request, 400, "That did not work", f"{error}.")


async def _sign_in_needed(request: Request, _: Exception) -> Response:
    text = "Open your personal link. If it has ended, ask whoever gave it to you for a new one."
    return _error(request, 401, "Who are you?", text)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = "There is no such page." if error.status_code == 404 else f"{error.detail}."
    return _error(
        request, error.status_code, "Not found" if error.status_code == 404 else "Not possible", text
    )


def _error(request: Request, status: int, heading: str, text: str) -> Response:
    if request.method != "GET":
        return JSONResponse({"error": text}, status)
    link = {"target": "/next", "target_text": "Go on labelling"} if status == 400 else {"target": None}
    return page(TEMPLATES, "message.html", status, heading=heading, text=text, **link)


GET: dict[str, Callable[..., Any]] = {
    "/": home, "/s/{token}": enter, "/assets/{name}": assets, "/next": next_page, "/history": history,
    "/task/{task_id}": task_page, "/write": write_page,
}  # fmt: skip
POST: dict[str, Callable[..., Any]] = {
    "/task/{task_id}/draft": draft, "/task/{task_id}/answer": answer, "/task/{task_id}/skip": skip,
    "/task/{task_id}/flag": flag, "/write": write, "/leave": leave,
}  # fmt: skip
