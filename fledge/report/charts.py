"""The charts of a report: SVG in the page's own colours and fonts, the same bytes for the same figures."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from fledge.report.page import printable

Row = dict[str, Any]

LINE_POINTS = 600

# Charts are drawn in these colours; in the page each becomes the CSS variable of that name, which
# has another value in dark mode.
COLOURS = {
    "ink": "#1d2229",
    "muted": "#5d6773",
    "rule": "#dde1e6",
    "model-1": "#a9b4c2",
    "model-2": "#6d8fb8",
    "model-3": "#17548f",
    "line-1": "#1768ac",
    "line-2": "#c4500b",
    "line-3": "#0a7f62",
    "line-4": "#8a4fa3",
    "line-5": "#8c6d1f",
}
MARKERS = ("o", "s", "^", "D", "v")
CHART_WIDTH = 400  # user units, close to pixels: legible as wide as a phone and in two columns

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "fledge",  # the same figures give the same bytes
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.size": 11,
    "text.color": COLOURS["ink"],
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.labelsize": 10.5,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["rule"],
    "grid.linewidth": 0.8,
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "lines.solid_joinstyle": "round",
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Measure:
    """A row of the headline table: a share for each model, and the control it is to be compared with."""

    key: str
    shares: dict[str, Row]
    control_name: str | None = None
    control: Row | None = None


@dataclass(frozen=True)
class Chart:
    """A drawing with what stands above and below it."""

    title: str
    note: str
    svg: Markup


@contextmanager
def chart_style() -> Iterator[None]:
    """Our style, whatever a user's matplotlibrc says; theirs again afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def new_figure(height: float) -> Figure:
    """An empty figure as wide as all charts; the height in user units."""
    return Figure(figsize=(CHART_WIDTH / 72, height / 72))


def to_svg(figure: Figure, name: str, description: str) -> Markup:
    """The figure as an `<svg>` element with colours as variables and ids that are unique to `name`."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with warnings.catch_warnings():  # the page's fonts draw the text, not matplotlib's
        warnings.filterwarnings("ignore", r"Glyph .* missing from font", UserWarning)
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    view_box = re.search(r'viewBox="[^"]*"', text)
    assert view_box is not None
    text = text[text.index(">", text.index("<svg")) + 1 :]
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    variables = {colour: f"var(--{variable})" for variable, colour in COLOURS.items()}
    text = re.sub(r"#[0-9a-f]{6}\b", lambda match: variables.get(match[0], match[0]), text)
    text = re.sub(r"\s*\n\s*", "\n", text).strip()
    # The description is escaped; the rest is matplotlib's, which escapes what it writes as text.
    return Markup('<svg {} role="img" aria-label="{}">{}').format(
        Markup(view_box[0]), description, Markup(text)
    )


def _column(rows: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    """Tokens and values of the rows that have this metric."""
    found = [row for row in rows if name in row]
    return [float(row["tokens"]) for row in found], [float(row[name]) for row in found]


def thinned(values: Sequence[float], points: int = LINE_POINTS) -> list[float]:
    """At most `points` of the values, evenly spread, with the first and the last."""
    if len(values) <= points:
        return list(values)
    return [values[i * (len(values) - 1) // (points - 1)] for i in range(points)]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Means over `window` neighbours around each value, over fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    centres = np.arange(len(values))
    low, high = np.maximum(centres - window // 2, 0), np.minimum(centres + window // 2 + 1, len(values))
    return [float(value) for value in (sums[high] - sums[low]) / (high - low)]


def _tokens_axis(axes: Axes) -> None:
    axes.set_xlabel("tokens")
    axes.locator_params(axis="x", nbins=6)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.02)


def loss_chart(
    name: str,
    rows: Sequence[Row],
    title: str,
    note: str,
    legend: Literal["upper right", "lower left"] = "upper right",
) -> Chart | None:
    """The loss of every step and its running mean; None if no loss was logged."""
    tokens, losses = _column(rows, "loss")
    if not losses:
        return None
    mean = running_mean(losses, max(3, len(losses) // 40))
    figure = new_figure(235)
    axes = figure.add_subplot()
    x = thinned(tokens)
    axes.plot(x, thinned(losses), color=COLOURS["model-1"], linewidth=0.8, label="each step")
    axes.plot(x, thinned(mean), color=COLOURS["model-3"], linewidth=1.8, label="running mean")
    said = f"Line chart: loss from {mean[0]:.2f} to {mean[-1]:.2f} nats over {tokens[-1]:,.0f} tokens."
    # Pretraining validates in bits per byte, another unit: it has a chart of its own.
    if not any(key.startswith("validation/") for row in rows for key in row):
        at, held = _column(rows, "validation")
        if held:
            axes.plot(at, held, color=COLOURS["line-2"], marker="o", markersize=5, lw=1.2, label="held out")
            said += f" Held out: from {held[0]:.2f} to {held[-1]:.2f}."
    axes.set_ylim(bottom=0)
    axes.legend(loc=legend)
    _tokens_axis(axes)
    return Chart(title, note, to_svg(figure, f"loss-{name}", said))


def validation_chart(rows: Sequence[Row]) -> Chart | None:
    """A line for each source that was held out; None if there is none."""
    sources = list(dict.fromkeys(key for row in rows for key in row if key.startswith("validation/")))
    if not sources:
        return None
    figure = new_figure(235)
    axes = figure.add_subplot()
    said = []
    lines = [COLOURS[f"line-{number}"] for number in range(1, len(MARKERS) + 1)]
    for number, key in enumerate(sources):
        tokens, values = (thinned(column) for column in _column(rows, key))
        name, place = printable(key.removeprefix("validation/")), number % len(MARKERS)
        (line,) = axes.plot(tokens, values, color=lines[place], marker=MARKERS[place], markersize=4.5, lw=1.5)
        line.set_label(f"{name[:24]}, {values[-1]:.2f} at the end")
        said.append(f"{name} from {values[0]:.2f} to {values[-1]:.2f}")
    axes.set_ylim(bottom=0, top=1.35 * axes.get_ylim()[1])  # room for the legend
    axes.legend(loc="upper right")
    _tokens_axis(axes)
    svg = to_svg(figure, "validation", f"Line chart, bits per byte by source: {'; '.join(said)}.")
    return Chart("Pretraining: validation", "bits per byte of held-out documents, by source", svg)


def rate_chart(stages: Mapping[str, Sequence[Row]]) -> Chart | None:
    """The learning rates of the stages, one below the other; None if none was logged."""
    columns = {stage: _column(rows, "lr") for stage, rows in stages.items()}
    columns = {stage: column for stage, column in columns.items() if column[0]}
    if not columns:
        return None
    figure = new_figure(235)
    for number, (stage, (tokens, rates)) in enumerate(columns.items(), start=1):
        axes = figure.add_subplot(len(columns), 1, number)
        axes.plot(thinned(tokens), thinned(rates), color=COLOURS["model-3"], linewidth=1.5)
        axes.set_ylim(0, max(rates) * 1.12 or 1)
        axes.set_title(stage, loc="left", fontsize=10.5, color=COLOURS["muted"])
        axes.locator_params(axis="y", nbins=3)
        _tokens_axis(axes)
        if number < len(columns):
            axes.set_xlabel("")
    peaks = "; ".join(f"{stage} up to {max(rates):.3g}" for stage, (_, rates) in columns.items())
    svg = to_svg(figure, "learning-rate", f"Line chart, learning rate: {peaks}.")
    return Chart("Learning rate", "of the hidden matrices; the other rate has the same shape", svg)
