"""The page that shows what cleaning left out: one self-contained HTML file, made from its summary alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fledge.data.quality import RULES

Summary = Mapping[str, Any]

STEPS: dict[str, tuple[str, str]] = {
    "language": ("language", "is likely enough in one of the languages that were asked for"),
    "exact-duplicate": ("exact duplicates", "is not the text of an earlier document, white space aside"),
    "near-duplicate": ("near duplicates", "is not almost the text of an earlier document (MinHash)"),
    "evaluation": ("evaluation texts", "shares no run of 13 words with an evaluation"),
}
"""What is no quality rule: title, and what a document must be to stay."""


def page(summary: Summary) -> str:
    """The report of `fledge data prepare` as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fledge"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    environment.filters["count"] = lambda number: f"{number:,.0f}"
    environment.filters["size"] = size
    environment.filters["percent"] = _percent
    environment.filters["duration"] = _duration
    return environment.get_template("data.html").render(
        summary=summary,
        sources={name: _source(account) for name, account in summary["sources"].items()},
        steps=_steps(summary),
        pairs=_pairs(summary),
        kinds=[kind for kind in ("email", "phone", "ip", "key") if kind in summary["settings"]["mask"]],
    )


def _source(account: Summary) -> dict[str, Any]:
    """The account of a source with the parts of its bar, as shares of all its bytes."""
    parts = {"kept": account["bytes_out"], "lines": 0, "quality": 0, **dict.fromkeys(STEPS, 0)}
    for step, removed in account["removed"].items():
        lines = step in RULES and RULES[step].keeps is not None
        parts["lines" if lines else "quality" if step in RULES else step] += removed["bytes"]
    total = sum(parts.values()) or 1
    return {**account, "parts": {part: value / total for part, value in parts.items() if value}}


def _steps(summary: Summary) -> list[dict[str, Any]]:
    """What each rule and step took out of all sources, in the order in which they are applied."""
    rows = []
    for step in (*RULES, *STEPS):
        by_source = {
            name: account["removed"][step]
            for name, account in summary["sources"].items()
            if step in account["removed"]
        }
        used = step in STEPS or any(step in rules for rules in summary["rules"].values())
        if not by_source and not (used and step in RULES):
            continue
        taken = sum(removed["bytes"] for removed in by_source.values())
        rows.append(
            {
                "name": step if step in RULES else STEPS[step][0],
                "text": RULES[step].text if step in RULES else STEPS[step][1],
                "ruleset": RULES[step].ruleset if step in RULES else None,
                "documents": sum(removed["documents"] for removed in by_source.values()),
                "lines": sum(removed["lines"] for removed in by_source.values()),
                "bytes": taken,
                "share": taken / (summary["bytes_in"] or 1),
                "by_source": by_source,
                "is_pair": step in ("exact-duplicate", "near-duplicate"),
            }
        )
    largest = max((row["bytes"] for row in rows), default=0) or 1
    return [{**row, "of_largest": row["bytes"] / largest} for row in rows]


def _pairs(summary: Summary) -> list[dict[str, Any]]:
    """Documents that nearly repeat another, beside it."""
    return [
        {"source": name, **example}
        for name, account in summary["sources"].items()
        for example in account["removed"].get("near-duplicate", {}).get("examples", [])
        if "original" in example
    ]


def size(count: float) -> str:
    """Bytes in the largest decimal unit that fits: `1.2 GB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"


def _percent(share: float) -> str:
    """With one digit, and never all or nothing where it is not."""
    return "<0.1%" if 0 < share < 0.0005 else ">99.9%" if 0.9995 <= share < 1 else f"{share:.1%}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.0f} s"


def _printable(value: Any) -> Any:
    """Text with what HTML cannot hold (control characters, lone surrogates) written as Python would."""
    if type(value) is not str:
        return value
    invisible = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]"
    return re.sub(invisible, lambda match: ascii(match[0])[1:-1], value.replace("\r\n", "\n"))
