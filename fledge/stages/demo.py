"""`fledge demo`: from the text that every Python carries to an assistant that knows what it does not know."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fledge.data.stdlib import build_corpus
from fledge.errors import UserError
from fledge.evals.facts import NgramNameClassifier, Share, nearest_name_baseline, token_f1
from fledge.files import read_json, read_jsonl, write_json
from fledge.report import write_demo_report

# Shares of the pretraining mixture: facts to know, questions (as text and as chats) about some of them to be
# able to use them, and the rest of the text.
MIXTURE = {"facts": 0.80, "questions": 0.05, "chats": 0.10, "topics": 0.025, "source": 0.025}
# Small steps: a run of minutes is short of steps before it is short of tokens.
BATCH_TOKENS = 2048
QUESTION_SETS = ("eval_seen", "eval_test", "eval_invented")
VALIDATION_SHARE = 0.02


@dataclass(frozen=True, kw_only=True)
class Config:
    """Corpus, tokenizer, base model, assistant, evaluation and report, from Python's own documentation."""

    out: Path = Path("runs/demo")
    """Directory of everything the demo makes; the same command again goes on where it stopped."""
    facts: int = 1800
    """How many documented names the model is to learn."""
    params: str = "4.2M"
    """About how many parameters."""
    vocab_size: int = 4096
    """Size of the vocabulary."""
    minutes: float = 7.0
    """Time for pretraining; the speed is measured once, then the number of steps stands."""
    tokens: str | None = None
    """Tokens of pretraining, as in 2M, instead of --minutes: the same result on every run."""
    sft_epochs: float = 2.0
    """How often each conversation is seen in fine-tuning."""
    seed: int = 0
    """Seed of weights and data order."""
    without_test_documents: bool = False
    """Leave the documents of the test names out of the corpus: the control that could not have read them."""
    limit: int | None = None
    """Ask only the first questions of each set."""


def main(config: Config) -> None:
    """Run every stage as the command a user would give, then write the report."""
    console = Console(stderr=True)
    started = time.perf_counter()
    out, corpus = config.out, config.out / "corpus"
    _build_corpus(config, corpus, console)
    sources = [f"{name}={corpus / name}.jsonl:{share}" for name, share in MIXTURE.items()]
    if not (out / "tokenizer").is_dir():
        texts = [source for source in sources if not source.startswith("chats=")]
        flags = ["--data", *texts, "--vocab-size", str(config.vocab_size), "--out", str(out / "tokenizer")]
        _run(console, "tokenizer", flags)
    length = ["--tokens", config.tokens] if config.tokens else ["--minutes", str(config.minutes)]
    examples = list(read_jsonl(corpus / "eval_seen.jsonl"))[:2]
    prompts = [f"Question: {row['question']}\nAnswer:" for _, row in examples]
    _run(console, "pretrain", ["--data", *sources, "--tokenizer", str(out / "tokenizer"), "--out", str(out / "base"),
         "--params", config.params, *length, "--batch-tokens", str(BATCH_TOKENS), "--prompts", *prompts, "--evaluations", "4",
         "--validation-share", str(VALIDATION_SHARE), "--seed", str(config.seed)])  # fmt: skip
    _run(console, "sft", ["--model", str(out / "base/model"), "--data", str(corpus / "sft.jsonl"), "--out",
         str(out / "sft"), "--epochs", str(config.sft_epochs), "--row-tokens", "256",
         "--batch-tokens", str(BATCH_TOKENS), "--seed", str(config.seed)])  # fmt: skip
    few_shot = ["--ask", "plain", "--few-shot", str(corpus / "few_shot.txt")]
    for name, model, flags in (
        ("base-plain", "base", ["--ask", "plain"]),
        ("base-few-shot", "base", few_shot),
        ("sft", "sft", []),
    ):
        _evaluate(config, console, out / "evaluate" / name, out / model / "model", corpus, flags)
    seconds = _total_seconds(out, time.perf_counter() - started)
    write_json(out / "summary.json", {**_summary(config), "seconds": round(seconds, 1)})
    report = write_demo_report(out)
    console.print(
        f"\nreport: {report}\nchat:   fledge chat --model {out / 'sft/model'}", highlight=False, markup=False
    )


def _build_corpus(config: Config, corpus: Path, console: Console) -> None:
    options = {"max_facts": config.facts, "without_test_documents": config.without_test_documents}
    if (corpus / "manifest.json").exists():
        if read_json(corpus.parent / "corpus.json") != options:
            raise UserError(f"{corpus}: was built with other settings; choose another --out")
        return
    console.print("building the corpus from the Python installation", highlight=False)
    corpus.mkdir(parents=True, exist_ok=True)
    write_json(corpus.parent / "corpus.json", options)
    build_corpus(corpus, max_facts=config.facts, without_test_documents=config.without_test_documents)


def _run(console: Console, verb: str, flags: Sequence[str]) -> None:
    """Run a verb as a command; its own errors are shown by itself."""
    shown = " ".join(f"'{flag}'" if " " in flag or "\n" in flag else flag for flag in flags).replace(
        "\n", "\\n"
    )
    console.print(f"\n$ fledge {verb} {shown}", style="bold", highlight=False, markup=False, soft_wrap=True)
    process = subprocess.Popen([sys.executable, "-m", "fledge", verb, *flags])
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the command got it too: let it save what it has
        process.wait()
        raise
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise UserError(f"the step `fledge {verb}` failed; what is done is kept: run the same command again")


def _evaluate(
    config: Config, console: Console, out: Path, model: Path, corpus: Path, flags: Sequence[str]
) -> None:
    if (out / "summary.json").exists():
        return
    texts = [f"{name}={corpus / name}.jsonl" for name in MIXTURE] if "--few-shot" not in flags else []
    data = ["--data", *texts, "--held-out", str(VALIDATION_SHARE)] if texts else []
    limit = ["--limit", str(config.limit)] if config.limit else []
    files = [str(corpus / f"{name}.jsonl") for name in QUESTION_SETS]
    _run(
        console,
        "evaluate",
        ["--model", str(model), *data, "--questions", *files, "--out", str(out), *limit, *flags],
    )


def _total_seconds(out: Path, seconds: float) -> float:
    """The time of all runs of this command together, interruptions included."""
    path = out / "seconds.json"
    total = seconds + (read_json(path)["seconds"] if path.exists() else 0.0)
    write_json(path, {"seconds": total})
    return total


def _summary(config: Config) -> dict[str, Any]:
    """What the report claims, from the files of the stages."""
    out = config.out
    base, sft = read_json(out / "base/summary.json"), read_json(out / "sft/summary.json")
    models: dict[str, Any] = {}
    for name in ("base-plain", "base-few-shot", "sft"):
        summary = read_json(out / "evaluate" / name / "summary.json")
        sets = summary["questions"]
        models[name] = {
            "bits_per_byte": summary["bits_per_byte"],
            "seen": sets["eval_seen"]["right"],
            "test": sets["eval_test"]["right"],
            "invented_refused": sets["eval_invented"]["refused"],
            "test_wrongly_refused": sets["eval_test"]["refused"],
            "seen_wrongly_refused": sets["eval_seen"]["refused"],
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
    }


def _controls(corpus: Path) -> dict[str, Any]:
    """What the spelling of the names alone gives: the nearest known name's answer, and a classifier of spellings."""
    names = read_json(corpus / "names.json")
    taught = sorted(names["taught"].items())
    test = [row for _, row in read_jsonl(corpus / "eval_test.jsonl")]
    invented = [row["name"] for _, row in read_jsonl(corpus / "eval_invented.jsonl")]
    nearest = nearest_name_baseline(taught, [row["name"] for row in test])
    right = sum(token_f1(found, row["answer"]) >= 0.8 for found, row in zip(nearest, test, strict=True))
    spelling = NgramNameClassifier([name for name, _ in taught], names["invented"]["sft"])
    control = spelling.evaluate([row["name"] for row in test], invented)
    return {
        "nearest_name_test": Share(right, len(test)).as_dict(),
        "spelling_refuses_invented": control.refused_invented.as_dict(),
        "spelling_wrongly_refuses_test": control.wrongly_refused.as_dict(),
    }
