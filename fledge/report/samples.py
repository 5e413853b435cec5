"""The chart of what several answers are worth: accuracy against the tokens that were spent on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.ticker import NullLocator, PercentFormatter

from fledge.report.charts import COLOURS, MARKERS, Chart, new_figure, to_svg
from fledge.report.page import percent, printable

# How one of several answers is chosen, in the words of tables and charts.
WAYS = {
    "verifier": "any right (pass@k)",
    "vote": "majority vote",
    "reward_model": "best by reward model",
}


def samples_chart(number: int, name: str, figures: Mapping[str, Any]) -> Chart:
    """A line with its 95% band for each way to choose, greedy decoding as a point with a bar; `number` tells
    the charts of a page apart."""
    figure = new_figure(280)
    axes = figure.add_subplot()
    said = []
    for place, (way, points) in enumerate(figures["curves"].items()):
        colour = COLOURS[f"line-{place + 1}"]
        x, y = [point["tokens"] for point in points], [point["mean"] for point in points]
        low, high = [point["low"] for point in points], [point["high"] for point in points]
        axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
        axes.plot(x, y, color=colour, marker=MARKERS[place], markersize=5, linewidth=1.6, label=WAYS[way])
        said.append(f"{WAYS[way]} from {percent(y[0])} to {percent(y[-1])}")
    greedy = figures["greedy"]
    spread = [[greedy["rate"] - greedy["low"]], [greedy["high"] - greedy["rate"]]]
    axes.errorbar(
        [greedy["tokens"]], [greedy["rate"]], yerr=spread, color=COLOURS["ink"], marker="x", markersize=7,
        linestyle="none", capsize=3, elinewidth=1.0, label="greedy",
    )  # fmt: skip
    axes.set_xscale("log", base=2)
    points = next(iter(figures["curves"].values()))
    axes.set_xticks([p["tokens"] for p in points], [_tick(p) for p in points])
    axes.xaxis.set_minor_locator(NullLocator())
    top = max(greedy["high"], *(p["high"] for curve in figures["curves"].values() for p in curve))
    axes.set_ylim(0, min(1.0, top * 1.1) + 0.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("tokens a problem (answers)")
    axes.set_ylabel("problems right")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2)
    last = points[-1]["k"]
    description = f"Line chart, 1 to {last} answers: {'; '.join(said)}; greedy {percent(greedy['rate'])}."
    note = f"{figures['problems']:,} problems, up to {last} answers at temperature {figures['temperature']:g}"
    return Chart(printable(name), note, to_svg(figure, f"samples-{number}", description))


def _tick(point: Mapping[str, Any]) -> str:
    return f"{point['tokens']:,.0f}\n({point['k']})"
