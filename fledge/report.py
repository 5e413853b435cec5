"""The demo's report: one self-contained HTML page, made from nothing but the files of its runs."""

from __future__ import annotations

import io
import re
import shlex
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from fledge.errors import UserError
from fledge.files import read_json, read_jsonl, write_text

Row = dict[str, Any]

RIGHT_F1 = 0.8
QUESTIONS_SHOWN = {"eval_seen": 8, "eval_test": 8, "eval_invented": 4}
LINE_POINTS = 600
MODELS = {
    "base-plain": "base model, asked plainly",
    "base-few-shot": "base model, few-shot prompt",
    "sft": "assistant (SFT)",
}
SHARES = ("seen", "test", "invented_refused", "test_wrongly_refused")
# What the report cannot do without, as paths into summary.json.
REQUIRED = (
    *("parameters", "facts", "seconds", "python", "corpus_fingerprint", "controls"),
    *(f"{stage}.{key}" for stage in ("pretrain", "sft") for key in ("steps", "tokens", "seconds")),
    *(f"{stage}.tokens_per_second" for stage in ("pretrain", "sft")),
    *(f"models.{model}.{share}.{key}" for model in MODELS for share in SHARES for key in ("rate", "n")),
)


def write_demo_report(out: Path) -> Path:
    """Write `report.html` into the directory of a finished `fledge demo`; returns its path.

    Raises UserError if `out/summary.json` is missing or lacks a figure, or if a file is broken. Where
    any other file is missing, its section is left out.
    """
    summary = read_json(out / "summary.json")
    _require(summary, out / "summary.json")
    with _chart_style():
        charts = {"shares": _share_charts(_headline(summary)), "curves": _curves(out)}
    context = {
        **charts,
        "summary": summary,
        "assistant": summary["models"]["sft"],
        "models": MODELS,
        "headline": _headline(summary),
        "chat": f"fledge chat --model {shlex.quote(str(out / 'sft/model'))}",
        "bits": _bits(summary),
        "answers": _answers(out),
        "samples": _samples(out),
        "manifest": _optional_json(out / "corpus/manifest.json"),
        "environment": _optional_json(out / "base/environment.json"),
        "evaluation_seconds": _evaluation_seconds(out),
        "configs": _configs(out),
    }
    page = _environment().get_template("report.html").render(context)
    write_text(out / "report.html", page)
    return out / "report.html"


# --- reading --------------------------------------------------------------------------------------


def _require(summary: Any, path: Path) -> None:
    for dotted in REQUIRED:
        value = summary
        for key in dotted.split("."):
            if not isinstance(value, dict) or key not in value:
                raise UserError(f"{path}: has no {dotted!r}; let `fledge demo` write it again")
            value = value[key]


def _optional_json(path: Path) -> Any:
    return read_json(path) if path.exists() else None


def _optional_rows(path: Path, *fields: str) -> list[Row] | None:
    """The rows of a JSONL file, each with these fields; None if there is no such file."""
    if not path.exists():
        return None
    rows = []
    for number, row in read_jsonl(path):
        for name in fields:
            if name not in row:
                raise UserError(f"{path}:{number}: the line has no field {name!r}; let the stage rewrite it")
        rows.append(row)
    return rows


def _evaluation_seconds(out: Path) -> float | None:
    found = [_optional_json(out / "evaluate" / name / "summary.json") for name in MODELS]
    seconds = [each["seconds"] for each in found if each and "seconds" in each]
    return sum(seconds) if len(seconds) == len(found) else None


def _configs(out: Path) -> dict[str, str]:
    """The settings of each stage as they were saved, by the stage's name."""
    stages = {"pretrain": "base", "sft": "sft"}
    stages |= {f"evaluate, {title}": f"evaluate/{name}" for name, title in MODELS.items()}
    paths = {stage: out / folder / "config.toml" for stage, folder in stages.items()}
    return {stage: path.read_text(encoding="utf-8") for stage, path in paths.items() if path.exists()}


# --- tables ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Measure:
    """A row of the headline table: a share for each model, and the control it is to be compared with."""

    key: str
    shares: dict[str, Row]
    control_name: str | None = None
    control: Row | None = None


def _headline(summary: Mapping[str, Any]) -> list[_Measure]:
    controls = {
        "test": ("nearest name", "nearest_name_test"),
        "invented_refused": ("spelling alone", "spelling_refuses_invented"),
        "test_wrongly_refused": ("spelling alone", "spelling_wrongly_refuses_test"),
    }
    measures = []
    for key in SHARES:
        name, field = controls.get(key, (None, ""))
        control = summary["controls"].get(field)
        if isinstance(control, int | float):  # a share without its counts
            control = {"rate": control}
        shares = {model: summary["models"][model][key] for model in MODELS}
        measures.append(_Measure(key, shares, name if control else None, control))
    return measures


def _bits(summary: Mapping[str, Any]) -> list[Row]:
    base, sft = (summary["models"][name].get("bits_per_byte") or {} for name in ("base-plain", "sft"))
    return [{"source": name, "base": base[name], "sft": sft[name]} for name in base if name in sft]


def _answers(out: Path) -> dict[str, list[Row]] | None:
    """Some questions of each set, evenly chosen, with every model's answer and what it is worth."""
    fields = ("set", "question", "gold", "answer", "f1", "refused")
    tables: dict[str, dict[tuple[str, str], Row]] = {}
    for model in MODELS:
        rows = _optional_rows(out / "evaluate" / model / "answers.jsonl", *fields)
        if not rows:
            return None
        tables[model] = {(row["set"], row["question"]): row for row in rows}
    chosen = {}
    for name, wanted in QUESTIONS_SHOWN.items():
        asked = [key for key in tables["sft"] if key[0] == name and all(key in t for t in tables.values())]
        count = min(wanted, len(asked))
        keys = [asked[(2 * i + 1) * len(asked) // (2 * count)] for i in range(count)]
        chosen[name] = [
            {
                "question": key[1],
                "gold": tables["sft"][key]["gold"],
                "answers": [
                    {"model": title, "text": tables[model][key]["answer"], "mark": _mark(tables[model][key])}
                    for model, title in MODELS.items()
                ],
            }
            for key in keys
        ]
    return chosen if any(chosen.values()) else None


def _mark(row: Row) -> tuple[str, str, str]:
    """Class, symbol and words for what an answer is worth."""
    if row["gold"] is None:
        return ("good", "✓", "refused, as it should") if row["refused"] else ("bad", "✗", "made up")
    if row["f1"] >= RIGHT_F1:
        return "good", "✓", "right"
    return ("open", "○", "refused") if row["refused"] else ("bad", "✗", "wrong")


def _samples(out: Path) -> list[Row]:
    """For each prompt what the base model wrote first and last while it trained."""
    prompts: dict[str, list[Row]] = {}
    for row in _optional_rows(out / "base/samples.jsonl", "step", "prompt", "text") or []:
        prompts.setdefault(row["prompt"], []).append(row)
    return [
        {"prompt": prompt, "written": [rows[0], rows[-1]] if len(rows) > 1 else rows}
        for prompt, rows in prompts.items()
    ]


# --- charts ---------------------------------------------------------------------------------------

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
class _Chart:
    """A drawing with what stands above and below it."""

    title: str
    note: str
    svg: Markup


@contextmanager
def _chart_style() -> Iterator[None]:
    """Our style, whatever a user's matplotlibrc says; theirs again afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def _figure(height: float) -> Figure:
    return Figure(figsize=(CHART_WIDTH / 72, height / 72))


def _svg(figure: Figure, name: str, description: str) -> Markup:
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


def _share_charts(headline: Sequence[_Measure]) -> dict[str, Markup]:
    return {measure.key: _share_chart(measure) for measure in headline}


def _share_chart(measure: _Measure) -> Markup:
    names = ["base, plainly", "base, few-shot", "assistant"]
    colours = [COLOURS["model-1"], COLOURS["model-2"], COLOURS["model-3"]]
    shares = list(measure.shares.values())
    if measure.control is not None:
        names.append(str(measure.control_name))
        colours.append("none")
        shares.append(measure.control)
    figure = _figure(132)
    axes = figure.add_subplot()
    places = range(len(shares))
    edges = [COLOURS["muted"] if colour == "none" else colour for colour in colours]
    axes.barh(places, [s["rate"] for s in shares], height=0.62, color=colours, edgecolor=edges, linewidth=0.9)
    for place, share in zip(places, shares, strict=True):
        low, high = (share[end] if end in share else share["rate"] for end in ("low", "high"))
        axes.plot([low, high], [place, place], color=COLOURS["ink"], linewidth=1.1, solid_capstyle="butt")
        for end in {low, high}:
            axes.plot([end, end], [place - 0.14, place + 0.14], color=COLOURS["ink"], linewidth=1.1)
        axes.text(max(high, share["rate"]) + 0.015, place, percent(share["rate"]), va="center", fontsize=10.5)
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
    axes.set_ylim(3.5, -0.5)
    axes.set_xlim(0, 1.16)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_bounds(0, 1)
    said = "; ".join(f"{name} {_spoken(share)}" for name, share in zip(names, shares, strict=True))
    return _svg(figure, f"share-{measure.key.replace('_', '-')}", f"Bar chart: {said}.")


def _spoken(share: Row) -> str:
    bounds = f" (95% interval {interval(share)})" if "low" in share else ""
    return percent(share["rate"]) + bounds


def _curves(out: Path) -> list[_Chart]:
    """Losses, validation and learning rates of the two training stages, as far as they were logged."""
    base, sft = (_optional_rows(out / run / "metrics.jsonl", "tokens") or [] for run in ("base", "sft"))
    charts: list[_Chart | None] = [
        _loss_chart("pretraining", base, "Pretraining: loss", "nats per token of the training text"),
        _validation_chart(base),
        _loss_chart(
            "sft", sft, "Fine-tuning: loss", "nats per token of the assistant; dots: held-out conversations"
        ),
        _rate_chart({"pretraining": base, "fine-tuning": sft}),
    ]
    return [chart for chart in charts if chart is not None]


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


def _loss_chart(name: str, rows: Sequence[Row], title: str, note: str) -> _Chart | None:
    tokens, losses = _column(rows, "loss")
    if not losses:
        return None
    mean = running_mean(losses, max(3, len(losses) // 40))
    figure = _figure(235)
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
    axes.legend(loc="upper right")
    _tokens_axis(axes)
    return _Chart(title, note, _svg(figure, f"loss-{name}", said))


def _validation_chart(rows: Sequence[Row]) -> _Chart | None:
    sources = list(dict.fromkeys(key for row in rows for key in row if key.startswith("validation/")))
    if not sources:
        return None
    figure = _figure(235)
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
    svg = _svg(figure, "validation", f"Line chart, bits per byte by source: {'; '.join(said)}.")
    return _Chart("Pretraining: validation", "bits per byte of held-out documents, by source", svg)


def _rate_chart(stages: Mapping[str, Sequence[Row]]) -> _Chart | None:
    columns = {stage: _column(rows, "lr") for stage, rows in stages.items()}
    columns = {stage: column for stage, column in columns.items() if column[0]}
    if not columns:
        return None
    figure = _figure(235)
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
    svg = _svg(figure, "learning-rate", f"Line chart, learning rate: {peaks}.")
    return _Chart("Learning rate", "of the hidden matrices; the other rate has the same shape", svg)


# --- the page -------------------------------------------------------------------------------------


def _environment() -> Environment:
    environment = Environment(
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
    environment.filters.update(filters)
    return environment


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
