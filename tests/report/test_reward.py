"""The reward model's report: made from files alone, everything in it escaped."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fledge.errors import UserError
from fledge.evals.preferences import PairRow, examine
from fledge.report.reward import write_reward_report

EVIL = "<script>alert(1)</script>"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rows = [
        PairRow(
            f"{EVIL} {i}", "yes" * i, f"{EVIL}" * (1 + i % 3), (i % 7 - 2) / 2, 0.1, i + 1, 10,
            kinds=("right", EVIL), votes=2, agreeing=1 + i % 2, simulated=i == 0,
            blind_better=0.0, blind_worse=1.0,
        )
        for i in range(40)
    ]  # fmt: skip
    write(tmp_path, rows)
    return tmp_path


def write(directory: Path, rows: list[PairRow], **more: Any) -> None:
    summary = {
        "stage": "reward", "parameters": 10, "prompts": 90, "held_out": 40, "offset": -0.5, **examine(rows),
        "labelers_agree": None, **more,
    }  # fmt: skip
    (directory / "summary.json").write_text(json.dumps(summary))
    (directory / "pairs.jsonl").write_text("".join(json.dumps(row.as_dict()) + "\n" for row in rows))
    losses = [{"step": i, "tokens": 9 * i, "loss": 0.7 - i / 100} for i in range(1, 9)]
    held = [{"step": 8, "tokens": 72, "validation": 0.6}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*losses, *held]))


def test_the_page_shows_the_figures_of_the_summary(run: Path) -> None:
    page = write_reward_report(run).read_text()
    summary = json.loads((run / "summary.json").read_text())
    assert f"<strong>{summary['accuracy']['rate']:.1%}</strong>" in page
    assert "Simulated labels." in page
    assert "control: no prompt" in page
    assert "control: shuffled labels" not in page, "that control was not made"
    assert "By agreement of the labelers" in page
    assert page.count("<svg") == 4
    pairs = map(json.loads, (run / "pairs.jsonl").read_text().splitlines())
    wrong = sum(pair["reward_better"] <= pair["reward_worse"] for pair in pairs)
    assert page.count('class="pair"') == min(20, wrong) > 3


def test_texts_are_escaped_and_nothing_is_loaded(run: Path) -> None:
    page = write_reward_report(run).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "default-src 'none'" in page


def test_the_worst_pairs_come_worst_first(run: Path) -> None:
    page = write_reward_report(run).read_text()
    sure = [float(found) for found in re.findall(r"a probability of ([\d.]+)%", page)]
    assert sure == sorted(sure, reverse=True)
    assert sure[0] == pytest.approx(100 / (1 + 2.718281828 ** (-1.0 - 0.1)), abs=0.06)


def test_a_model_that_is_always_right(tmp_path: Path) -> None:
    write(tmp_path, [PairRow("p", "b", "w", 1.0, 0.0, 3, 2)])
    assert "There is none" in write_reward_report(tmp_path).read_text()


def test_a_warning_where_length_explains_it(tmp_path: Path) -> None:
    rows = [PairRow(str(i), "b", "w", 5.0 if i % 5 else -5.0, 0.0, 20 if i % 5 else 5, 10) for i in range(50)]
    write(tmp_path, rows)
    assert "Length may explain this model." in write_reward_report(tmp_path).read_text()


def test_without_figures_there_is_no_page(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(UserError, match="has no 'accuracy'"):
        write_reward_report(tmp_path)
    write(tmp_path, [])
    with pytest.raises(UserError, match="has nothing held out"):
        write_reward_report(tmp_path)
