"""Evaluation texts in training documents: which runs of words count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import zstandard

from fledge.data.decontamination import Evaluations, evaluation_texts
from fledge.data.words import word_hashes, words_of
from fledge.errors import UserError

THIRTEEN = "one two three four five six seven eight nine ten eleven twelve thirteen"
EIGHT = "Which planet of ours has the most moons?"


def find(evaluations: Evaluations, text: str) -> str | None:
    words = words_of(text)
    return evaluations.find(words, word_hashes(words))


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "questions.jsonl"
    rows = [
        {"question": f"Alpha {THIRTEEN} omega", "answer": "Yes", "n": 3},
        {"question": EIGHT, "choices": ["Saturn", {"text": "Jupiter, Mars and Venus as well as all others"}]},
        {"numbers": " ".join(map(str, range(40))), "unknown": "unk " * 40},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_thirteen_words_in_a_row_are_found_whatever_is_between(rows: str) -> None:
    evaluations = Evaluations([rows])
    text = f"Some words. {THIRTEEN.upper().replace(' ', ', ')}. More words."
    assert find(evaluations, text) == f"13 words are in {rows}: {THIRTEEN}"
    assert find(evaluations, " ".join(THIRTEEN.split()[:12]) + " other") is None
    assert find(evaluations, "") is None


def test_texts_of_eight_to_twelve_words_are_found_whole(rows: str) -> None:
    evaluations = Evaluations([rows])
    assert find(evaluations, f"He asked: {EIGHT}") == f"8 words are in {rows}: " + " ".join(words_of(EIGHT))
    assert find(evaluations, EIGHT.removesuffix("moons?") + "rings") is None
    assert find(evaluations, "saturn, jupiter; yes") is None  # too short to look for
    assert find(evaluations, "JUPITER Mars and Venus, as well as all others!") is not None


def test_tables_and_lists_tell_nothing(rows: str) -> None:
    evaluations = Evaluations([rows])
    assert find(evaluations, " ".join(map(str, range(40)))) is None
    assert find(evaluations, "unk " * 40) is None


def test_evaluations_are_masked_like_the_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("Please write to jane@example.org or to anyone else who may have the answer to this")
    masked = "please write to <email> or to anyone else who may have the answer to this"
    assert find(Evaluations([str(path)]), masked) is None
    assert find(Evaluations([str(path)], ("email",)), masked) is not None


def test_what_an_evaluation_file_holds(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("first question\nsecond question\n")
    (tmp_path / "paragraphs.txt").write_text("a question\nof two lines\n\nanother\n")
    packed = zstandard.compress(json.dumps({"a": {"b": ["x", 3, None]}, "c": "y"}).encode())
    (tmp_path / "rows.jsonl.zst").write_bytes(packed)
    assert list(evaluation_texts(str(tmp_path / "lines.txt"))) == ["first question", "second question"]
    assert list(evaluation_texts(str(tmp_path / "paragraphs.txt"))) == ["a question\nof two lines", "another"]
    assert list(evaluation_texts(str(tmp_path / "rows.jsonl.zst"))) == ["x", "y"]
    assert len(list(evaluation_texts(str(tmp_path)))) == 6


def test_a_file_with_nothing_to_look_for_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"answer": "yes"}\n')
    with pytest.raises(UserError, match=r"answers\.jsonl: no text of 8 words or more"):
        Evaluations([str(path)])
    with pytest.raises(UserError, match="missing"):
        Evaluations([str(tmp_path / "missing.jsonl")])
