"""The labeler that is a written rule: its order, its slips, its padded answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fledge.data.preferences import read_rankings
from fledge.evals.simulated_preferences import PADDING, gold_score, kind_of, ranked, write_preferences

GOLD = "Return the length of the object."
RIGHT, WRONG, UNKNOWN = GOLD, "Close the file.", "I don't know that name."


@pytest.mark.parametrize(
    ("answer", "gold", "kind", "score"),
    [
        (RIGHT, GOLD, "right", 1.0),
        (WRONG, GOLD, "wrong", -1.0),
        (UNKNOWN, GOLD, "unknown", 0.0),
        (UNKNOWN, None, "unknown", 0.0),
        (RIGHT, None, "invented", -1.0),
    ],
)
def test_what_an_answer_is_and_is_worth(answer: str, gold: str | None, kind: str, score: float) -> None:
    assert kind_of(answer, gold) == kind
    assert gold_score(answer, gold) == score


def row(number: int, answer: str | None = GOLD) -> dict[str, object]:
    return {"question": f"What does f{number} do?", "answer": answer}


def test_by_hand() -> None:
    """Equal answers stand once; nothing to prefer, no ranking."""
    answers = [[WRONG, RIGHT, UNKNOWN, RIGHT], [RIGHT, RIGHT], [WRONG, "Open it."], [WRONG, UNKNOWN]]
    found = ranked([row(0), row(1), row(2), row(3, None)], answers, seed=0, noise=0.0, padded=0.0)
    assert found == [
        {"prompt": "What does f0 do?", "completions": [WRONG, RIGHT, UNKNOWN], "ranks": [4, 1, 3],
         "kinds": ["wrong", "right", "unknown"], "labeler": "rule", "simulated": True},
        {"prompt": "What does f3 do?", "completions": [WRONG, UNKNOWN], "ranks": [4, 3],
         "kinds": ["invented", "unknown"], "labeler": "rule", "simulated": True},
    ]  # fmt: skip


def test_a_padded_answer_is_just_below_the_same_without() -> None:
    rows, answers = [row(i) for i in range(200)], [[RIGHT, WRONG, UNKNOWN]] * 200
    for found in ranked(rows, answers, seed=1, noise=0.0, padded=1.0):
        *plain, padded = zip(found["completions"], found["ranks"], found["kinds"], strict=True)
        ranks = {text: rank for text, rank, _ in plain}
        text, rank, kind = padded
        original = next(text.removesuffix(filler) for filler in PADDING if text.endswith(filler))
        assert original in (RIGHT, WRONG) and kind == "padded"  # "I do not know" is not padded
        assert rank == ranks[original] + 1
        assert (rank < ranks[UNKNOWN]) is (original == RIGHT)


def test_padding_alone_makes_a_preference() -> None:
    (found,) = ranked([row(0)], [[RIGHT]], seed=0, noise=0.0, padded=1.0)
    assert found["ranks"] == [1, 2] and found["kinds"] == ["right", "padded"]
    assert ranked([row(0, None)], [[UNKNOWN]], seed=0, noise=0.0, padded=1.0) == []


def test_shares_of_slips_and_of_padded_prompts() -> None:
    """Of 4,000: within four standard deviations of 10% and of 50%."""
    rows, answers = [row(i) for i in range(4000)], [[RIGHT, WRONG, UNKNOWN]] * 4000
    clean = ranked(rows, answers, seed=5, noise=0.0, padded=0.5)
    noisy = ranked(rows, answers, seed=5, noise=0.1, padded=0.5)
    padded = sum("padded" in found["kinds"] for found in clean)
    assert abs(padded - 2000) < 4 * 32
    # A slip exchanges two places, and nothing else.
    slips = [(a, b) for a, b in zip(clean, noisy, strict=True) if a["ranks"] != b["ranks"]]
    assert abs(len(slips) - 400) < 4 * 19
    for a, b in slips:
        assert sum(x != y for x, y in zip(a["ranks"], b["ranks"], strict=True)) == 2
        assert sorted(a["ranks"]) == sorted(b["ranks"])
        assert {**a, "ranks": 0} == {**b, "ranks": 0}


def test_the_same_seed_gives_the_same_and_another_does_not() -> None:
    rows, answers = [row(i) for i in range(50)], [[RIGHT, WRONG, UNKNOWN]] * 50
    settings = {"noise": 0.1, "padded": 0.5}
    assert ranked(rows, answers, 0, **settings) == ranked(rows, answers, 0, **settings)
    assert ranked(rows, answers, 0, **settings) != ranked(rows, answers, 1, **settings)


def test_what_is_written_is_read_as_rankings_marked_as_simulated(tmp_path: Path) -> None:
    rows, answers = [row(0), row(1)], [[RIGHT, WRONG], [WRONG, UNKNOWN]]
    rankings = ranked(rows, answers, seed=0, noise=0.0, padded=0.0)
    kinds = write_preferences(tmp_path / "p.jsonl", rankings)
    assert kinds == {"right": 1, "wrong": 2, "unknown": 1}
    read = list(read_rankings(tmp_path / "p.jsonl"))
    assert [found.ranks for found in read] == [[1, 4], [4, 3]]
    assert all(found.simulated and found.labeler == "rule" for found in read)
    assert all(
        json.loads(line)["simulated"] is True for line in (tmp_path / "p.jsonl").read_text().splitlines()
    )
