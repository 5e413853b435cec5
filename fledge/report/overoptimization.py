"""The over-optimisation plot: a reward model's score and the gold score against the root of the KL."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fledge.files import write_text
from fledge.report.charts import COLOURS, Chart, Row, chart_style, new_figure, to_svg
from fledge.report.page import environment

METHODS = {"best_of_n": ("best of n", "line-1", "o"), "ppo": ("PPO", "line-2", "s")}
TITLES = {
    "score": (
        "Reward model\N{RIGHT SINGLE QUOTATION MARK}s score",
        "in nats; in PPO an answer that was cut off counts -5; a line for each seed",
    ),
    "gold": (
        "Gold score",
        "right 1, refused 0, wrong or invented \N{MINUS SIGN}1; rings: the highest of each line",
    ),
}


def overoptimization_chart(found: Sequence[Mapping[str, Any]], key: str) -> Chart:
    """`score` or `gold` of every seed's curves, `{"best_of_n": [{"kl", "score", "gold"}], "ppo": [...]}`, in
    the caller's chart style."""
    title, note = TITLES[key]
    figure = new_figure(290)
    axes = figure.add_subplot()
    said = []
    for method, (name, colour, marker) in METHODS.items():
        for number, trial in enumerate(found):
            points: list[Row] = sorted(trial[method], key=lambda point: point["kl"])
            x, y = [math.sqrt(point["kl"]) for point in points], [point[key] for point in points]
            axes.plot(x, y, color=COLOURS[colour], marker=marker, markersize=3.5, linewidth=1.1,
                      label=name if number == 0 else None)  # fmt: skip
            top = max(points, key=lambda point: point["gold"])
            if key == "gold":
                ring: dict[str, Any] = {
                    "color": COLOURS["ink"],
                    "marker": "o",
                    "markersize": 9,
                    "fillstyle": "none",
                }
                axes.plot([math.sqrt(top["kl"])], [top["gold"]], linestyle="none", **ring)
            said.append(
                f"{name}, seed {trial['seed']}: from {y[0]:.2f} to {points[-1][key]:.2f} at a KL of "
                f"{points[-1]['kl']:.1f} nats, gold highest at {top['kl']:.1f}"
            )
    axes.set_xlabel("√KL to the assistant (√nats)")
    axes.set_ylabel("mean score" if key == "score" else "mean gold score")
    axes.legend(loc="best")
    svg = to_svg(figure, f"overoptimization-{key}", f"Line chart, {title}: {'; '.join(said)}.")
    return Chart(title, note, svg)


def write_overoptimization_report(
    out: Path, found: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> Path:
    """Write `report.html` with both charts into `out`; returns its path."""
    with chart_style():
        charts = [overoptimization_chart(found, key) for key in ("score", "gold")]
    page = (
        environment()
        .get_template("overoptimization.html")
        .render(charts=charts, found=found, settings=settings)
    )
    write_text(out / "report.html", page)
    return out / "report.html"
