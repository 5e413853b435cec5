"""`fledge demo`: from the text that every Python carries to an assistant that knows what it does not know."""

from __future__ import annotations

import time
import tomllib
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from fledge.commands import program, run_verb
from fledge.config import check_at_least, check_positive, to_toml
from fledge.data.fact_texts import tokens
from fledge.data.stdlib import build_corpus
from fledge.evals.demo import summarise
from fledge.evals.demo_alignment import best_of_n, compare, make_preferences
from fledge.files import read_json, read_jsonl, write_json
from fledge.report.demo import write_demo_report
from fledge.run import Run
from fledge.tokenizer.bpe import Tokenizer
from fledge.train.recipe import parse_count, recipe_for

# Shares of the pretraining mixture: facts to know, questions (as text and as chats) about some of them to be
# able to use them, and the rest of the text.
MIXTURE = {"facts": 0.86, "questions": 0.04, "chats": 0.08, "topics": 0.01, "source": 0.01}
# Twice as deep as is usual for so few parameters: what a name calls to mind has to be compared with the name
# that was asked, and for that there must be layers left.
SHAPE: dict[str, Any] = {"params": "4.3M", "layers": 8, "hidden_size": 192}
# Small steps: a run of minutes is short of steps before it is short of tokens.
BATCH_TOKENS = 2048
QUESTION_SETS = ("eval_seen", "eval_test", "eval_invented")
VALIDATION_SHARE = 0.02
# Seen and invented names that are asked about: differences of a point or two are to be seen.
ASKED = 1000
REWARD = {"new_layers": 2, "batch_prompts": 8, "epochs": 2, "no_controls": True}
DPO = {"epochs": 1, "batch_prompts": 16, "adam_lr": 1e-4, "validation_share": 0}
PPO = {"batch_prompts": 64, "max_tokens": 48, "epochs": 2, "minibatches": 2, "validation_share": 0}
PPO_ROLLOUTS = 40


@dataclass(frozen=True, kw_only=True)
class Config:
    """Corpus, tokenizer, base model, assistant, evaluation and report, from Python's own documentation."""

    out: Path = Path("runs/demo")
    """Directory of everything the demo makes; the same command again goes on where it stopped."""
    facts: int = 1800
    """How many documented names the model is to learn."""
    params: str | None = None
    """About how many parameters, in the usual shape; by default 4.3M in 8 layers of width 192."""
    vocab_size: int = 4096
    """Size of the vocabulary."""
    minutes: float = 8.0
    """Time for pretraining; the speed is measured once, then the number of steps stands."""
    tokens: str | None = None
    """Tokens of pretraining, as in 2M, instead of --minutes: the same result on every run."""
    sft_epochs: float = 2.0
    """How often each conversation is seen in fine-tuning."""
    seed: int = 0
    """Seed of weights and data order."""
    without_test_documents: bool = False
    """Leave the documents of the test names out of the corpus: the control that could not have read them."""
    align: Literal["dpo", "ppo", "none"] = "none"
    """Go on with simulated preferences, a reward model and an aligned model; also with a finished demo."""
    limit: int | None = None
    """Ask only the first questions of each set, and make at most so many roll-outs of PPO."""
    overwrite: bool = False
    """Delete what --out holds of an earlier demo."""


def main(config: Config) -> None:
    """Run every stage as the command a user would give, then write the report."""
    console = Console(stderr=True)
    _check(config)
    began = replace(config, overwrite=False, align=_began_with(config))
    run = Run.open(config.out, to_toml(began), config.overwrite)
    run.begin({})
    report = config.out / "report.html"
    if report.exists() and config.align in ("none", _aligned_by(config)):
        _say_goodbye(console, config, report)
        return
    started = time.perf_counter()
    try:
        _raise_models(config, console)
        if config.align != "none":
            _align(config, console)
    finally:  # an interrupted demo adds up the time of all its runs
        seconds = _add_seconds(config.out / "seconds.json", time.perf_counter() - started)
    write_json(
        config.out / "summary.json", {**summarise(config.out, config.align), "seconds": round(seconds, 1)}
    )
    _say_goodbye(console, config, write_demo_report(config.out))


def _began_with(config: Config) -> Any:
    """The alignment that a demo in the directory began with; another one may be added to it later."""
    saved = config.out / "config.toml"
    if config.overwrite or not saved.exists():
        return config.align
    with suppress(ValueError):  # what is no TOML is refused with a message of its own
        return tomllib.loads(saved.read_text(encoding="utf-8")).get("align", config.align)
    return config.align


def _aligned_by(config: Config) -> str | None:
    """The alignment that the report of a finished demo is about."""
    summary = config.out / "summary.json"
    found: dict[str, Any] = read_json(summary).get("alignment", {}) if summary.exists() else {}
    return found.get("method")


def _check(config: Config) -> None:
    """Refuse what a stage would refuse later, before anything is written or deleted."""
    check_positive(config, "facts", "minutes", "sft_epochs", "limit")
    check_at_least(config, 0, "seed")
    if config.tokens:
        parse_count(config.tokens, "tokens")
    recipe_for(parse_count(config.params or SHAPE["params"], "params"), config.vocab_size)


def _make_corpus(config: Config, console: Console, corpus: Path, tokenizer: Path) -> None:
    """Tokenizer and corpus. Where refusals break names off between tokens there must be a tokenizer first: it
    learns from a draft, in which they break off between words."""
    draft, left_out = config.out / "draft", config.without_test_documents
    build = partial(
        build_corpus, max_facts=config.facts, without_test_documents=left_out, evaluation_names=ASKED
    )
    console.print("building the corpus from the Python installation", highlight=False)
    if not tokenizer.is_dir():
        build(draft)
        texts = [f"{name}={draft / name}.jsonl:{share}" for name, share in MIXTURE.items() if name != "chats"]
        run_verb(console, "tokenizer", data=texts, vocab_size=config.vocab_size, out=tokenizer)
    build(corpus, pieces=partial(tokens, Tokenizer.load(tokenizer)))


def _raise_models(config: Config, console: Console) -> None:
    """Corpus, tokenizer, base model, assistant, and their answers; what is done is not done again."""
    out, corpus, tokenizer = config.out, config.out / "corpus", config.out / "tokenizer"
    if not (corpus / "manifest.json").exists():
        _make_corpus(config, console, corpus, tokenizer)
    sources = {name: f"{name}={corpus / name}.jsonl:{share}" for name, share in MIXTURE.items()}
    asked = [row["question"] for _, row in read_jsonl(corpus / "eval_seen.jsonl")][:2]
    run_verb(
        console,
        "pretrain",
        data=list(sources.values()),
        tokenizer=tokenizer,
        out=out / "base",
        **({"params": config.params} if config.params else SHAPE),
        **({"tokens": config.tokens} if config.tokens else {"minutes": config.minutes}),
        batch_tokens=BATCH_TOKENS,
        validation_share=VALIDATION_SHARE,
        evaluations=4,
        prompts=[f"Question: {question}\nAnswer:" for question in asked],
        seed=config.seed,
    )
    run_verb(
        console,
        "sft",
        model=out / "base/model",
        data=corpus / "sft.jsonl",
        out=out / "sft",
        epochs=config.sft_epochs,
        row_tokens=256,
        batch_tokens=BATCH_TOKENS,
        seed=config.seed,
    )
    scored = _scored(config)
    few_shot = {"ask": "plain", "few_shot": corpus / "few_shot.txt"}
    _evaluate(config, console, "base-plain", out / "base/model", ask="plain", **scored)
    _evaluate(config, console, "base-few-shot", out / "base/model", **few_shot)
    _evaluate(config, console, "sft", out / "sft/model", **scored)


def _align(config: Config, console: Console) -> None:
    """Preferences, a reward model, best-of-n, an aligned model, its answers, and what has changed."""
    out, corpus, sft = config.out, config.out / "corpus", config.out / "sft/model"
    preferences, reward, aligned = out / "preferences", out / "reward/model", out / config.align / "model"
    if not preferences.is_dir():
        _say(console, "asking the assistant several times each, and judging by a written rule")
        make_preferences(sft, corpus / "preference.jsonl", preferences, config.seed, config.limit)
    held = preferences / "held_out.jsonl"
    examined: dict[str, Any] = {"held_out": held} if held.stat().st_size else {"validation_share": 0}
    learned = {"model": sft, "seed": config.seed}
    judged = {"data": preferences / "train.jsonl", **learned}
    run_verb(console, "reward", **judged, **examined, out=out / "reward", **REWARD)
    if not (out / "best_of.json").exists():
        _say(console, "choosing the best of several answers by the reward model")
        write_json(out / "best_of.json", best_of_n(sft, reward, corpus, config.seed, config.limit))
    if config.align == "dpo":
        own = preferences / "own.jsonl"  # empty where only padding makes a difference
        data = own if own.stat().st_size else preferences / "train.jsonl"
        run_verb(console, "dpo", data=data, **learned, out=out / "dpo", **DPO)
    else:
        rolled = {"rollouts": min(PPO_ROLLOUTS, config.limit or PPO_ROLLOUTS), **PPO}
        asked = {"prompts": preferences / "prompts.jsonl", "reward": reward, **learned}
        run_verb(console, "ppo", **asked, out=out / "ppo", **rolled)
    _evaluate(config, console, config.align, aligned, **_scored(config))
    comparison = out / f"comparison_{config.align}.json"
    if not comparison.exists():
        _say(console, "comparing the aligned model with the assistant before")
        answers = out / "evaluate/sft/answers.jsonl", out / f"evaluate/{config.align}/answers.jsonl"
        models = sft, aligned
        found = compare(answers, models, reward, corpus, config.seed, config.limit)
        write_json(comparison, found)


def _scored(config: Config) -> dict[str, Any]:
    """Texts whose held-out documents an evaluation scores."""
    corpus = config.out / "corpus"
    return {"data": [f"{name}={corpus / name}.jsonl" for name in MIXTURE], "held_out": VALIDATION_SHARE}


def _say(console: Console, text: str) -> None:
    console.print(f"\n{text}", highlight=False)


def _evaluate(config: Config, console: Console, name: str, model: Path, **settings: Any) -> None:
    out = config.out / "evaluate" / name
    if not (out / "summary.json").exists():
        limit = {"limit": config.limit} if config.limit else {}
        files = [config.out / "corpus" / f"{questions}.jsonl" for questions in QUESTION_SETS]
        run_verb(console, "evaluate", model=model, questions=files, out=out, **limit, **settings)


def _say_goodbye(console: Console, config: Config, report: Path) -> None:
    aligned = _aligned_by(config)
    chat = f"{program()} chat --model {config.out / (aligned or 'sft') / 'model'}"
    stages = ("base", "sft", *([aligned] if aligned else []))
    serve = f"{program()} serve --model " + " ".join(f"{one}={config.out / one / 'model'}" for one in stages)
    known, invented = (
        next(read_jsonl(config.out / f"corpus/eval_{questions}.jsonl"))[1]["question"]
        for questions in ("seen", "invented")
    )
    lines = (
        f"report: {report}",
        f"chat:   {chat}",
        f"ask:    {known}",
        f"        {invented}",
        f"side by side, in the browser: {serve}",
    )
    console.print("\n" + "\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _add_seconds(path: Path, seconds: float) -> float:
    """The time of all runs of this command together."""
    total: float = seconds + (read_json(path)["seconds"] if path.exists() else 0.0)
    write_json(path, {"seconds": total})
    return total
