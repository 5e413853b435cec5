"""The report of `fledge reward`: one self-contained HTML page, made from nothing but the files of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fledge.errors import UserError
from fledge.files import read_json, read_jsonl, write_text
from fledge.report.charts import Chart, Row, chart_style, loss_chart
from fledge.report.page import environment
from fledge.report.reward_charts import calibration_chart, length_chart, reward_chart

WORST_PAIRS = 20
# What the report cannot do without.
REQUIRED = ("accuracy", "by_gap", "by_kinds", "calibration", "length", "offset", "prompts", "held_out")


def write_reward_report(out: Path) -> Path:
    """Write `report.html` into the directory of a finished `fledge reward`; returns its path.

    Raises UserError if `summary.json` or `pairs.jsonl` is missing, broken, or has nothing held out.
    """
    summary = read_json(out / "summary.json")
    missing = [key for key in REQUIRED if key not in summary]
    if missing or not summary["accuracy"]:
        what = f"has no {missing[0]!r}" if missing else "has nothing held out to report on"
        raise UserError(f"{out / 'summary.json'}: {what}; let `fledge reward` write it again")
    pairs = [row for _, row in read_jsonl(out / "pairs.jsonl")]
    metrics = [row for _, row in read_jsonl(out / "metrics.jsonl")]
    with chart_style():
        charts = _charts(summary, pairs, metrics)
    started = out / "environment.json"
    config = out / "config.toml"
    context = {
        "summary": summary,
        "headline": _headline(summary),
        "charts": charts,
        "worst": _worst(pairs, summary["offset"]),
        "simulated": sum(bool(row.get("simulated")) for row in pairs),
        "environment": read_json(started) if started.exists() else None,
        "config": config.read_text(encoding="utf-8") if config.exists() else None,
    }
    write_text(out / "report.html", environment().get_template("reward.html").render(context))
    return out / "report.html"


def _charts(summary: Mapping[str, Any], pairs: list[Row], metrics: list[Row]) -> list[Chart]:
    calibration, length = summary["calibration"], summary["length"]
    note = "nats per comparison, where ln 2 = 0.69 is guessing; dots: held-out prompts"
    charts = [
        calibration_chart(calibration["bins"], calibration["expected_error"]),
        reward_chart(pairs, summary["offset"]),
        length_chart(pairs, summary["offset"], length["correlation"]),
        loss_chart("reward", metrics, "Loss", note, "lower left"),
    ]
    return [chart for chart in charts if chart is not None]


def _headline(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The model's accuracy and what it is to be seen beside; a figure that was not made is left out."""
    length = summary["length"]
    rows = [
        ("the reward model", summary["accuracy"], "pairs that it judges as the labeler did"),
        (
            "labelers among themselves",
            summary.get("labelers_agree"),
            "two labelers of the same pair: about the most a model can reach",
        ),
        (
            "control: no prompt",
            summary.get("blind"),
            "the same training on the answers alone: what can be told without reading the question",
        ),
        (
            "control: shuffled labels",
            summary.get("shuffled"),
            "labels that say nothing: it should be near 50%",
        ),
        (
            f"rule: the {'longer' if length['longer_better']['rate'] >= 0.5 else 'shorter'} one",
            length["rule"] if length["rule"]["n"] else None,
            "knows nothing but which of both is longer; pairs of equal length are left out",
        ),
        (
            "the reward model, length held even",
            length["controlled"],
            "mean of its accuracies where the better one is longer and where it is shorter",
        ),
    ]
    return [{"name": name, "share": share, "note": note} for name, share, note in rows if share]


def _worst(pairs: list[Row], offset: float) -> list[dict[str, Any]]:
    """The pairs where the model is most sure of the other one."""
    ordered = sorted(pairs, key=lambda row: row["reward_better"] - row["reward_worse"])
    wrong = [row for row in ordered if row["reward_better"] <= row["reward_worse"]][:WORST_PAIRS]
    return [
        {
            **row,
            "reward_better": row["reward_better"] + offset,
            "reward_worse": row["reward_worse"] + offset,
            "sure": 1 / (1 + math.exp(row["reward_better"] - row["reward_worse"])),
        }
        for row in wrong
    ]
