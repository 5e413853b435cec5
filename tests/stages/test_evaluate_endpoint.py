"""`fledge evaluate --endpoint`: the same figures as of the directory, and mistakes named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fledge import cli
from fledge.engine.text import complete, load_engine
from fledge.types import SamplingParams

from ..on_a_port import on_a_port
from ..serve.real import make_tokenizer, save_random_judge
from .commands import write_jsonl
from .conftest import KEY

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    rows = [{"question": f"What is {i}?", "answer": None if i % 3 else "The cats"} for i in range(20)]
    return write_jsonl(tmp_path / "questions.jsonl", rows)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """Six problems that random weights get wrong."""
    directory = tmp_path / "letters"
    directory.mkdir()
    write_jsonl(directory / "test.jsonl", [{"prompt": f"{i}?", "answer": "e"} for i in range(6)])
    (directory / "manifest.json").write_text(json.dumps({"task": "letters", "reward": "exact"}))
    return directory


def evaluate(out: Path, *flags: object) -> dict[str, Any]:
    assert cli.main(["evaluate", "--out", str(out), *map(str, flags)]) == 0
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def answers(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]


def test_answers_are_those_of_the_directory(
    far_model: Path, far: list[str], questions: Path, tmp_path: Path
) -> None:
    flags = ["--questions", questions, "--max-tokens", 9]
    here = evaluate(tmp_path / "here", "--model", far_model, "--compute", "fp32", *flags)
    there = evaluate(tmp_path / "there", *far, *flags)
    assert answers(tmp_path / "here") == answers(tmp_path / "there") and here["bits_per_byte"] == {}
    ours = {"model", "seconds"}
    assert {k: v for k, v in here.items() if k not in ours} == {
        k: v for k, v in there.items() if k not in ours
    }


def test_a_plain_text_is_sent_as_it_is(
    far_model: Path, far: list[str], questions: Path, tmp_path: Path
) -> None:
    """What stands before it, the server decides: nothing, here."""
    (tmp_path / "shots.txt").write_text("Question: Who?\nAnswer: The cats\n")
    flags = ["--questions", questions, "--ask", "plain", "--few-shot", tmp_path / "shots.txt"]
    evaluate(tmp_path / "out", *far, *flags, "--max-tokens", 30)
    made = answers(tmp_path / "out")
    texts = [f"Question: Who?\nAnswer: The cats\n\nQuestion: {row['question']}\nAnswer:" for row in made]
    params = SamplingParams(temperature=0.0, max_tokens=30, stop=("\n",))
    expected = complete(*load_engine(far_model), texts, params)
    assert [row["answer"] for row in made] == [one.text.strip() for one in expected]
    assert len(made) == 20 and not any("\n" in row["answer"] for row in made)


def test_problems_greedily_and_where_the_answers_are(
    far_model: Path, far: list[str], task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_random_judge(tmp_path / "judge", make_tokenizer())
    flags = ["--tasks", task, "--samples", 4, "--completion-tokens", 12, "--reward-model", tmp_path / "judge"]
    flags += ["--device", "cpu"]
    here = evaluate(tmp_path / "here", "--model", far_model, "--compute", "fp32", *flags)
    there = evaluate(tmp_path / "there", *far, *flags)
    assert there["tasks"]["letters"]["greedy"] == here["tasks"]["letters"]["greedy"]
    greedy = [
        [json.loads(line)["greedy"] for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()]
        for name in ("here", "there")
    ]
    assert greedy[0] == greedy[1] and all(row["tokens"] > 0 for row in greedy[1])
    assert there["tasks"]["letters"]["curves"].keys() == {"verifier", "vote", "reward_model"}
    # The endpoint and the name there stand where the directory would.
    address = far[far.index("--endpoint") + 1]
    assert there["model"] == f"far at {address}"
    page = (tmp_path / "there" / "report.html").read_text().replace("<wbr>", "")
    assert f"far at {address}" in page.replace("\u200b", "")
    for path in (tmp_path / "there").iterdir():
        assert KEY not in path.read_text() and str(far_model) not in path.read_text()
    assert KEY not in "".join(capsys.readouterr())


def test_sampled_answers_differ(far: list[str], task: Path, tmp_path: Path) -> None:
    evaluate(tmp_path / "out", *far, "--tasks", task, "--samples", 6, "--completion-tokens", 12)
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert all(len({one["text"] for one in row["samples"]}) > 1 for row in rows)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "{tmp}/a.txt"], "--data goes with a local model"),
        (["--held-out", "0.1"], "--held-out goes with a local model"),
        (["--baseline", "{tmp}"], "--baseline goes with a local model"),
        (["--window-tokens", "9"], "--window-tokens goes with a local model"),
        (["--compute", "fp32"], "--compute goes with a local model"),
        (["--device", "cpu"], "--device goes with a local model"),
        (["--model", "none"], "404: the model 'none' does not exist"),
        (["--endpoint-key", "FLEDGE_NO_SUCH_KEY"], "no such environment variable"),
        (["--endpoint-key", "FLEDGE_WRONG_KEY"], "401"),
        (["--endpoint", "nowhere"], "not an address"),
        (["--endpoint", "http://127.0.0.1:9/v1"], "nobody answers there"),
        (["--questions", "{tmp}/long.jsonl"], "400: messages has 3"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    flags: list[str], message: str, far: list[str], questions: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("FLEDGE_WRONG_KEY", "the-wrong-key")
    (tmp_path / "a.txt").write_text("a")
    write_jsonl(tmp_path / "long.jsonl", [{"question": "x " * 1500, "answer": None}])
    flags = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    given = {**dict(zip(far[::2], far[1::2], strict=True)), "--questions": str(questions)}
    kept = [word for flag, value in given.items() if flag not in flags for word in (flag, value)]
    before = set(tmp_path.rglob("*"))
    assert cli.main(["evaluate", "--out", str(tmp_path / "out"), *kept, *flags]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("fledge evaluate: error: ") and message in printed.err
    assert printed.err.count("\n") == 1 and "the-wrong-key" not in printed.err and KEY not in printed.err
    assert set(tmp_path.rglob("*")) == before


def test_a_server_that_does_not_count(
    task: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Questions need no counts; what samples cost does."""

    async def answer(request: Request) -> Response:
        choice = {"message": {"role": "assistant", "content": "I do not know."}, "finish_reason": "stop"}
        return JSONResponse({"choices": [choice]})

    with on_a_port(Starlette(routes=[Route("/v1/chat/completions", answer, methods=["POST"])])) as url:
        flags = ["--model", "m", "--endpoint", f"{url}/v1"]
        made = evaluate(tmp_path / "questions", *flags, "--questions", questions)
        assert made["questions"]["questions"]["refused"]["rate"] == 1.0
        command = ["evaluate", *flags, "--tasks", str(task), "--out", str(tmp_path / "tasks")]
        assert cli.main(command) == 2
    assert "usage.completion_tokens" in capsys.readouterr().err
