"""The report of an evaluation: made from files alone, everything in it escaped."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fledge.errors import UserError
from fledge.evals.facts import Share
from fledge.evals.samples import Sampled, accuracy_curves
from fledge.report.evaluate import write_evaluation_report

EVIL = "<script>alert(1)</script>"


def task(judged: bool) -> dict[str, Any]:
    problems = [
        Sampled(
            tuple(i % 3 == j % 3 for j in range(8)), tuple("abc"[j % 3] for j in range(8)), (5,) * 8,
            tuple(map(float, range(8))) if judged else None,
        )
        for i in range(30)
    ]  # fmt: skip
    return {
        "reward": [EVIL], "problems": 30, "samples": 8, "temperature": 1.0, "cut_off": 7,
        "greedy": {**Share(12, 30).as_dict(), "tokens": 4.5}, "first": Share(10, 30).as_dict(),
        "curves": accuracy_curves(problems, 0),
    }  # fmt: skip


def write(directory: Path, **more: Any) -> Path:
    share = Share(3, 4).as_dict()
    summary = {
        "stage": "evaluate", "model": EVIL, "bits_per_byte": {EVIL: 1.5, "b": 2.0},
        "questions": {EVIL: {"right": None, "mean_f1": None, "refused": share}, "known": {
            "right": share, "mean_f1": 0.7, "refused": share}}, **more,
    }  # fmt: skip
    (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def test_the_page_shows_the_figures(tmp_path: Path) -> None:
    tasks = {EVIL: task(judged=False), "countdown": task(judged=True)}
    baseline = {"model": "ngram", "bits_per_byte": {EVIL: 2.0, "b": 1.6}}
    page = write_evaluation_report(write(tmp_path, tasks=tasks, baseline=baseline)).read_text()
    assert page.count("<svg") == 2 and page.count("best by reward model") >= 1
    assert "25.0%" in page and "-25.0%" in page, "the model needs a quarter less, and a quarter more"
    curve = tasks["countdown"]["curves"]["vote"]
    for point in curve:
        assert f"{point['mean']:.1%}" in page
    assert "7 answers were cut off" in page
    assert "40.0%" in page, "greedy"


def test_texts_are_escaped_and_nothing_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(f'model = "{EVIL}"')
    page = write_evaluation_report(write(tmp_path, tasks={EVIL: task(judged=True)})).read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "default-src 'none'" in page


def test_what_was_not_measured_is_not_shown(tmp_path: Path) -> None:
    page = write_evaluation_report(write(tmp_path)).read_text()
    assert "Time into accuracy" not in page and "Baseline" not in page and "<svg" not in page
    assert "75.0%" in page and "1.500" in page


def test_one_answer_a_problem(tmp_path: Path) -> None:
    """A line of one point, and every problem right: the band reaches the top."""
    curves = accuracy_curves([Sampled((True,), ("a",), (2,))] * 5, 0)
    one = {**task(judged=False), "samples": 1, "problems": 5, "curves": curves, "cut_off": 0}
    assert "100.0%" in write_evaluation_report(write(tmp_path, tasks={"a": one})).read_text()


@pytest.mark.parametrize("key", ["model", "bits_per_byte", "questions"])
def test_a_summary_that_lacks_something(key: str, tmp_path: Path) -> None:
    write(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    del summary[key]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(UserError, match=f"has no '{key}'"):
        write_evaluation_report(tmp_path)
