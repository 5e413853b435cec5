"""The demo's report: one self-contained HTML page, made from nothing but the files of its runs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fledge.errors import UserError
from fledge.files import read_json, read_jsonl, write_text
from fledge.report.charts import (
    Chart,
    Measure,
    Row,
    chart_style,
    loss_chart,
    rate_chart,
    share_chart,
    validation_chart,
)
from fledge.report.page import environment

RIGHT_F1 = 0.8
QUESTIONS_SHOWN = {"eval_seen": 8, "eval_test": 8, "eval_invented": 4}
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
    headline = _headline(summary)
    with chart_style():
        charts = {"shares": {m.key: share_chart(m) for m in headline}, "curves": _curves(out)}
    context = {
        **charts,
        "summary": summary,
        "assistant": summary["models"]["sft"],
        "models": MODELS,
        "headline": headline,
        "chat": f"fledge chat --model {shlex.quote(str(out / 'sft/model'))}",
        "bits": _bits(summary),
        "answers": _answers(out),
        "samples": _samples(out),
        "manifest": _optional_json(out / "corpus/manifest.json"),
        "environment": _optional_json(out / "base/environment.json"),
        "evaluation_seconds": _evaluation_seconds(out),
        "configs": _configs(out),
    }
    page = environment().get_template("report.html").render(context)
    write_text(out / "report.html", page)
    return out / "report.html"


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


def _headline(summary: Mapping[str, Any]) -> list[Measure]:
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
        measures.append(Measure(key, shares, name if control else None, control))
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


def _curves(out: Path) -> list[Chart]:
    """Losses, validation and learning rates of the two training stages, as far as they were logged."""
    base, sft = (_optional_rows(out / run / "metrics.jsonl", "tokens") or [] for run in ("base", "sft"))
    charts: list[Chart | None] = [
        loss_chart("pretraining", base, "Pretraining: loss", "nats per token of the training text"),
        validation_chart(base),
        loss_chart(
            "sft", sft, "Fine-tuning: loss", "nats per token of the assistant; dots: held-out conversations"
        ),
        rate_chart({"pretraining": base, "fine-tuning": sft}),
    ]
    return [chart for chart in charts if chart is not None]
