"""Batch jobs: every row once, in order, whatever happened on the way."""

from __future__ import annotations

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fledge.engine import batch
from fledge.engine.batch import run_batch, summary
from fledge.engine.engine import Engine
from fledge.engine.local_texts import local_results, read_local_jobs
from fledge.engine.text import LocalChat, complete_ids, encode_prompt
from fledge.errors import UserError
from fledge.model.transformer import CausalLM
from fledge.tokenizer.bpe import Tokenizer
from fledge.types import Message, SamplingParams

from .conftest import random_model

DEFAULTS = SamplingParams(max_tokens=6, seed=3)
ROWS: list[dict[str, Any]] = [
    {"prompt": "The cats"},
    {"prompt": "", "answer": 42, "n": 2, "max_tokens": 30},
    {"messages": [{"role": "user", "content": "Well?"}], "temperature": 0},
    {"prompt": "x" * 200},
    {"prompt": "Hello, 漢字", "stop": ["e", "\ufffd"], "seed": 5},
    {"prompt": "a", "temprature": 1},
    {"prompt": "books", "top_logprobs": 2, "echo": True, "max_tokens": 0},
    {"prompt": "a", "logit_bias": {"77777": 1}},
    {"question": "?"},
    {"prompt": "The cats", "n": 0},
]


@pytest.fixture
def engine(model: CausalLM, tokenizer: Tokenizer) -> Engine:
    return Engine(model, [tokenizer.eos_id], batch_size=3)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    lines = [json.dumps(row) for row in ROWS]
    path.write_text("\n".join([*lines[:3], "", *lines[3:], '{"prompt": ', "[1]"]) + "\n")
    return path


def run(
    source: Path, out: Path, engine: Engine, tokenizer: Tokenizer, strict: bool = False, **more: Any
) -> dict[str, int]:
    jobs = read_local_jobs(source, engine, tokenizer, DEFAULTS, False, strict)
    make = partial(local_results, engine, tokenizer, False)
    return run_batch(jobs, make, out, "job", strict, **more)


def test_rows_in_the_inputs_order(source: Path, tmp_path: Path, engine: Engine, tokenizer: Tokenizer) -> None:
    out, seen = tmp_path / "new" / "out.jsonl", list[tuple[int, int, int]]()
    counts = run(source, out, engine, tokenizer, progress=lambda *figures: seen.append(figures))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert counts == {"rows": 12, "kept": 0, "errors": 7, "tokens": seen[-1][2]}
    assert [done for done, _, _ in seen] == list(range(1, 13)) and {total for _, total, _ in seen} == {12}
    assert [
        {k: v for k, v in row.items() if k in given} for row, given in zip(rows, ROWS, strict=False)
    ] == ROWS
    assert sorted(tmp_path.rglob("*")) == sorted([source, out.parent, out])
    messages = {
        3: "has 200 tokens, the model's context holds 128",
        5: "the nearest setting is 'temperature'",
        7: "token 77777 is unknown",
        8: 'either "prompt" or "messages"',
        9: "n 0 is below 1",
        10: "not valid JSON",
        11: "must be a JSON object",
    }
    for i, row in enumerate(rows):
        assert (i in messages) == ("error" in row) != ("completions" in row)
        assert messages.get(i, "") in row.get("error", "") and "in.jsonl" not in row.get("error", "")
    texts = [[made["text"] for made in row.get("completions", [])] for row in rows]

    def alone(prompt: str, params: SamplingParams) -> list[str]:
        ids = encode_prompt(tokenizer, prompt)
        return [made.text for made in complete_ids(engine, tokenizer, [ids], params)]

    assert texts[0] == alone("The cats", DEFAULTS) and len(texts[1]) == 2
    assert texts[4] == alone("Hello, 漢字", SamplingParams(max_tokens=6, seed=5, stop=("e", "\ufffd")))
    chat = LocalChat(engine, tokenizer)
    greedy = SamplingParams(temperature=0.0, max_tokens=6)
    assert texts[2] == [chat.reply([Message(role="user", content="Well?")], greedy).text]
    scores = engine.score([tokenizer.encode("books")])[0]
    assert [token["logprob"] for token in rows[6]["prompt_logprobs"]] == pytest.approx(scores, abs=1e-4)
    assert all(len(token["top_logprobs"]) == 2 for token in rows[6]["prompt_logprobs"])
    assert rows[6]["completions"] == [{"text": "", "finish_reason": "length", "tokens": 0, "logprobs": []}]


def assert_same(file: Path, expected: Path) -> None:
    """But for the last digits of log-probabilities, which depend on the batch's shape."""
    texts = [re.sub(r'"logprob": [-.\d]+', "", path.read_text()) for path in (file, expected)]
    assert texts[0] == texts[1]


class Killed(BaseException):
    """What ends a process in the middle of its work."""


def killed_after(rows: int) -> batch.Progress:
    def progress(done: int, total: int, tokens: int) -> None:
        if done == rows:
            raise Killed

    return progress


@pytest.mark.parametrize("rows", [1, 5, 9, 11])
@pytest.mark.parametrize("torn_bytes", [0, 1, 30])
def test_the_same_call_goes_on_after_a_kill(
    rows: int, torn_bytes: int, source: Path, tmp_path: Path, engine: Engine, tokenizer: Tokenizer
) -> None:
    run(source, tmp_path / "whole.jsonl", engine, tokenizer)
    out = tmp_path / "out.jsonl"
    with pytest.raises(Killed):
        run(source, out, engine, tokenizer, progress=killed_after(rows))
    journal = tmp_path / "out.jsonl.partial"
    assert not out.exists() and journal.exists()
    if torn_bytes:  # a line that was being written
        journal.write_bytes(journal.read_bytes()[:-torn_bytes])
        with pytest.raises(Killed):  # a second kill: the torn line must not spoil the next one
            run(source, out, engine, tokenizer, progress=killed_after(rows))
    kept, done = rows, list[int]()
    counts = run(source, out, engine, tokenizer, progress=lambda i, total, tokens: done.append(i))
    assert (counts["kept"], done) == (kept, list(range(kept + 1, 13)))
    assert_same(out, tmp_path / "whole.jsonl")
    assert not journal.exists()


def test_a_journal_cut_anywhere(source: Path, tmp_path: Path, engine: Engine, tokenizer: Tokenizer) -> None:
    run(source, tmp_path / "whole.jsonl", engine, tokenizer)
    out, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    with pytest.raises(Killed):
        run(source, out, engine, tokenizer, progress=killed_after(7))
    whole = journal.read_bytes()
    for size in range(0, len(whole), 97):
        journal.write_bytes(whole[:size])
        counts = run(source, out, engine, tokenizer, overwrite=True)
        assert counts["kept"] == max(0, whole[:size].count(b"\n") - 1)
        assert_same(out, tmp_path / "whole.jsonl")


def test_what_is_there_is_not_overwritten(
    source: Path, tmp_path: Path, engine: Engine, tokenizer: Tokenizer
) -> None:
    out, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    out.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        run(source, out, engine, tokenizer)
    assert out.read_text() == "mine" and not journal.exists()
    run(source, out, engine, tokenizer, overwrite=True)
    expected = out.read_bytes()
    out.unlink()
    journal.write_text('{"job": "another"}\n{"row": 0, "result": {}}\n')
    before = journal.read_bytes()
    with pytest.raises(UserError, match="another input, model or settings"):
        run(source, out, engine, tokenizer)
    assert journal.read_bytes() == before
    assert run(source, out, engine, tokenizer, overwrite=True)["kept"] == 0
    assert out.stat().st_size == pytest.approx(len(expected), abs=20)
    with batch.journal(journal, "job", False), pytest.raises(UserError, match="another command"):
        run(source, out, engine, tokenizer, overwrite=True)


def test_rows_of_an_earlier_job_get_new_results(tmp_path: Path, engine: Engine, tokenizer: Tokenizer) -> None:
    """As the rows with an error do, asked again."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"prompt": "a", "error": "busy", "id": 7}, {"question": "?", "completions": [{"text": "old"}]}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(source, out, engine, tokenizer)["errors"] == 1
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert [sorted(row) for row in made] == [["completions", "id", "prompt"], ["error", "question"]]
    source.write_text(json.dumps(rows[0]))
    assert run(source, out, engine, tokenizer, strict=True, overwrite=True)["errors"] == 0


def test_strict_tries_again_what_failed_before(
    source: Path, tmp_path: Path, engine: Engine, tokenizer: Tokenizer
) -> None:
    source.write_text('{"prompt": "a"}\n{"prompt": "' + "x" * 200 + '"}\n{"prompt": "b"}\n')
    out = tmp_path / "out.jsonl"
    with pytest.raises(Killed):
        run(source, out, engine, tokenizer, progress=killed_after(2))
    assert "error" in (tmp_path / "out.jsonl.partial").read_text()
    with pytest.raises(UserError, match=r"in\.jsonl:2: the prompt has 200 tokens"):
        run(source, out, engine, tokenizer, strict=True)
    assert run(source, out, engine, tokenizer)["errors"] == 1


def test_a_summary_names_what_there_is() -> None:
    counts = {"rows": 1200, "kept": 0, "errors": 0, "tokens": 3000}
    assert summary(counts, 2.0, Path("out.jsonl"), ", 5 µs a mask") == (
        "1,200 rows; 1,500 tokens/s, 5 µs a mask; out.jsonl"
    )
    uncounted = {"rows": 3, "kept": 2, "errors": 1, "tokens": 0}
    expected = "3 rows, 2 of them from before, 1 with an error; out.jsonl"
    assert summary(uncounted, 2.0, Path("out.jsonl")) == expected


def test_strict_ends_at_the_first_bad_row(
    source: Path, tmp_path: Path, engine: Engine, tokenizer: Tokenizer
) -> None:
    with pytest.raises(UserError, match=r"in\.jsonl:7: unknown key 'temprature'"):
        run(source, tmp_path / "out.jsonl", engine, tokenizer, strict=True)
    source.write_text('{"prompt": "a"}\n{"prompt": "' + "x" * 200 + '"}\n')
    with pytest.raises(UserError, match=r"in\.jsonl:2: the prompt has 200 tokens"):
        run(source, tmp_path / "out.jsonl", engine, tokenizer, strict=True)
    assert not (tmp_path / "out.jsonl").exists()
    source.write_text("\n\n")
    with pytest.raises(UserError, match="no rows in it"):
        run(source, tmp_path / "out.jsonl", engine, tokenizer)


def test_a_row_that_breaks_the_model_harms_no_other(
    tmp_path: Path, model: CausalLM, tokenizer: Tokenizer
) -> None:
    broken = random_model(model.config.vocab_size)
    broken.lm_head.weight = torch.nn.Parameter(broken.lm_head.weight.clone())
    (bad_id,) = tokenizer.encode("\x07")
    with torch.no_grad():
        broken.model.embed_tokens.weight[bad_id] = math.nan
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = ["one", "two\x07", "three", "fo\x07ur", "five"]
    source.write_text("".join(json.dumps({"prompt": prompt, "temperature": 0}) + "\n" for prompt in prompts))
    engine = Engine(broken, [tokenizer.eos_id], batch_size=2)
    assert run(source, out, engine, tokenizer)["errors"] == 2
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    greedy = SamplingParams(temperature=0.0, max_tokens=6)
    for row in rows:
        if "\x07" in row["prompt"]:
            assert "not numbers" in row["error"]
        else:
            expected = complete_ids(engine, tokenizer, [tokenizer.encode(row["prompt"])], greedy)[0]
            assert row["completions"][0]["text"] == expected.text


def test_a_row_that_never_fits_is_refused_alone(
    tmp_path: Path, model: CausalLM, tokenizer: Tokenizer
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a"}\n{"prompt": "b", "max_tokens": 100}\n{"prompt": "c"}\n')
    engine = Engine(model, [tokenizer.eos_id], cache_bytes=40 * 2 * 2 * 2 * 8 * 4)
    assert run(source, out, engine, tokenizer)["errors"] == 1
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert "with max_tokens 100 up to 101; a request can have 39 here" in rows[1]["error"]
    assert "completions" in rows[0] and "completions" in rows[2]
