"""Corrections: what the page sends becomes lines that the other stages read, and nothing else gets in."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from fledge.data.preferences import read_rankings
from fledge.errors import UserError
from fledge.feedback.exports import export_rows
from fledge.feedback.forms import ProjectSettings
from fledge.feedback.imports import import_labels, read_labels
from fledge.feedback.store import Store, add_project
from fledge.serve.corrections import CorrectionFile, correction_row

BODY: dict[str, Any] = {
    "model": "tiny",
    "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Capital of France?"}],
    "rejected": {"role": "assistant", "content": "Lyon."},
    "correction": "Paris.\nIt is \u20ac\U0001f600.",
    "sampling": {"temperature": 0.8, "max_tokens": 512, "seed": 7},
}


def test_a_correction_is_read_by_every_stage(tmp_path: Path) -> None:
    file = CorrectionFile(tmp_path / "new" / "corrections.jsonl")
    file.add(correction_row(BODY, ["tiny"]))
    (ranking,) = read_rankings(file.path)  # dpo, reward
    assert ranking.prompt == BODY["prompt"]
    assert ranking.completions == [
        [{"role": "assistant", "content": BODY["correction"]}], [BODY["rejected"]],
    ]  # fmt: skip
    assert ranking.ranks == [1, 2]
    (row,) = read_labels(file.path, "trl")  # label import
    assert row["models"] == ["correction", "tiny"]
    store = Store(str(tmp_path / "labels.db"))
    project = add_project(store, ProjectSettings("Corrections", ("ranking",), outputs_per_prompt=2))
    import_labels(store, project, read_labels(file.path, "trl"), "corrections.jsonl")
    (pair,) = export_rows(store, project, "preference")
    assert pair["chosen"] == ranking.completions[0]
    assert pair["rejected"] == ranking.completions[1]
    store.close()
    (line,) = map(json.loads, file.path.read_text(encoding="utf-8").splitlines())
    assert line["sampling"] == BODY["sampling"]


def test_a_called_tool_may_be_what_was_wrong(tmp_path: Path) -> None:
    call = {"id": "call_0", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    rejected = {"role": "assistant", "content": "", "tool_calls": [call]}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    history = [
        {"role": "user", "content": "1 + 1?"}, rejected,
        {"role": "tool", "tool_call_id": "call_0", "content": "2"},
    ]  # fmt: skip
    file = CorrectionFile(tmp_path / "corrections.jsonl")
    file.add(correction_row(BODY | {"prompt": history, "rejected": rejected, "tools": tools}, ["tiny"]))
    (ranking,) = read_rankings(file.path)
    assert (ranking.prompt, ranking.tools) == (history, tools)
    assert ranking.completions[1] == [rejected]


@pytest.mark.parametrize(("change", "said"), [
    ({"model": "other"}, "this server has tiny"),
    ({"correction": " "}, "the text is empty"),
    ({"correction": "Lyon."}, "the model's own answer"),
    ({"correction": "x" * 100_001}, "100,001 characters"),
    ({"correction": ["Paris."]}, "the text is empty"),
    ({"prompt": []}, "prompt must be a list"),
    ({"prompt": "Capital?"}, "prompt must be a list"),
    ({"prompt": [{"role": "root", "content": "x"}]}, "prompt[0] is no message"),
    ({"prompt": [{"role": "user", "content": {"a": 1}}]}, "content of prompt[0]"),
    ({"prompt": [{"role": "assistant", "content": "x"}]}, "must end with a turn of somebody else"),
    ({"rejected": {"role": "user", "content": "x"}}, "not of the assistant"),
    ({"rejected": None}, "rejected is no message"),
    ({"rejected": {"role": "assistant", "content": "", "tool_calls": 1}}, "no list"),
    ({"tools": "add"}, "tools"),
    ({"sampling": {"temperature": "hot"}}, "sampling.temperature is 'hot'"),
    ({"sampling": {"seed": float("inf")}}, "sampling.seed"),
    ({"sampling": [1]}, "sampling is no JSON object"),
])  # fmt: skip
def test_what_is_no_correction_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        correction_row(BODY | change, ["tiny"])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_only_known_fields_are_stored() -> None:
    body = BODY | {"path": "/etc", "sampling": {"temperature": 0.5, "evil": 1}}
    body["rejected"] = {"role": "assistant", "content": "Lyon.", "evil": 1}
    row = correction_row(body, ["tiny"])
    assert sorted(row) == ["chosen", "models", "prompt", "rejected", "sampling"]
    assert row["sampling"] == {"temperature": 0.5}
    assert row["rejected"] == [{"role": "assistant", "content": "Lyon."}]


def test_a_click_sent_twice_counts_once_and_a_half_line_harms_nobody(tmp_path: Path) -> None:
    path = tmp_path / "corrections.jsonl"
    path.write_text('{"a": 1}\n{"half', encoding="utf-8")
    file = CorrectionFile(path)
    assert file.add({"b": 2}, "key")
    assert not file.add({"b": 2}, "key")
    assert file.add({"c": 3}, "other")
    assert path.read_text(encoding="utf-8").splitlines() == ['{"a": 1}', '{"half', '{"b": 2}', '{"c": 3}']


def test_threads_write_whole_lines(tmp_path: Path) -> None:
    file = CorrectionFile(tmp_path / "corrections.jsonl")
    threads = [
        threading.Thread(target=lambda i=i: [file.add({"n": i, "text": "x" * 5000}) for _ in range(5)])
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbers = [json.loads(line)["n"] for line in file.path.read_text(encoding="utf-8").splitlines()]
    assert sorted(numbers) == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be written: Is a directory"):
        CorrectionFile(tmp_path)
