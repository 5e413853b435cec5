"""The charts of a reward model's examination."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import PercentFormatter

from fledge.report.charts import COLOURS, LINE_POINTS, Chart, Row, new_figure, thinned, to_svg
from fledge.report.page import percent


def calibration_chart(bins: Sequence[Row], error: float) -> Chart:
    """How often the model's favourite is the labeler's, by how sure the model is."""
    figure = new_figure(250)
    axes = figure.add_subplot()
    axes.plot([0.5, 1], [0.5, 1], color=COLOURS["muted"], linewidth=1, linestyle="--", label="calibrated")
    x, y = [b["confidence"] for b in bins], [b["rate"] for b in bins]
    below = [max(0.0, b["rate"] - b["low"]) for b in bins]
    above = [max(0.0, b["high"] - b["rate"]) for b in bins]
    axes.errorbar(
        x, y, yerr=[below, above], color=COLOURS["model-3"], marker="o", markersize=6, linewidth=1.5,
        elinewidth=1.1, capsize=3, label="observed, 95% interval",
    )  # fmt: skip
    axes.set_xlim(0.48, 1.02)
    axes.set_ylim(min(0.45, *(b["low"] - 0.03 for b in bins)), 1.02)
    axes.set_xlabel("the model's probability of its favourite")
    axes.set_ylabel("labelers agree")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(loc="upper left")
    points = "; ".join(f"{percent(b['confidence'])} sure, {percent(b['rate'])} right" for b in bins)
    note = f"expected calibration error {percent(error)}: points below the line are too sure of themselves"
    return Chart("Calibration", note, to_svg(figure, "calibration", f"Line chart: {points}."))


def reward_chart(rows: Sequence[Row], offset: float) -> Chart:
    """How the rewards of the better and of the worse completions are spread."""
    better = [row["reward_better"] + offset for row in rows]
    worse = [row["reward_worse"] + offset for row in rows]
    edges = np.histogram_bin_edges(better + worse, bins=min(30, max(5, len(rows) // 4)))
    figure = new_figure(250)
    axes = figure.add_subplot()
    for values, colour, name in ((worse, "line-2", "judged worse"), (better, "line-1", "judged better")):
        axes.hist(values, bins=list(edges), color=COLOURS[colour], alpha=0.35, histtype="stepfilled")
        axes.hist(values, bins=list(edges), color=COLOURS[colour], linewidth=1.5, histtype="step", label=name)
    axes.set_xlabel("reward, the reference's mean at 0")
    axes.set_ylabel("completions")
    axes.set_ylim(top=1.25 * axes.get_ylim()[1])
    axes.legend(loc="upper left")
    said = (
        f"Histogram: mean reward {np.mean(better):.2f} of better, {np.mean(worse):.2f} of worse completions."
    )
    return Chart("Rewards", "of both completions of each held-out pair", to_svg(figure, "rewards", said))


def length_chart(rows: Sequence[Row], offset: float, correlation: float | None) -> Chart:
    """Reward against length of the different completions."""
    points = {
        (row["prompt"], row[side]): (row[f"tokens_{side}"], row[f"reward_{side}"] + offset)
        for row in rows
        for side in ("better", "worse")
    }
    tokens, rewards = (list(values) for values in zip(*sorted(points.values()), strict=True))
    figure = new_figure(250)
    axes = figure.add_subplot()
    axes.scatter(
        thinned(tokens, LINE_POINTS), thinned(rewards, LINE_POINTS), s=11, color=COLOURS["line-1"], alpha=0.5,
        linewidths=0,
    )  # fmt: skip
    axes.set_xlabel("tokens of the completion")
    axes.set_ylabel("reward")
    found = "not defined" if correlation is None else f"{correlation:+.2f}"
    said = f"Scatter plot of {len(points)} completions: rank correlation {found}."
    note = f"each point a completion; Spearman's rank correlation {found}"
    return Chart("Reward and length", note, to_svg(figure, "length", said))
