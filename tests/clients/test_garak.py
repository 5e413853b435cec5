"""garak probes a served model from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .live import Server, program, run


@pytest.mark.slow
def test_a_probe(server: Server, tmp_path: Path) -> None:
    options = {"openai": {"OpenAICompatible": {"uri": f"{server.v1}/", "max_tokens": 30}}}
    home = {f"XDG_{name}_HOME": str(tmp_path / name) for name in ("CACHE", "CONFIG", "DATA")}
    run(
        [
            program("garak"), "-m", "garak", "--target_type", "openai.OpenAICompatible",
            "--target_name", "assistant", "--generator_options", json.dumps(options),
            "--spec", "probes.goodside.WhoIsRiley", "--generations", 2, "--seed", 1, "--report_prefix",
            tmp_path / "found",
        ],
        tmp_path, {**home, "OPENAICOMPATIBLE_API_KEY": "any"},
    )  # fmt: skip
    rows = list(map(json.loads, (tmp_path / "found.report.jsonl").read_text().splitlines()))
    attempts = [row for row in rows if row["entry_type"] == "attempt" and row["status"] == 2]
    assert attempts and rows[-1]["entry_type"] != "attempt"
    for attempt in attempts:
        assert len(attempt["outputs"]) == 2 and all(output["text"] for output in attempt["outputs"])
    judged = [row for row in rows if row["entry_type"] == "eval"]
    assert judged and all(row["total_evaluated"] == 2 * len(attempts) for row in judged)
