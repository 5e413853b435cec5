"""`fledge plan`: a table for people, JSON for programs, and what stands in the way."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fledge.cli import main


def plans(capsys: pytest.CaptureFixture[str], *flags: str) -> list[dict[str, Any]]:
    assert main(["plan", *flags, "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_a_line_for_each_size_and_number(capsys: pytest.CaptureFixture[str]) -> None:
    found = plans(capsys, "--params", "100M", "1B", "--gpus", "1", "8")
    assert [(one["params"], one["gpus"]) for one in found] == [
        ("100M", 1), ("100M", 8), ("1B", 1), ("1B", 8),
    ]  # fmt: skip
    assert found[0]["traffic"]["gathered"] == 0
    assert found[1]["traffic"]["gathered"] > 0
    assert found[1]["memory"]["weights"] < found[0]["memory"]["weights"]
    # 20 tokens a parameter, all of them in whole steps
    assert found[2]["steps"] * found[2]["tokens"] == pytest.approx(20e9, rel=1e-3)


def test_a_slower_network_costs_time(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--params", "1B", "--gpus", "64"]
    (fast,) = plans(capsys, *flags)
    (slow,) = plans(capsys, *flags, "--network-gb-per-second", "0.1")
    assert slow["seconds"] > 10 * fast["seconds"]
    assert slow["compute_seconds"] == fast["compute_seconds"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--params", "70B", "--gpus", "8"], "a step does not fit"),
        (["--params", "70B", "--gpus", "1024"], "bring the whole model together"),
        (["--params", "1B", "--gpus", "1024"], "GPUs are idle"),
        (["--params", "8B", "--gpus", "1024"], "waits for the network"),
    ],
)
def test_what_breaks_first_is_said(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["plan", *flags]) == 0
    printed = capsys.readouterr().out
    assert words in printed
    assert flags[1] in printed


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpus", "0"], "--gpus"),
        (["--params", "big"], "--params big"),
        (["--reached", "1.5"], "--reached 1.5"),
        (["--gpu-tflops", "0"], "--gpu-tflops"),
        (["--hop-microseconds", "-1"], "--hop-microseconds"),
    ],
)
def test_mistakes_are_named(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *flags]) == 2
    assert words in capsys.readouterr().err
