"""The part of the demo's report on preferences, the reward model, best-of-n and the aligned model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fledge.report.charts import COLOURS, Chart, Row, loss_chart, new_figure, to_svg
from fledge.report.page import percent

# What a summary with an alignment cannot do without, as paths into it.
REQUIRED = (
    *(f"alignment.{part}" for part in ("method", "preferences", "reward", "training.seconds")),
    *(f"alignment.best_of.{key}" for key in ("curve", "peak", "peak_share")),
    *(f"alignment.best_of.{key}" for key in ("gain_to_peak", "last_minus_peak")),
    *(f"alignment.comparison.{key}" for key in ("invented_answered", "test_wrongly_refused", "test_right")),
    *(f"alignment.comparison.{key}" for key in ("kl", "aligned.reward.mean", "aligned.gold.mean")),
    "alignment.comparison.separation",
)
MEASURES = {
    "invented_answered": ("Invented names, answered", "lower is better: there is nothing to know"),
    "test_wrongly_refused": ("Test names, wrongly refused", "lower is better: they exist"),
    "test_right": ("Test names, answered right", "higher is better"),
}
UNKNOWN = (
    "\N{LEFT DOUBLE QUOTATION MARK}I don\N{RIGHT SINGLE QUOTATION MARK}t know\N{RIGHT DOUBLE QUOTATION MARK}"
)
KINDS = {"unknown": UNKNOWN}


def alignment_section(alignment: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """What the template shows of `summary["alignment"]`. Charts are drawn in the style of the caller."""
    best_of, comparison = alignment["best_of"], alignment["comparison"]
    method = alignment["method"].upper()
    charts = [
        _curve(best_of["curve"], comparison, method, "reward", "Best of n: reward"),
        _curve(best_of["curve"], comparison, method, "gold", "Best of n: gold score"),
    ]
    times = {"answers and judgements": alignment["preferences"], "reward model": alignment["reward"]}
    times |= {"best of n": best_of, method: alignment["training"], "comparison": comparison}
    return {
        "method": method,
        "preferences": alignment["preferences"],
        "reward": alignment["reward"],
        "kinds": _kinds(alignment["reward"]),
        "misjudged": misjudged(_kinds(alignment["reward"])),
        "link": "reward/report.html" if (out / "reward/report.html").exists() else None,
        "charts": charts,
        "turn": " ".join([turn_sentence(best_of), *_by_set(best_of)]),
        "best_of": best_of,
        "changes": [_change(name, comparison[name]) for name in MEASURES],
        "apart": apart_sentence(comparison["separation"], method),
        "kl": comparison["kl"],
        "kl_said": _spread(comparison["kl"], "{:.2f}".format),
        "aligned": comparison["aligned"],
        "seconds": {name: part["seconds"] for name, part in times.items() if "seconds" in part},
    }


def alignment_curves(method: str, reward: Sequence[Row], aligned: Sequence[Row]) -> list[Chart | None]:
    """The losses over pairs, from the metrics of both trainings."""
    note = "nats per comparison, where ln 2 = 0.69 is guessing; dots: held-out prompts"
    charts = [loss_chart("reward", reward, "Reward model: loss", note, "lower left")]
    if method == "dpo":  # that of PPO says nothing: its data change with the policy
        note = "nats per pair, where ln 2 = 0.69 is no preference"
        charts.append(loss_chart("dpo", aligned, "DPO: loss", note, "lower left"))
    return charts


def turn_sentence(best_of: Mapping[str, Any]) -> str:
    """Whether the gold score turns down while the reward rises, as far as its interval can tell."""
    peak, last = best_of["peak"], best_of["curve"][-1]["n"]
    gain, fall = best_of["gain_to_peak"], best_of["last_minus_peak"]
    more = f"{signed(gain['mean'])} against a single answer (95% interval {_spread(gain, signed)})"
    less = f"{signed(fall['mean'])} (95% interval {_spread(fall, signed)})"
    if peak == last:
        return f"The gold score does not turn down: it is highest for n = {last}, {more}."
    told = "The intervals allow for the peak having been picked as the highest of all."
    if fall["high"] < 0:
        return (
            f"The gold score turns down: from its highest at n = {peak} to n = {last} it changes by {less}. "
            + told
        )
    return (
        f"Whether the gold score turns down cannot be told from chance: it is highest for n = {peak} (in "
        f"{100 * best_of['peak_share']:.0f}% of the resamples too), {more}, and from there to n = {last} it "
        f"changes by {less}. {told}"
    )


def apart_sentence(separation: Mapping[str, Any], method: str) -> str:
    """Whether the aligned model tells real from invented names better, or only refuses otherwise."""
    difference = separation["difference"]
    told = (
        f"in standard deviations (d\N{PRIME}) the assistant keeps them {separation['before']:.2f} apart, the "
        f"model after {method} {separation['after']:.2f} (difference {signed(difference['mean'])}, 95% "
        f"interval {_spread(difference, signed)})"
    )
    if difference["low"] > 0:
        return f"It tells real from invented names better: {told}."
    if difference["high"] < 0:
        return f"It tells real from invented names worse: {told}."
    return (
        f"It does not clearly tell real from invented names better: {told}. What changes is how readily it "
        "refuses, which trades wrong refusals against invented answers."
    )


def _by_set(best_of: Mapping[str, Any]) -> list[str]:
    """What a single answer and the best of most are worth, for each set of questions."""
    names = {"eval_test": "test names", "eval_invented": "invented names"}
    ends = {name: (curve[0], curve[-1]) for name, curve in best_of.get("by_set", {}).items() if name in names}
    told = [
        f"for {names[name]} from {one['gold']:.2f} to {most['gold']:.2f}".replace("-", "\N{MINUS SIGN}")
        for name, (one, most) in ends.items()
    ]
    last = best_of["curve"][-1]["n"]
    return [f"From a single answer to the best of {last} it goes {', '.join(told)}."] if told else []


def signed(value: float) -> str:
    """`+0.12`, with a real minus sign."""
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def points(share: float) -> str:
    """A difference of shares in percentage points: `+12.3`."""
    return f"{100 * share:+.1f}".replace("-", "\N{MINUS SIGN}")


def _spread(mean: Mapping[str, float], said: Callable[[float], str]) -> str:
    return f"{said(mean['low'])} to {said(mean['high'])}"


def _change(name: str, found: Mapping[str, Any]) -> Row:
    title, wish = MEASURES[name]
    difference = found["difference"]
    return {
        "title": title,
        "wish": wish,
        "before": found["before"],
        "after": found["after"],
        "n": difference["n"],
        "difference": points(difference["mean"]),
        "interval": _spread(difference, points),
        "clear": difference["low"] > 0 or difference["high"] < 0,
    }


def _kinds(reward: Mapping[str, Any]) -> list[Row]:
    """The reward model's accuracy by kind of pair, the better kind first."""
    found = []
    for name, figures in (reward.get("by_kinds") or {}).items():
        better, _, worse = name.partition(" against ")
        said = f"{KINDS.get(better, better)} against {KINDS.get(worse, worse)}"
        found.append({"name": said, **figures["accuracy"]})
    return sorted(found, key=lambda row: -row["n"])


def misjudged(kinds: Sequence[Row]) -> list[str]:
    """The kinds of pairs that the reward model clearly judges the wrong way round, in words."""
    return [f"{row['name']} ({percent(row['rate'])})" for row in kinds if row["high"] < 0.5]


def _curve(curve: Sequence[Row], comparison: Mapping[str, Any], method: str, key: str, title: str) -> Chart:
    """Reward or gold score of the best of n against the root of its KL, with the aligned model as a point."""
    figure = new_figure(250)
    axes = figure.add_subplot()
    x, y = [math.sqrt(point["kl"]) for point in curve], [point[key] for point in curve]
    colour = COLOURS["line-1" if key == "reward" else "line-2"]
    if f"{key}_low" in curve[0]:
        bounds = [point[f"{key}_low"] for point in curve], [point[f"{key}_high"] for point in curve]
        axes.fill_between(x, *bounds, color=colour, alpha=0.15, linewidth=0)
    axes.plot(x, y, color=colour, marker="o", markersize=5.5, linewidth=1.5, label="best of n")
    for point, place, height in zip(curve, x, y, strict=True):
        axes.annotate(f"n = {point['n']}", (place, height), (0, 9), textcoords="offset points", ha="center",
                      fontsize=9.5, color=COLOURS["muted"])  # fmt: skip
    root, value = math.sqrt(max(0.0, comparison["kl"]["mean"])), comparison["aligned"][key]
    spread = [[max(0.0, value["mean"] - value["low"])], [max(0.0, value["high"] - value["mean"])]]
    axes.errorbar([root], [value["mean"]], yerr=spread, color=COLOURS["line-3"], marker="D", markersize=6.5,
                  linestyle="none", capsize=3, elinewidth=1.1, label=method)  # fmt: skip
    axes.margins(x=0.09, y=0.22)
    axes.set_xlabel("√KL to the assistant (√nats)")
    axes.set_ylabel("mean reward" if key == "reward" else "mean gold score")
    axes.legend(loc="best")
    notes = {
        "reward": "of the reward model, in nats; 0: the mean of the best answers it learned from",
        "gold": f"right 1, {UNKNOWN} 0, wrong or invented \N{MINUS SIGN}1; band and bar: 95% intervals",
    }
    told = "; ".join(f"n = {point['n']}: {point[key]:.2f}" for point in curve)
    said = f"Line chart, {title}: {told}. {method}: {value['mean']:.2f} at a KL of {root**2:.2f} nats."
    return Chart(title, notes[key], to_svg(figure, f"best-of-{key}", said))
