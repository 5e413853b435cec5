"""The over-optimisation plot: every seed and method, its peak, and figures for those who do not see it."""

from __future__ import annotations

import re
from pathlib import Path

from fledge.report.overoptimization import write_overoptimization_report


def curve(kls: list[float], scores: list[float], golds: list[float]) -> list[dict[str, float]]:
    return [{"kl": k, "score": s, "gold": g} for k, s, g in zip(kls, scores, golds, strict=True)]


def test_a_seed_is_a_line_and_its_peak_a_ring(tmp_path: Path) -> None:
    found = [
        {
            "seed": seed,
            "held": 231,
            "best_of_n": curve([0.0, 0.4, 1.0], [0.0, 1.0, 1.5], [0.1, 0.3, 0.2]),
            "ppo": curve([9.0, 0.0, 4.0], [3.0, 0.0, 2.0], [-0.2, 0.1, 0.4 + seed]),
        }
        for seed in (0, 1)
    ]
    settings = {"rankings": 250, "slips": 0.3, "beta": 0.0}
    text = write_overoptimization_report(tmp_path, found, settings).read_text(encoding="utf-8")
    said = " ".join(re.sub("<[^>]+>", "", text).split())
    assert "250 simulated rankings, 30% of them" in said and "231 questions" in said
    labels = re.findall(r'aria-label="([^"]+)"', text)
    assert len(labels) == 2
    assert "PPO, seed 1: from 0.00 to 3.00 at a KL of 9.0 nats, gold highest at 4.0" in labels[0]
    assert "best of n, seed 0: from 0.10 to 0.20 at a KL of 1.0 nats, gold highest at 0.4" in labels[1]
    score, gold = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert gold.count("var(--ink)") > score.count("var(--ink)"), "rings stand in one of them"
    assert "://" not in re.sub(r"http://www\.w3\.org/\S+", "", text), "nothing is loaded from elsewhere"
