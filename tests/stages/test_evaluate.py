"""`fledge evaluate`: figures that can be computed another way, and mistakes named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fledge import cli
from fledge.data.sources import Source, read_documents, split_documents
from fledge.model.checkpoint import load_model
from fledge.tokenizer.bpe import Tokenizer

pytestmark = pytest.mark.usefixtures("quick")

REFUSAL = "I do not know that name."


def evaluate(out: Path, *flags: str) -> dict[str, Any]:
    assert cli.main(["evaluate", "--out", str(out), "--compute", "fp32", *flags]) == 0
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def write_questions(path: Path, rows: list[tuple[str, str | None]]) -> Path:
    path.write_text(
        "\n".join(json.dumps({"question": question, "answer": answer}) for question, answer in rows)
    )
    return path


def bits_by_hand(model: Path, documents: list[str]) -> float:
    """Each document whole, behind the separator."""
    network, tokenizer = load_model(model), Tokenizer.load(model)
    nats, size = 0.0, 0
    for text in documents:
        ids = torch.tensor([[tokenizer.eos_id, *tokenizer.encode(text)]])
        with torch.no_grad():
            logps = network(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None])
        nats -= float(logps.sum())
        size += len(text.encode())
    return nats / math.log(2) / size


def test_bits_per_byte(base_run: Path, tmp_path: Path) -> None:
    documents = ["the quick brown fox", "été " * 5, "birds<|endoftext|>"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    summary = evaluate(
        tmp_path / "out", "--model", f"{base_run}/model/", "--data", f"[/x]={tmp_path}/a.jsonl"
    )
    assert summary["bits_per_byte"] == {
        "[/x]": pytest.approx(bits_by_hand(base_run / "model", documents), rel=1e-4)
    }
    assert summary["questions"] == {}
    assert summary["stage"] == "evaluate"
    assert summary["model"] == str(base_run / "model")
    assert (tmp_path / "out" / "answers.jsonl").read_text() == ""


def test_a_window_may_be_short(base_run: Path, tmp_path: Path) -> None:
    """Of one token: every token is predicted from the one before it alone."""
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over")
    flags = ["--model", str(base_run / "model"), "--data", str(tmp_path / "a.txt")]
    network, tokenizer = load_model(base_run / "model"), Tokenizer.load(base_run / "model")
    ids = [tokenizer.eos_id, *tokenizer.encode("the quick brown fox jumps over")]
    with torch.no_grad():
        logps = network(torch.tensor(ids[:-1])[:, None]).log_softmax(-1)[:, 0]
    expected = -float(logps[range(len(ids) - 1), ids[1:]].sum()) / math.log(2) / 30
    short = evaluate(tmp_path / "short", *flags, "--window-tokens", "1")
    assert short["bits_per_byte"]["a"] == pytest.approx(expected, rel=1e-4)
    long = evaluate(tmp_path / "long", *flags, "--window-tokens", "100000")  # as much as the context holds
    assert long["bits_per_byte"]["a"] < expected


def test_what_pretraining_held_out_can_be_scored_alone(base_run: Path, corpus: Path, tmp_path: Path) -> None:
    """The same figure as the training's own last one."""
    words = Source("words", str(corpus / "words.txt"), None)
    _, held_out = split_documents(list(read_documents(words)), 0.01)
    flags = ["--model", str(base_run / "model"), "--data", str(corpus / "words.txt")]
    summary = evaluate(tmp_path / "out", *flags, "--held-out", "0.01", "--window-tokens", "64")
    trained = json.loads((base_run / "summary.json").read_text())["bits_per_byte"]
    assert summary["bits_per_byte"]["words"] == pytest.approx(trained["words"], rel=1e-4)
    assert len(held_out) < 10


def test_questions_are_scored(chat_run: Path, tmp_path: Path) -> None:
    """The assistant of these tests refuses whatever it is asked."""
    known = write_questions(
        tmp_path / "known.jsonl",
        [("What is fox?", "a quick animal"), ("What is dog?", REFUSAL), ("Who?", "me")],
    )
    unknown = write_questions(
        tmp_path / "unknown.jsonl", [("What is lazy birds?", None), ("What is river?", None)]
    )
    summary = evaluate(
        tmp_path / "out",
        "--model",
        str(chat_run / "model"),
        "--questions",
        str(known),
        str(unknown),
        "--batch-size",
        "2",
    )
    assert summary["questions"]["known"]["right"]["successes"] == 1
    assert summary["questions"]["known"]["right"]["n"] == 3
    assert summary["questions"]["known"]["right"]["rate"] == pytest.approx(1 / 3)
    assert (
        0
        < summary["questions"]["known"]["right"]["low"]
        < 1 / 3
        < summary["questions"]["known"]["right"]["high"]
        < 1
    )
    assert summary["questions"]["known"]["refused"]["rate"] == 1.0
    assert summary["questions"]["unknown"]["right"] is None
    assert summary["questions"]["unknown"]["mean_f1"] is None
    assert summary["questions"]["unknown"]["refused"]["successes"] == 2
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [row["question"] for row in answers] == [
        "What is fox?", "What is dog?", "Who?", "What is lazy birds?", "What is river?",
    ]  # fmt: skip
    assert [row["set"] for row in answers] == ["known"] * 3 + ["unknown"] * 2
    assert {row["answer"] for row in answers} == {REFUSAL}
    assert [row["f1"] for row in answers][1:] == [1.0, 0.0, None, None]
    assert all(row["refused"] and row["finish_reason"] == "stop" for row in answers)
    assert summary["questions"]["known"]["mean_f1"] == pytest.approx(
        sum(row["f1"] for row in answers[:3]) / 3
    )


def test_only_the_first_questions(chat_run: Path, tmp_path: Path) -> None:
    path = write_questions(tmp_path / "q.jsonl", [(f"What is {i}?", None) for i in range(9)])
    summary = evaluate(
        tmp_path / "out", "--model", str(chat_run / "model"), "--questions", str(path), "--limit", "4"
    )
    assert summary["questions"]["q"]["refused"]["n"] == 4


def test_a_base_model_is_asked_plainly(base_run: Path, tmp_path: Path) -> None:
    """One line, greedily: examples before the question change the answer."""
    path = write_questions(tmp_path / "q.jsonl", [("the quick brown", "fox")])
    (tmp_path / "shots.txt").write_text("Question: over a lazy dog\nAnswer: trees near blue rivers\n")
    flags = [
        "--model",
        str(base_run / "model"),
        "--questions",
        str(path),
        "--ask",
        "plain",
        "--max-tokens",
        "12",
    ]
    plain = evaluate(tmp_path / "plain", *flags)
    evaluate(tmp_path / "shots", *flags, "--few-shot", str(tmp_path / "shots.txt"))
    answers = [
        json.loads((tmp_path / name / "answers.jsonl").read_text())["answer"] for name in ("plain", "shots")
    ]
    assert plain["questions"]["q"]["right"]["n"] == 1
    assert all("\n" not in answer for answer in answers)
    assert answers[0] != answers[1]


def test_existing_results_stay_until_they_are_replaced(
    base_run: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = ["--model", str(base_run / "model"), "--data"]
    first = evaluate(out, *flags, str(corpus / "words.txt"))
    before = {path: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    command = ["evaluate", "--out", str(out), *flags, str(corpus / "numbers.jsonl")]
    assert cli.main(command) == 2
    assert f"{out}: exists already; choose another --out or pass --overwrite" in capsys.readouterr().err
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    assert cli.main(["evaluate", "--out", str(out), *flags, str(tmp_path / "bad.txt"), "--overwrite"]) == 2
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert cli.main([*command, "--overwrite"]) == 0
    assert (
        json.loads((out / "summary.json").read_text())["bits_per_byte"].keys()
        != first["bits_per_byte"].keys()
    )
    assert {path.name for path in out.iterdir()} == {
        "config.toml", "answers.jsonl", "summary.json", "report.html",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to measure: give --data texts, --questions files or --tasks"),
        (["--data", "{tmp}/nothing.txt"], "no such file or folder: {tmp}/nothing.txt"),
        (["--data", "{tmp}/empty.txt"], "{tmp}/empty.txt: no text to score"),
        (["--data", "{tmp}/bad.txt"], "{tmp}/bad.txt:1: not valid UTF-8"),
        (["--data", "{tmp}/good.jsonl"], '{tmp}/good.jsonl:1: the line has no field "text"'),
        (["--questions", "{tmp}/nothing.jsonl"], "{tmp}/nothing.jsonl: no such file"),
        (["--questions", "{tmp}"], "{tmp}: cannot be read: Is a directory"),
        (["--questions", "{tmp}/empty.txt"], "{tmp}/empty.txt: no questions in it"),
        (["--questions", "{tmp}/broken.jsonl"], "{tmp}/broken.jsonl:2: not valid JSON"),
        (["--questions", "{tmp}/text.jsonl"], '{tmp}/text.jsonl:1: the line has no field "question"'),
        (
            ["--questions", "{tmp}/number.jsonl"],
            '{tmp}/number.jsonl:1: the field "answer" must be a text, or null',
        ),
        (
            ["--questions", "{tmp}/open.jsonl"],
            '{tmp}/open.jsonl:1: the field "answer" must be a text, or null',
        ),
        (["--questions", "{tmp}/good.jsonl", "{tmp}/sub/good.jsonl"], "two files are called 'good'"),
        (["--questions", "{tmp}/good.jsonl", "--limit", "0"], "--limit 0: must be at least 1"),
        (["--questions", "{tmp}/good.jsonl", "--max-tokens", "0"], "--max-tokens 0: must be at least 1"),
        (
            ["--questions", "{tmp}/good.jsonl", "--ask", "plain", "--few-shot", "{tmp}/no"],
            "{tmp}/no: no such file",
        ),
        (
            ["--questions", "{tmp}/good.jsonl", "--few-shot", "{tmp}/a.txt"],
            "--few-shot goes with --ask plain",
        ),
        (["--questions", "{tmp}/long.jsonl"], "the model's context holds 128; shorten it"),
        (["--data", "{tmp}/a.txt", "--window-tokens", "0"], "--window-tokens 0: must be at least 1"),
        (["--data", "{tmp}/a.txt", "--held-out", "1"], "--held-out 1.0: must be between 0 and 1"),
        (["--data", "{tmp}/a.txt", "--model", "{tmp}/nothing"], "{tmp}/nothing: no such model directory"),
        (["--data", "{tmp}/a.txt", "--device", "tpu"], 'Invalid value "tpu" for --device'),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    flags: list[str], message: str, chat_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sub").mkdir()
    for name, content in {
        "empty.txt": "", "a.txt": "a", "good.jsonl": '{"question": "a", "answer": "b"}',
        "sub/good.jsonl": '{"question": "a", "answer": "b"}', "text.jsonl": '{"text": "a"}',
        "broken.jsonl": '{"question": "a", "answer": "b"}\n{',
        "number.jsonl": '{"question": "a", "answer": 3}',
        "open.jsonl": '{"question": "a"}', "long.jsonl": json.dumps({"question": "a" * 500, "answer": None}),
    }.items():  # fmt: skip
        (tmp_path / name).write_text(content)
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    words = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    model = [] if "--model" in words else ["--model", str(chat_run / "model")]
    before = set(tmp_path.rglob("*"))
    assert cli.main(["evaluate", "--out", str(tmp_path / "out"), *model, *words]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("fledge evaluate: error: ")
    assert printed.err.count("\n") == 1
    assert message.replace("{tmp}", str(tmp_path)) in printed.err
    assert set(tmp_path.rglob("*")) == before
