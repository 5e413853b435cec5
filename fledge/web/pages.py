"""Templates in which everything printed is escaped, and the files that pages load."""

from __future__ import annotations

import time
from pathlib import Path

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from starlette.responses import HTMLResponse, Response

from fledge.web.markdown import markdown, plain, prose, visible

ASSETS = Path(__file__).parent / "assets"
TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def environment(package: str, folder: str = "pages") -> Environment:
    """The templates in `folder` of a package, over those that all pages share."""
    loader = ChoiceLoader([PackageLoader(package, folder), PackageLoader("fledge.web", "templates")])
    made = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    filters = (visible, plain, markdown, prose, share, count, duration, day, opening)
    made.filters.update({function.__name__: function for function in filters})
    return made


def page(templates: Environment, name: str, status: int = 200, **values: object) -> Response:
    """A template as an answer."""
    return HTMLResponse(templates.get_template(name).render(**values), status)


def asset(folders: list[Path], name: str) -> Response | None:
    """A style sheet, script or picture by its bare name; None if there is none."""
    for folder in folders:
        for file in folder.iterdir():  # the name comes from outside: it is compared, never opened
            if file.name == name and file.suffix in TYPES:
                return Response(file.read_bytes(), media_type=TYPES[file.suffix])
    return None


def share(value: float | None) -> str:
    """`63%`; a dash for nothing."""
    return "\N{EN DASH}" if value is None else f"{value:.0%}"


def count(number: float) -> str:
    """`5,607`."""
    return f"{number:,.0f}"


def duration(seconds: float | None) -> str:
    """`48 s`, `2 min 5 s` or `3 h 20 min`; a dash for nothing."""
    if seconds is None:
        return "\N{EN DASH}"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def day(at: float | None) -> str:
    """A moment in the machine's own time zone: `2026-11-21 13:05`; a dash for nothing."""
    return "\N{EN DASH}" if at is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


def opening(text: str) -> str:
    """The beginning of a text, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= 90 else text[:89] + "\N{HORIZONTAL ELLIPSIS}"
