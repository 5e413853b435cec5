"""What makes a page: templates in which everything printed is escaped, and figures as a reader wants them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape


def environment() -> Environment:
    """The templates of `fledge/templates`, with this module's filters."""
    made = Environment(
        loader=PackageLoader("fledge"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=printable,
    )
    filters: dict[str, Callable[..., Any]] = {
        "breakable": breakable,
        "percent": percent,
        "interval": interval,
        "count": count,
        "rough": rough,
        "duration": duration,
        "megabytes": lambda size: f"{size / 1e6:.1f} MB",
    }
    made.filters.update(filters)
    return made


def printable(value: Any) -> Any:
    """Text with what HTML cannot hold (control characters, lone surrogates) written as Python would."""
    if type(value) is not str:  # numbers, and Markup, which is a subclass
        return value
    invisible = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]"
    return re.sub(invisible, lambda match: ascii(match[0])[1:-1], value)


def breakable(text: str) -> Markup:
    """Text whose long dotted names may be broken behind dots and underscores, not inside of words."""
    return Markup(re.sub(r"(?<=\w)[._](?=\w)", r"\g<0><wbr>", str(escape(printable(text)))))


def percent(rate: float) -> str:
    """`63.2%`."""
    return f"{rate:.1%}"


def interval(share: Mapping[str, Any]) -> str:
    """`58.9-67.3%`, with an en dash."""
    return f"{100 * share['low']:.1f}\N{EN DASH}{100 * share['high']:.1f}%"


def count(number: float) -> str:
    """`5,607,680`."""
    return f"{number:,.0f}"


def rough(number: float) -> str:
    """`5.6 million`; all digits below a million."""
    return f"{number / 1e6:.1f} million" if number >= 1e6 else count(number)


def duration(seconds: float) -> str:
    """`9 min 24 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{number} {unit}" for number, unit in ((hours, "h"), (minutes, "min"), (rest, "s")) if number]
    return " ".join(parts) or "0 s"
