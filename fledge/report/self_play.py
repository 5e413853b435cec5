"""Self-play from imitation and alone: how often a player loses and wins, by roll-outs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import PercentFormatter

from fledge.files import write_text
from fledge.report.charts import COLOURS, Chart, Row, chart_style, new_figure, to_svg
from fledge.report.page import environment, percent

STARTS = {
    "imitation": ("imitation, then self-play", "line-1", "o"),
    "alone": ("self-play alone", "line-2", "s"),
}
TITLES = {
    "lost": (
        "Lines of play that are lost",
        "of all against four opponents, from both sides; a line for each seed",
    ),
    "p_won": ("Games won against random moves", "the most probable move each time; mean of both sides"),
}


def self_play_chart(found: Sequence[Mapping[str, Any]], key: str, levels: Mapping[str, float]) -> Chart:
    """`lost` or `p_won` of every seed's curves, `{"imitation": [{"rollouts", "lost", "p_won"}], "alone":
    [...]}`, with levels of other players as dashed lines, in the caller's chart style."""
    title, note = TITLES[key]
    figure = new_figure(290)
    axes = figure.add_subplot()
    said = []
    for start, (name, colour, marker) in STARTS.items():
        for number, trial in enumerate(found):
            points: list[Row] = trial[start]
            x, y = [point["rollouts"] for point in points], [point[key] for point in points]
            axes.plot(x, y, color=COLOURS[colour], marker=marker, markersize=3.5, linewidth=1.2,
                      label=name if number == 0 else None)  # fmt: skip
            said.append(f"{name}, seed {trial['seed']}: from {percent(y[0])} to {percent(y[-1])}")
    for name, level in levels.items():
        axes.axhline(level, color=COLOURS["muted"], linewidth=1, linestyle="--")
        axes.annotate(name, (0.02, level), (0, 3), xycoords=("axes fraction", "data"), ha="left",
                      textcoords="offset points", fontsize=9.5, color=COLOURS["muted"])  # fmt: skip
        said.append(f"{name} {percent(level)}")
    axes.set_ylim(bottom=0)
    if key == "p_won":
        axes.set_ylim(top=1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("roll-outs of self-play")
    axes.legend(loc="upper right" if key == "lost" else "lower right")
    svg = to_svg(figure, f"self-play-{key.replace('_', '-')}", f"Line chart, {title}: {'; '.join(said)}.")
    return Chart(title, note, svg)


def write_self_play_report(out: Path, result: Mapping[str, Any]) -> Path:
    """Write `report.html` with both charts and a table of the last figures into `out`; returns its path."""
    trials = result["trials"]
    with chart_style():
        charts = [self_play_chart(trials, key, result["levels"].get(key, {})) for key in TITLES]
    rows = [
        {"start": STARTS[start][0], "seed": trial["seed"], **trial["players"][start]}
        for start in STARTS
        for trial in trials
    ]
    context = {"charts": charts, "rows": rows, "result": result}
    write_text(out / "report.html", environment().get_template("self_play.html").render(context))
    return out / "report.html"
