"""A share for each model as a bar with its interval, and the control that it is to be seen beside."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup
from matplotlib.ticker import PercentFormatter

from fledge.report.charts import COLOURS, Measure, Row, new_figure, to_svg
from fledge.report.page import interval, percent


def share_bars(measure: Measure, names: Mapping[str, str]) -> Markup:
    """Bars with their intervals: a measure's shares by the models' short names, its control below them."""
    shown = [names[model] for model in measure.shares]
    shares = list(measure.shares.values())
    colours = [COLOURS[name] for name in ("model-1", "model-2", "model-3", "line-3")[: len(shares)]]
    if measure.control is not None:
        shown.append(str(measure.control_name))
        colours.append("none")
        shares.append(measure.control)
    places = range(len(shares))
    slots = len(names) + 1  # as high with and without a control, so that charts beside each other agree
    figure = new_figure(33 * slots)
    axes = figure.add_subplot()
    edges = [COLOURS["muted"] if colour == "none" else colour for colour in colours]
    axes.barh(places, [s["rate"] for s in shares], height=0.62, color=colours, edgecolor=edges, linewidth=0.9)
    for place, share in zip(places, shares, strict=True):
        low, high = (share[end] if end in share else share["rate"] for end in ("low", "high"))
        axes.plot([low, high], [place, place], color=COLOURS["ink"], linewidth=1.1, solid_capstyle="butt")
        for end in {low, high}:
            axes.plot([end, end], [place - 0.14, place + 0.14], color=COLOURS["ink"], linewidth=1.1)
        axes.text(max(high, share["rate"]) + 0.015, place, percent(share["rate"]), va="center", fontsize=10.5)
    axes.set_yticks(places, shown)
    axes.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
    axes.set_ylim(slots - 0.5, -0.5)
    axes.set_xlim(0, 1.16)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_bounds(0, 1)
    said = "; ".join(f"{name} {_spoken(share)}" for name, share in zip(shown, shares, strict=True))
    return to_svg(figure, f"share-{measure.key.replace('_', '-')}", f"Bar chart: {said}.")


def _spoken(share: Row) -> str:
    bounds = f" (95% interval {interval(share)})" if "low" in share else ""
    return percent(share["rate"]) + bounds
