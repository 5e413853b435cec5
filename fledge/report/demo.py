"""The demo's report: one self-contained HTML page, made from nothing but the files of its runs."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fledge.errors import UserError
from fledge.files import read_json, read_jsonl, write_text
from fledge.report import alignment
from fledge.report.charts import Chart, Measure, Row, chart_style, loss_chart, rate_chart, validation_chart
from fledge.report.page import environment
from fledge.report.shares import share_bars

RIGHT_F1 = 0.8
QUESTIONS_SHOWN = {"eval_seen": 8, "eval_test": 8, "eval_invented": 4}
MODELS = {
    "base-plain": "base model, asked plainly",
    "base-few-shot": "base model, few-shot prompt",
    "sft": "assistant (SFT)",
}
SHORT = {"base-plain": "base, plainly", "base-few-shot": "base, few-shot", "sft": "assistant"}
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
    _require(summary, out / "summary.json", REQUIRED)
    if "alignment" in summary:
        aligned = tuple(f"models.aligned.{share}.{key}" for share in SHARES for key in ("rate", "n"))
        _require(summary, out / "summary.json", (*alignment.REQUIRED, *aligned))
    headline = _headline(summary)
    models = _models(summary)
    final = "aligned" if "aligned" in models else "sft"
    section = None
    with chart_style():
        short = SHORT if final == "sft" else {**SHORT, "sft": "SFT", "aligned": "SFT, " + _method(summary)}
        shares = {m.key: share_bars(m, {model: short[model] for model in models}) for m in headline}
        curves = _curves(out, summary.get("alignment"))
        if final == "aligned":
            section = alignment.alignment_section(summary["alignment"], out)
    context = {
        "shares": shares,
        "curves": curves,
        "alignment": section,
        "summary": summary,
        "assistant": summary["models"][final],
        "final": final,
        "models": models,
        "shown": _shown(models),
        "headline": headline,
        "chat": f"fledge chat --model {shlex.quote(str(out / _folder(final, summary) / 'model'))}",
        "serve": "fledge serve --model "
        + " ".join(shlex.quote(f"{folder}={out / folder / 'model'}") for folder in _folders(models, summary)),
        "bits": _bits(summary),
        "answers": _answers(out, summary, _shown(models)),
        "samples": _samples(out),
        "manifest": _optional_json(out / "corpus/manifest.json"),
        "environment": _optional_json(out / "base/environment.json"),
        "evaluation_seconds": _evaluation_seconds(out, summary),
        "configs": _configs(out, summary),
    }
    page = environment().get_template("report.html").render(context)
    write_text(out / "report.html", page)
    return out / "report.html"


def _method(summary: Mapping[str, Any]) -> str:
    return str(summary["alignment"]["method"]).upper()


def _folder(model: str, summary: Mapping[str, Any]) -> str:
    """The directory of a model or its evaluation: an aligned one's is called by its method."""
    return str(summary["alignment"]["method"]) if model == "aligned" else model


def _folders(models: Iterable[str], summary: Mapping[str, Any]) -> list[str]:
    """The directories of the models, each once: the base model was asked in several ways."""
    return list(dict.fromkeys(_folder(model.partition("-")[0], summary) for model in models))


def _models(summary: Mapping[str, Any]) -> dict[str, str]:
    """The models that were evaluated, with their titles; the aligned one if there is one."""
    aligned = {"aligned": f"assistant after {_method(summary)}"} if "alignment" in summary else {}
    return {**MODELS, **aligned}


def _shown(models: Mapping[str, str]) -> dict[str, str]:
    """The three models whose answers stand side by side."""
    left_out = "base-few-shot" if "aligned" in models else "aligned"
    return {name: title for name, title in models.items() if name != left_out}


def _require(summary: Any, path: Path, required: tuple[str, ...]) -> None:
    for dotted in required:
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


def _evaluation_seconds(out: Path, summary: Mapping[str, Any]) -> float | None:
    folders = [out / "evaluate" / _folder(name, summary) for name in _models(summary)]
    found = [_optional_json(folder / "summary.json") for folder in folders]
    seconds = [each["seconds"] for each in found if each and "seconds" in each]
    return sum(seconds) if len(seconds) == len(found) else None


def _configs(out: Path, summary: Mapping[str, Any]) -> dict[str, str]:
    """The settings of each stage as they were saved, by the stage's name."""
    stages, models = {"pretrain": "base", "sft": "sft"}, _models(summary)
    if "aligned" in models:
        stages |= {"reward": "reward", _method(summary): _folder("aligned", summary)}
    stages |= {f"evaluate, {title}": f"evaluate/{_folder(name, summary)}" for name, title in models.items()}
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
        shares = {model: summary["models"][model][key] for model in _models(summary)}
        measures.append(Measure(key, shares, name if control else None, control))
    return measures


def _bits(summary: Mapping[str, Any]) -> list[Row]:
    models = [name for name in _models(summary) if name != "base-few-shot"]
    bits = [summary["models"][name].get("bits_per_byte") or {} for name in models]
    sources = [source for source in bits[0] if all(source in figures for figures in bits)]
    return [{"source": source, "bits": [figures[source] for figures in bits]} for source in sources]


def _answers(out: Path, summary: Mapping[str, Any], models: Mapping[str, str]) -> dict[str, list[Row]] | None:
    """Some questions of each set, evenly chosen, with every model's answer and what it is worth."""
    fields = ("set", "question", "gold", "answer", "f1", "refused")
    tables: dict[str, dict[tuple[str, str], Row]] = {}
    for model in models:
        rows = _optional_rows(out / "evaluate" / _folder(model, summary) / "answers.jsonl", *fields)
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
                    for model, title in models.items()
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


def _curves(out: Path, aligned: Mapping[str, Any] | None) -> list[Chart]:
    """Losses, validation and learning rates of the training stages, as far as they were logged."""
    runs = ("base", "sft", "reward", str(aligned["method"]) if aligned else "none")
    base, sft, *pairs = (_optional_rows(out / run / "metrics.jsonl", "tokens") or [] for run in runs)
    charts: list[Chart | None] = [
        loss_chart("pretraining", base, "Pretraining: loss", "nats per token of the training text"),
        validation_chart(base),
        loss_chart(
            "sft", sft, "Fine-tuning: loss", "nats per token of the assistant; dots: held-out conversations"
        ),
        rate_chart({"pretraining": base, "fine-tuning": sft}),
    ]
    if aligned:
        charts += alignment.alignment_curves(aligned["method"], *pairs)
    return [chart for chart in charts if chart is not None]
