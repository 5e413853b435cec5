"""The page on self-play: curves of each seed, levels of others, and what was reached."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fledge.report.self_play import write_self_play_report


def trial(seed: int) -> dict[str, Any]:
    def curve(first: float) -> list[dict[str, float]]:
        return [{"rollouts": 10 * i, "lost": first / (i + 1), "p_won": 1 - first / (i + 1)} for i in range(4)]

    player = {"lost": {"random": 7.0, "<b>": 1234.0}, "p_won": 0.875, "p_lost": 0.0625}
    return {
        "seed": seed, "imitation": curve(0.4), "alone": curve(0.6),
        "players": {"imitation": player, "alone": player},
    }  # fmt: skip


def test_the_page(tmp_path: Path) -> None:
    result = {
        "parameters": 413_056, "opponents": ["random", "<b>"], "levels": {"p_won": {"weak player": 0.668}},
        "trials": [trial(0), trial(1)],
    }  # fmt: skip
    page = write_self_play_report(tmp_path, result).read_text()
    assert page.count("<svg") == 2 and "413,056" in page
    assert page.count('<td class="number">87.5%</td>') == 4, "two starts, two seeds"
    assert "1,234" in page and "&lt;b&gt;" in page and "<b>" not in page
    assert "imitation, then self-play, seed 1: from 40.0% to 10.0%" in page
    assert "weak player 66.8%" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page) and "<script" not in page
