"""The report of `fledge evaluate`: one self-contained HTML page, made from nothing but the files it wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fledge.errors import UserError
from fledge.files import read_json, write_text
from fledge.report.charts import chart_style
from fledge.report.page import environment
from fledge.report.samples import WAYS, samples_chart

REQUIRED = ("model", "bits_per_byte", "questions")


def write_evaluation_report(out: Path) -> Path:
    """Write `report.html` beside the `summary.json` of an evaluation; returns its path.

    Raises UserError if that is missing, broken, or lacks what the report cannot do without.
    """
    summary = read_json(out / "summary.json")
    if missing := [key for key in REQUIRED if key not in summary]:
        raise UserError(
            f"{out / 'summary.json'}: has no {missing[0]!r}; let `fledge evaluate` write it again"
        )
    tasks = summary.get("tasks") or {}
    with chart_style():
        charts = [samples_chart(i, name, figures) for i, (name, figures) in enumerate(tasks.items())]
    config = out / "config.toml"
    context = {
        "summary": summary,
        "texts": _texts(summary),
        "baseline": (summary.get("baseline") or {}).get("model"),
        "charts": charts,
        "tasks": [_task(name, figures) for name, figures in tasks.items()],
        "config": config.read_text(encoding="utf-8") if config.exists() else None,
    }
    write_text(out / "report.html", environment().get_template("evaluate.html").render(context))
    return out / "report.html"


def _texts(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Bits per byte of each text, and of the baseline with how much less the model needs."""
    beside = (summary.get("baseline") or {}).get("bits_per_byte", {})
    return [
        {
            "name": name,
            "bits": bits,
            "baseline": beside.get(name),
            "less": 1 - bits / beside[name] if beside.get(name) else None,
        }
        for name, bits in summary["bits_per_byte"].items()
    ]


def _task(name: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """A table: a row for each number of answers, a column for each way to choose."""
    curves = figures["curves"]
    return {
        "name": name,
        "figures": figures,
        "ways": [WAYS[way] for way in curves],
        "rows": list(zip(*curves.values(), strict=True)),
    }
