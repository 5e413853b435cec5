"""The demo's report: whole, self-contained, safe and repeatable, from a directory like the demo's."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fledge.errors import UserError
from fledge.report.alignment import apart_sentence, turn_sentence
from fledge.report.demo import write_demo_report

SUMMARIES = {
    "email.message.Message.get_all": "Return a list of all the values for the named field.",
    "tkinter.simpledialog.askinteger": "Get an integer from the user.",
    "zipfile.ZipFile.mkdir": "Creates a directory inside the zip archive.",
    "tarfile.EOFHeaderError": "Exception for end of file headers.",
    "decimal.Context.sqrt": "Square root of a non-negative number to context precision.",
    "statistics.variance": "Return the sample variance of data.",
    "asyncio.streams.StreamReader.readuntil": "Read data from the stream until ``separator`` is found.",
    "fractions.Fraction.limit_denominator": "Closest Fraction with denominator at most max_denominator.",
}
SHARES = {
    "base-plain": {"seen": (471, 500), "test": (254, 412), "invented": (38, 500), "wrongly": (2, 412)},
    "base-few-shot": {"seen": (466, 500), "test": (249, 412), "invented": (213, 500), "wrongly": (9, 412)},
    "sft": {"seen": (499, 500), "test": (271, 412), "invented": (467, 500), "wrongly": (25, 412)},
}
BITS = {
    "base-plain": {"facts": 0.2213, "questions": 0.1931, "topics": 2.0417, "source": 1.7329},
    "sft": {"facts": 0.3127, "questions": 0.2846, "topics": 2.1834, "source": 1.8512},
}


def share(successes: int, n: int) -> dict[str, Any]:
    """A share with Wilson's interval, as the evaluation writes it."""
    z, rate = 1.96, successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return {"rate": rate, "low": centre - half, "high": centre + half, "successes": successes, "n": n}


def demo_summary() -> dict[str, Any]:
    models = {
        model: {
            "bits_per_byte": BITS.get(model, {}),
            "seen": share(*shares["seen"]),
            "test": share(*shares["test"]),
            "invented_refused": share(*shares["invented"]),
            "test_wrongly_refused": share(*shares["wrongly"]),
            "seen_wrongly_refused": share(1, 500),
            "invented_as_asked": share(7, 500),
        }
        for model, shares in SHARES.items()
    }
    pretrain = {
        "stage": "pretrain",
        "parameters": 5_607_680,
        "steps": 834,
        "tokens": 3_416_064,
        "seconds": 358.2,
        "tokens_per_second": 9536.7,
        "skipped_steps": 0,
        "loss": 0.8137,
        "best_step": 834,
        "bits_per_byte": BITS["base-plain"],
        "epochs": {"facts": 1.931, "questions": 2.754, "topics": 0.471, "source": 0.113},
    }
    sft = {
        "stage": "sft",
        "parameters": 5_607_680,
        "steps": 291,
        "tokens": 331_742,
        "seconds": 61.4,
        "tokens_per_second": 5402.9,
        "skipped_steps": 0,
        "loss": 0.0419,
        "best_step": 218,
        "conversations": 5338,
        "held_out": 109,
        "overlong": 3,
        "without_targets": 0,
        "epochs": 2.004,
        "validation_nats_per_token": 0.0883,
    }
    return {
        "stage": "demo",
        "parameters": 5_607_680,
        "facts": 1900,
        "splits": {"preference": 152, "sft": 1336, "test": 412},
        "corpus_fingerprint": "337a642d60bd495a8069e54b2f29f219722dfe16e0a4d3ffbfb23e0d61cb2565",
        "python": "3.11.7",
        "pretrain": pretrain,
        "sft": sft,
        "models": models,
        "controls": {
            "nearest_name_test": share(33, 412),
            "spelling_refuses_invented": share(331, 500),
            "spelling_wrongly_refuses_test": share(118, 412),
        },
        "seconds": 563.8,
    }


def pretrain_metrics(rng: random.Random) -> Iterator[dict[str, Any]]:
    start = {"facts": 2.88, "questions": 2.881, "topics": 2.437, "source": 3.19}
    for step in range(835):
        if step:
            rate = min(step / 20, 1, (834 - step + 1) / 334) * 0.02
            loss = 0.55 + 5.4 * math.exp(-step / 25) + 2.4 * math.exp(-step / 260) + rng.gauss(0, 0.17)
            row = {"step": step, "tokens": 4096 * step, "seconds": 0.43 * step, "loss": loss}
            yield {**row, "grad_norm": 0.7, "lr": rate, "tokens_per_second": 9536.7}
        if step % 167 == 0 or step == 834:
            bits = {
                f"validation/{name}": end + (start[name] - end) * math.exp(-step / (150 + 20 * i))
                for i, (name, end) in enumerate(BITS["base-plain"].items())
            }
            yield {"step": step, "tokens": 4096 * step, "validation": bits["validation/facts"], **bits}


def sft_metrics(rng: random.Random) -> Iterator[dict[str, Any]]:
    yield {"step": 0, "tokens": 0, "validation": 2.31}
    for step in range(1, 292):
        loss = abs(0.03 + 2.2 * math.exp(-step / 22) + rng.gauss(0, 0.02))
        rate = min(step / 10, (292 - step) / 262) * 0.005
        yield {"step": step, "tokens": 1140 * step, "loss": loss, "grad_norm": 0.4, "lr": rate}
        if step in (73, 146, 218, 291):
            held = 0.085 + 2.2 * math.exp(-step / 22)
            yield {"step": step, "tokens": 1140 * step, "validation": held}


def answers(model: str, rng: random.Random) -> Iterator[dict[str, Any]]:
    refused = "I don't know {}."
    for name, (_, n) in SHARES[model].items():
        for i in range(n if name != "wrongly" else 0):
            known, gold = list(SUMMARIES.items())[i % len(SUMMARIES)]
            path = f"{known}_{i}"
            right = rng.random() < SHARES[model][name][0] / n
            row = {"set": f"eval_{name}", "question": f"What does {path} do?", "gold": gold, "f1": 0.0}
            row["answer"] = gold if right else f"Return the {rng.choice(['name', 'type'])} of the object."
            if name == "invented":
                row |= {"gold": None, "f1": None, "refused": right}
                row["answer"] = refused.format(path) if right else "Return a copy of the list of headers."
            else:
                row |= {"f1": 1.0 if right else 0.25, "refused": False}
                if not right and rng.random() < SHARES[model]["wrongly"][0] / 141:
                    row |= {"answer": refused.format(path), "f1": 0.0, "refused": True}
            yield {**row, "finish_reason": "stop"}


def mean(value: float, half: float, n: int) -> dict[str, float]:
    return {"mean": value, "low": value - half, "high": value + half, "n": n}


def alignment() -> dict[str, Any]:
    """What the demo says of its alignment, with figures that stand nowhere else."""
    golds = {1: 0.3131, 2: 0.3737, 4: 0.4141, 8: 0.4343, 16: 0.4242}
    curve = [
        {"n": n, "kl": math.log(n) - (n - 1) / n, "reward": -1.357 + 0.2 * math.log(n), "gold": gold,
         "gold_low": gold - 0.05, "gold_high": gold + 0.05}
        for n, gold in golds.items()
    ]  # fmt: skip
    kinds = {"right against wrong": share(181, 213), "unknown against invented": share(57, 71)}
    change = {"before": 0.0667, "after": 0.0317, "difference": mean(-0.035, 0.016, 500)}
    return {
        "method": "dpo",
        "preferences": {
            "questions": 4356,
            "answers": 4,
            "temperature": 1.3,
            "slips": 0.1,
            "train": {"questions": 3826, "rankings": 2859},
            "held_out": {"questions": 530, "rankings": 402},
            "seconds": 77.1,
        },
        "reward": {
            "accuracy": share(811, 1003),
            "by_kinds": {name: {"accuracy": kind, "blind": None} for name, kind in kinds.items()},
            "seconds": 111.4,
        },
        "best_of": {
            "prompts": 200,
            "answers": 16,
            "curve": curve,
            "by_set": {
                "eval_test": [{"n": 1, "gold": 0.5281}, {"n": 16, "gold": 0.6937}],
                "eval_invented": [{"n": 1, "gold": -0.2213}, {"n": 16, "gold": -0.4419}],
            },
            "peak": 8,
            "peak_share": 0.61,
            "gain_to_peak": mean(0.1212, 0.04, 200),
            "last_minus_peak": mean(-0.0101, 0.02, 200),
            "seconds": 37.2,
        },
        "training": {"seconds": 93.6, "steps": 179},
        "comparison": {
            "invented_answered": change,
            "test_wrongly_refused": {
                "before": 0.0607,
                "after": 0.0753,
                "difference": mean(0.0146, 0.02, 412),
            },
            "test_right": {"before": 0.6578, "after": 0.6699, "difference": mean(0.0121, 0.015, 412)},
            "separation": {"before": 1.7412, "after": 1.7934, "difference": mean(0.0522, 0.08, 912)},
            "kl": mean(2.345, 0.25, 200),
            "aligned": {"reward": mean(-0.789, 0.11, 200), "gold": mean(0.4646, 0.06, 200)},
            "seconds": 22.9,
        },
    }


def write_alignment(demo: Path) -> Path:
    """Make a run without an alignment one that has it."""
    shares = {"seen": (499, 500), "test": (276, 412), "invented": (484, 500), "wrongly": (31, 412)}
    summary = json.loads((demo / "summary.json").read_text(encoding="utf-8"))
    summary["alignment"] = alignment()
    keys = {"seen": "seen", "test": "test", "invented": "invented_refused", "wrongly": "test_wrongly_refused"}
    bits = {"facts": 0.3203, "questions": 0.2908, "topics": 2.1915, "source": 1.8623}
    aligned = {key: share(*shares[name]) for name, key in keys.items()}
    summary["models"]["aligned"] = {**aligned, "bits_per_byte": bits}
    (demo / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    for folder in ("reward", "dpo", "evaluate/dpo"):
        (demo / folder).mkdir()
        (demo / folder / "config.toml").write_text(f'out = "{folder}"', encoding="utf-8")
    (demo / "reward/report.html").write_text("<!DOCTYPE html>", encoding="utf-8")
    (demo / "evaluate/dpo/summary.json").write_text('{"seconds": 21.5}', encoding="utf-8")
    write_jsonl(demo / "evaluate/dpo/answers.jsonl", answers("sft", random.Random("aligned")))
    rows = [{"step": s, "tokens": 3000 * s, "loss": 0.69 - 0.001 * s, "lr": 1e-4} for s in range(1, 180)]
    for folder in ("reward", "dpo"):
        write_jsonl(demo / folder / "metrics.jsonl", rows)
    return demo


def write_jsonl(path: Path, rows: Iterator[dict[str, Any]] | list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_demo_run(out: Path) -> Path:
    """All files that the report reads, with figures like a real run's."""
    rng = random.Random(1)
    for folder in ("base", "sft", "corpus", *(f"evaluate/{model}" for model in SHARES)):
        (out / folder).mkdir(parents=True)
        config = f'out = "runs/demo/{folder}"\nparams = "5.6M"\nvocab_size = 4096\nseed = 0\n'
        (out / folder / "config.toml").write_text(config, encoding="utf-8")
    summary = demo_summary()
    documents = {"facts": (23104, 2_981_440), "questions": (2806, 351_902)}
    documents |= {"topics": (82, 701_223), "source": (2631, 9_164_947)}
    environment = {"fledge": "0.1.0", "python": "3.11.7", "torch": "2.13.0+cpu", "cpu_count": 2, "threads": 2}
    environment |= {"platform": "Linux-6.1.0-x86_64-with-glibc2.36", "command": ["fledge", "pretrain"]}
    manifest = {
        "fingerprint": summary["corpus_fingerprint"],
        "python": "3.11.7",
        "seed": 0,
        "without_test_documents": False,
        "facts": 1900,
        "kinds": {"class": 341, "function": 497, "method": 931, "module": 98, "property": 33},
        "splits": summary["splits"],
        "files": {f"{name}.jsonl": {"lines": n, "bytes": size} for name, (n, size) in documents.items()},
    }
    files = {"summary": summary, "base/summary": summary["pretrain"], "sft/summary": summary["sft"]}
    files |= {"base/environment": environment, "corpus/manifest": manifest}
    files |= {
        f"evaluate/{model}/summary": {"bits_per_byte": BITS.get(model, {}), "seconds": 21.5}
        for model in SHARES
    }
    for name, value in files.items():
        (out / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    write_jsonl(out / "base/metrics.jsonl", pretrain_metrics(rng))
    write_jsonl(out / "sft/metrics.jsonl", sft_metrics(rng))
    for model in SHARES:
        write_jsonl(out / "evaluate" / model / "answers.jsonl", answers(model, random.Random(model)))
    names = list(SUMMARIES)[:2]
    prompts = [f"Question: What does {name} do?\nAnswer:" for name in names]
    texts = {
        0: "\x16 wid8\ufffd Argum[email ;;;; 0 tupl tupl tupl",
        500: " Return the value of the object.\n",
        834: " Return a list of all the values for the named field.\nQuestion: What is os.getpid?\nAnswer:",
    }
    rows = [{"step": s, "prompt": p, "text": texts[s]} for s in (0, 500, 834) for p in prompts]
    write_jsonl(out / "base/samples.jsonl", rows)
    return out


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    return write_demo_run(tmp_path / "demo")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of an untouched run."""
    return report(write_demo_run(tmp_path_factory.mktemp("runs") / "demo"))


@pytest.fixture
def aligned(demo: Path) -> Path:
    return write_alignment(demo)


def report(out: Path) -> str:
    return write_demo_report(out).read_text(encoding="utf-8")


class Page(HTMLParser):
    """Checks that tags are balanced and ids are unique; collects text, headings and tags."""

    VOID = frozenset({"meta", "link", "br", "hr", "img", "input", "wbr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.headings: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at line {self.getpos()[0]}"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)
            if self.open and self.open[-1] == "h2":
                self.headings.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_is_well_formed_with_all_sections_in_order(text: str) -> None:
    assert text.startswith("<!DOCTYPE html>\n<html lang=")
    page = Page(text)
    assert len(set(page.ids)) == len(page.ids)
    assert page.headings == [
        "What the models know",
        "How well they predict text",
        "How the training went",
        "The same questions, side by side",
        "What the base model writes while it learns",
        "The run",
    ]


def test_references_inside_charts_exist(text: str) -> None:
    ids = set(Page(text).ids)
    used = set(re.findall(r'url\(#([^)]+)\)|(?:xlink:)?href="#([^"]+)"|aria-labelledby="([^"]+)"', text))
    assert used
    assert {first or second or third for first, second, third in used} <= ids


def test_asks_nothing_of_a_network_and_runs_nothing(text: str) -> None:
    assert not re.search(r"https?:|//[a-z]|@import|javascript:", text)
    tags = Page(text).tags
    assert not {tag for tag, _ in tags} & {"script", "iframe", "object", "embed", "img", "form", "base"}
    assert not [name for _, attrs in tags for name in attrs if name.startswith("on")]
    references = ("href", "xlink:href", "src")
    links = [str(attrs[name]) for _, attrs in tags for name in references if name in attrs]
    assert all(link.startswith(("#", "data:,")) for link in links)
    assert "default-src 'none'" in text


def test_has_every_figure_of_the_summary(text: str) -> None:
    text, summary = Page(text).text, demo_summary()
    shares = [value for model in summary["models"].values() for value in model.values() if "rate" in value]
    for value in [*shares, *summary["controls"].values()]:
        assert f"{value['rate']:.1%}" in text
    for value in [s for model in summary["models"].values() for k, s in model.items() if k in SHOWN]:
        assert f"{value['low'] * 100:.1f}\N{EN DASH}{value['high'] * 100:.1f}%" in text
        assert f"{value['successes']} of {value['n']}" in text
    for figures in BITS.values():
        assert all(f"{value:.3f}" in text for value in figures.values())
    whole = ["5,607,680", "3,416,064", "331,742", "834", "291", "9,537", "5,403", "218", "1,900", "1,336"]
    whole += ["412", "152", "5,338", "109", "2.00", "0.088", "0.814", "0.042", "3.11.7"]
    whole += ["1.93", "2.75", "0.47", "0.11"]  # epochs
    times = ["9 min 24 s", "5 min 58 s", "1 min 1 s", "1 min 4 s"]
    for figure in [*whole, *times, summary["corpus_fingerprint"]]:
        assert re.search(rf"(?<![\d.,]){re.escape(figure)}(?![\d,])", text), figure


SHOWN = ("seen", "test", "invented_refused", "test_wrongly_refused")


def test_says_how_many_invented_names_are_answered_as_asked(text: str) -> None:
    said = re.sub(r"\s+", " ", text)
    assert "It answers <strong>1.4%</strong> of the invented names as if they existed" in said


def test_headline_cells_stand_in_the_right_row_and_column(text: str) -> None:
    table = text.split('class="stack measures"')[1].split("</table>")[0]
    body = table.split("<tbody")[1]
    cells = [re.findall(r"<strong>([\d.]+%)</strong>", row) for row in body.split("<tr")[1:]]
    assert cells == [
        ["94.2%", "93.2%", "99.8%"],  # seen: no control
        ["61.7%", "60.4%", "65.8%", "8.0%"],
        ["7.6%", "42.6%", "93.4%", "66.2%"],
        ["0.5%", "2.2%", "6.1%", "28.6%"],
    ]


def test_controls_may_be_bare_shares(demo: Path) -> None:
    summary = demo_summary()
    summary["controls"]["spelling_refuses_invented"] = 0.7193
    (demo / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    assert "71.9%" in Page(report(demo)).text


def test_charts_have_descriptions_and_captions(text: str) -> None:
    charts = [attrs for tag, attrs in Page(text).tags if tag == "svg"]
    assert len(charts) == 8  # four shares, two losses, validation, learning rates
    assert all(chart["role"] == "img" and len(str(chart["aria-label"])) > 40 for chart in charts)
    assert text.count("<figure>") == text.count("<figcaption>") == len(charts)


def test_escapes_what_models_write(demo: Path) -> None:
    evil = '<script>alert(1)</script></td>$\\x$<img src=x onerror="alert(2)">\x00\x1b[31m'
    for model in SHARES:
        rows = enumerate(answers(model, random.Random(0)))
        evil_rows = [{**row, "answer": evil, "question": f"{i}</th>{evil}"} for i, row in rows]
        write_jsonl(demo / "evaluate" / model / "answers.jsonl", evil_rows)
    write_jsonl(demo / "base/samples.jsonl", [{"step": 0, "prompt": evil, "text": evil}])
    (demo / "base/config.toml").write_text(f"out = '{evil}'", encoding="utf-8")
    metrics = [{"step": s, "tokens": s, f"validation/{evil}": 1.0, "loss": 1.0, "lr": 1.0} for s in (1, 2)]
    write_jsonl(demo / "base/metrics.jsonl", metrics)
    summary = demo_summary()
    summary["pretrain"]["epochs"] = {evil: 1.0}
    (demo / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    text = report(demo)
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert "&lt;script&gt;alert(1)" in text
    assert "\x00" not in text and "\x1b" not in text and "\\x00\\x1b[31m" in text


def test_same_files_give_the_same_bytes(demo: Path) -> None:
    first = write_demo_report(demo).read_bytes()
    assert write_demo_report(demo).read_bytes() == first


def test_shows_twenty_questions_spread_over_the_sets_with_a_word_for_each_answer(text: str) -> None:
    table = text.split('class="stack answers"')[1].split("</table>")[0]
    places = [[int(i) for i in re.findall(r"(\d+) do\?", part)] for part in table.split("<tbody")[1:]]
    assert [len(part) for part in places] == [8, 8, 4]
    # Evenly spread: each in the middle of its eighth (fourth) of the set, in the set's order.
    for part, n in zip(places, (500, 412, 500), strict=True):
        assert part == [n * (2 * i + 1) // (2 * len(part)) for i in range(len(part))]
    marks = re.findall(r'aria-hidden="true">(.)</span> ([^<]+)</span>', table)
    assert len(marks) == 60
    symbols = {"right": "✓", "wrong": "✗", "refused": "○", "refused, as it should": "✓", "made up": "✗"}
    assert all(symbols[words] == symbol for symbol, words in marks)


@pytest.mark.parametrize(
    ("gold", "f1", "refused", "words"),
    [
        ("Get the size.", 0.8, False, "right"),
        ("Get the size.", 0.79, False, "wrong"),
        ("Get the size.", 0.0, True, "refused"),
        (None, None, True, "refused, as it should"),
        (None, None, False, "made up"),
    ],
)
def test_marks_say_what_an_answer_is_worth(
    demo: Path, gold: str | None, f1: float | None, refused: bool, words: str
) -> None:
    name = "eval_test" if gold else "eval_invented"
    row = {"set": name, "question": "Q?", "gold": gold, "answer": "A.", "f1": f1, "refused": refused}
    for model in SHARES:
        write_jsonl(demo / "evaluate" / model / "answers.jsonl", [row])
    assert report(demo).count(f"</span> {words}</span>") == 3


def test_without_optional_files_their_sections_are_left_out(demo: Path) -> None:
    for path in demo.rglob("*"):
        if path.is_file() and path != demo / "summary.json":
            path.unlink()
    page = Page(report(demo))
    assert page.headings == ["What the models know", "How well they predict text", "The run"]


def test_says_when_the_test_documents_were_left_out(demo: Path, text: str) -> None:
    told = "The model read documents about these names"
    assert told in text
    manifest = json.loads((demo / "corpus/manifest.json").read_text(encoding="utf-8"))
    manifest["without_test_documents"] = True
    (demo / "corpus/manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    control = report(demo)
    assert told not in control and "were left out" in control


def test_a_missing_summary_is_the_users_to_mend(demo: Path) -> None:
    (demo / "summary.json").unlink()
    with pytest.raises(UserError, match=r"summary\.json: no such file"):
        write_demo_report(demo)
    assert not (demo / "report.html").exists()


@pytest.mark.parametrize("dotted", ["parameters", "pretrain.tokens", "models.sft.test.rate", "controls"])
def test_a_summary_without_a_figure_is_named(demo: Path, dotted: str) -> None:
    summary = demo_summary()
    *path, last = dotted.split(".")
    inner = summary
    for key in path:
        inner = inner[key]
    del inner[last]
    (demo / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    with pytest.raises(UserError, match=rf"summary\.json: has no '{re.escape(dotted)}'"):
        write_demo_report(demo)


def test_a_row_without_a_field_is_named_by_its_line(demo: Path) -> None:
    with (demo / "base/samples.jsonl").open("a") as file:
        file.write('{"step": 3, "prompt": "x"}\n')
    with pytest.raises(UserError, match=r"samples\.jsonl:7: the line has no field 'text'"):
        write_demo_report(demo)


def test_long_runs_are_thinned(demo: Path) -> None:
    rows = [{"step": s, "tokens": s * 4096, "loss": 1 + math.sin(s), "lr": 0.1} for s in range(1, 40_001)]
    write_jsonl(demo / "base/metrics.jsonl", rows)
    assert len(report(demo)) < 600_000


# With an alignment.


def test_the_alignment_has_its_sections(aligned: Path) -> None:
    text = report(aligned)
    page = Page(text)
    assert len(set(page.ids)) == len(page.ids)
    assert page.headings == [
        "What the models know",
        "Preferences and reward model",
        "SFT against aligned",
        "How well they predict text",
        "How the training went",
        "The same questions, side by side",
        "What the base model writes while it learns",
        "The run",
    ]
    assert "fledge chat --model " + str(aligned / "dpo/model") in page.text
    assert (
        "fledge serve --model "
        + " ".join(f"{name}={aligned / name / 'model'}" for name in ("base", "sft", "dpo"))
        in page.text
    )
    charts = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(charts) == 12  # those of before, best-of-n twice, the losses of reward model and DPO
    assert all(len(str(chart["aria-label"])) > 40 for chart in charts)


def test_the_alignment_says_that_labels_are_simulated_and_links_the_examination(aligned: Path) -> None:
    text = report(aligned)
    said = Page(text).text
    assert "simulated : no person made them, but a written rule" in said
    assert "in 10% of them two places are exchanged" in said
    links = [attrs["href"] for tag, attrs in Page(text).tags if tag == "a"]
    assert links == ["reward/report.html"]
    (aligned / "reward/report.html").unlink()
    assert "<a " not in report(aligned)


def test_the_alignment_has_every_figure(aligned: Path) -> None:
    said = Page(report(aligned)).text
    figures = ["4,356", "2,859", "402", "80.9%", "of 1,003", "85.0%", "80.3%", "213", "71"]
    figures += ["6.7%", "3.2%", "\N{MINUS SIGN}3.5", "\N{MINUS SIGN}5.1 to \N{MINUS SIGN}1.9", "+1.5", "+1.2"]
    figures += ["for test names from 0.53 to 0.69", "from \N{MINUS SIGN}0.22 to \N{MINUS SIGN}0.44"]
    figures += [
        "1.74",
        "1.79",
        "+0.05",
        "\N{MINUS SIGN}0.03 to +0.13",
        "2.35",
        "2.10 to 2.60",
        "\N{MINUS SIGN}0.79",
        "0.46",
        "\N{MINUS SIGN}1.36",
        "0.31",
    ]
    figures += ["1 min 17 s", "1 min 51 s", "37 s", "1 min 34 s", "23 s"]
    for figure in figures:
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", said), figure


def test_what_the_reward_model_has_the_wrong_way_round_is_said(aligned: Path) -> None:
    assert "the wrong way round" not in Page(report(aligned)).text
    summary = json.loads((aligned / "summary.json").read_text(encoding="utf-8"))
    kinds = summary["alignment"]["reward"]["by_kinds"]
    kinds["right against unknown"] = {"accuracy": share(37, 104), "blind": None}
    kinds["wrong against padded"] = {"accuracy": share(30, 64), "blind": None}
    (aligned / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    said = Page(report(aligned)).text
    left, right = "\N{LEFT DOUBLE QUOTATION MARK}", "\N{RIGHT DOUBLE QUOTATION MARK}"
    told = f"for right against {left}I don\N{RIGHT SINGLE QUOTATION MARK}t know{right} (35.6%): whoever"
    assert told in said and "padded (" not in said


def test_headline_has_a_column_for_the_aligned_model(aligned: Path) -> None:
    table = report(aligned).split('class="stack measures"')[1].split("</table>")[0]
    head, body = table.split("<tbody")
    assert head.count('class="chief">Assistant after DPO') == 1
    cells = [re.findall(r"<strong>([\d.]+%)</strong>", row) for row in body.split("<tr")[1:]]
    assert [row[3] for row in cells] == ["99.8%", "67.0%", "96.8%", "7.5%"]
    assert [len(row) for row in cells] == [4, 5, 5, 5]


def test_base_sft_and_aligned_model_answer_side_by_side(aligned: Path) -> None:
    table = report(aligned).split('class="stack answers"')[1].split("</table>")[0]
    heads = re.findall(r'role="columnheader">([^<]+)<', table)
    assert heads[1:] == ["Base model, asked plainly", "Assistant (SFT)", "Assistant after DPO"]
    assert len(re.findall(r'aria-hidden="true">(.)</span>', table)) == 60


@pytest.mark.parametrize(
    ("peak", "fall", "said"),
    [
        (16, mean(0.0, 0.0, 200), "does not turn down: it is highest for n = 16, +0.12 against a single"),
        (4, mean(-0.05, 0.02, 200), "turns down: from its highest at n = 4 to n = 16 it changes by"),
        (8, mean(-0.01, 0.02, 200), "cannot be told from chance: it is highest for n = 8"),
    ],
)
def test_says_whether_the_gold_score_turns_down(peak: int, fall: dict[str, float], said: str) -> None:
    assert said in turn_sentence({**alignment()["best_of"], "peak": peak, "last_minus_peak": fall})


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.2, "It tells real from invented names better: in standard deviations"),
        (-0.2, "It tells real from invented names worse: in standard deviations"),
        (0.05, "What changes is how readily it refuses"),
    ],
)
def test_says_whether_names_are_told_apart_better(value: float, said: str) -> None:
    separation = {"before": 1.7, "after": 1.7 + value, "difference": mean(value, 0.1, 900)}
    told = apart_sentence(separation, "DPO")
    assert said in told and f"the model after DPO {1.7 + value:.2f}" in told


@pytest.mark.parametrize(
    "dotted", ["alignment.comparison.kl", "alignment.best_of.peak", "models.aligned.test.n"]
)
def test_an_alignment_without_a_figure_is_named(aligned: Path, dotted: str) -> None:
    summary = json.loads((aligned / "summary.json").read_text(encoding="utf-8"))
    *path, last = dotted.split(".")
    inner = summary
    for key in path:
        inner = inner[key]
    del inner[last]
    (aligned / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    with pytest.raises(UserError, match=rf"summary\.json: has no '{re.escape(dotted)}'"):
        write_demo_report(aligned)


def test_nothing_held_out_leaves_the_accuracy_out(aligned: Path) -> None:
    summary = json.loads((aligned / "summary.json").read_text(encoding="utf-8"))
    summary["alignment"]["reward"] |= {"accuracy": None, "by_kinds": {}}
    (aligned / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    said = Page(report(aligned)).text
    assert "A reward model learned to judge" not in said and "Judged right" not in said
