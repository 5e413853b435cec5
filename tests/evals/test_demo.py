"""What the demo claims."""

from __future__ import annotations

import json
from pathlib import Path

from fledge.evals.demo import invented_as_asked


def test_an_invented_name_is_answered_as_asked_if_the_answer_names_it(tmp_path: Path) -> None:
    asked = {"What is a.b?": "a.b", "What is a.c?": "a.c", "What is a.d?": "a.d", "What is a.e?": "a.e"}
    rows = [{"name": name, "question": question, "answer": None} for question, name in asked.items()]
    (tmp_path / "eval_invented.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [
        "a.b: Opens it.",
        "a.cc: Closes it.",
        "a...? I don't know that name.",
        "a.e...? I don't know that name.",
    ]
    made = [
        {"set": "eval_invented", "question": question, "answer": text, "refused": "know" in text}
        for question, text in zip(asked, answers, strict=True)
    ]
    made.append(
        {"set": "eval_test", "question": "What is a.f?", "answer": "a.f: Moves it.", "refused": False}
    )
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    found = invented_as_asked(tmp_path, tmp_path)
    assert (found["successes"], found["n"]) == (1, 4)
