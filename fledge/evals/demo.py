"""What the demo claims: the figures of all its stages in one place, and what spelling alone would give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fledge.data.fact_texts import answer
from fledge.evals.facts import NgramNameClassifier, Share, is_right, nearest_name_baseline
from fledge.files import read_json, read_jsonl

EVALUATED = ("base-plain", "base-few-shot", "sft")


def summarise(out: Path, align: str) -> dict[str, Any]:
    """The summary of the finished demo in `out`, but for its seconds; `align`: how it was aligned."""
    aligned = align != "none"
    base, sft = read_json(out / "base/summary.json"), read_json(out / "sft/summary.json")
    models: dict[str, Any] = {}
    for name in (*EVALUATED, *(["aligned"] if aligned else [])):
        folder = out / "evaluate" / (align if name == "aligned" else name)
        summary = read_json(folder / "summary.json")
        sets = summary["questions"]
        models[name] = {
            "bits_per_byte": summary["bits_per_byte"],
            "seen": sets["eval_seen"]["right"],
            "test": sets["eval_test"]["right"],
            "invented_refused": sets["eval_invented"]["refused"],
            "test_wrongly_refused": sets["eval_test"]["refused"],
            "seen_wrongly_refused": sets["eval_seen"]["refused"],
            "invented_as_asked": invented_as_asked(folder, out / "corpus"),
        }
    manifest = read_json(out / "corpus/manifest.json")
    return {
        "stage": "demo",
        "parameters": base["parameters"],
        "facts": manifest["facts"],
        "splits": manifest["splits"],
        "corpus_fingerprint": manifest["fingerprint"],
        "python": manifest["python"],
        "pretrain": base,
        "sft": sft,
        "models": models,
        "controls": _controls(out / "corpus"),
        **({"alignment": _alignment(out, align)} if aligned else {}),
    }


def invented_as_asked(folder: Path, corpus: Path) -> dict[str, Any]:
    """Invented names that are answered under their own name, as if there were such a thing; a wrong answer
    may also name another one, which whoever asked can see."""
    names = {row["question"]: row["name"] for _, row in read_jsonl(corpus / "eval_invented.jsonl")}
    answers = [row for _, row in read_jsonl(folder / "answers.jsonl") if row["set"] == "eval_invented"]
    own = [row["answer"].startswith(f"{names[row['question']]}:") and not row["refused"] for row in answers]
    return Share(sum(own), len(own)).as_dict()


def _alignment(out: Path, align: str) -> dict[str, Any]:
    reward = read_json(out / "reward/summary.json")
    shown = ("accuracy", "by_kinds", "length", "prompts", "held_out", "steps", "seconds", "offset")
    return {
        "method": align,
        "preferences": read_json(out / "preferences/summary.json"),
        "reward": {name: reward[name] for name in shown if name in reward},
        "best_of": read_json(out / "best_of.json"),
        "training": read_json(out / align / "summary.json"),
        "comparison": read_json(out / f"comparison_{align}.json"),
    }


def _controls(corpus: Path) -> dict[str, Any]:
    """What spelling alone gives: the nearest taught name's answer, and a classifier of invented names."""
    names = read_json(corpus / "names.json")
    taught = sorted(names["taught"].items())
    test = [row for _, row in read_jsonl(corpus / "eval_test.jsonl")]
    invented = [row["name"] for _, row in read_jsonl(corpus / "eval_invented.jsonl")]
    nearest = nearest_name_baseline(taught, [row["name"] for row in test])
    right = sum(is_right(answer(r["name"], a), r["answer"]) for a, r in zip(nearest, test, strict=True))
    spelling = NgramNameClassifier([name for name, _ in taught], names["invented"]["sft"])
    control = spelling.evaluate([row["name"] for row in test], invented)
    return {
        "nearest_name_test": Share(right, len(test)).as_dict(),
        "spelling_refuses_invented": control.refused_invented.as_dict(),
        "spelling_wrongly_refuses_test": control.wrongly_refused.as_dict(),
    }
