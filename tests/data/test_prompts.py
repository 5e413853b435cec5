"""Prompts: the turns before an answer, whatever the row is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fledge.data.prompts import read_prompts
from fledge.errors import UserError

ASKED = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [*ASKED, {"role": "assistant", "content": "a"}]},
        {"messages": ASKED},
        {"prompt": ASKED, "chosen": "a", "rejected": "b"},
    ],
)
def test_a_prompt_ends_before_the_answer(row: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [row])
    (prompt,) = read_prompts(path)
    assert (prompt.messages, prompt.tools, prompt.row, prompt.where) == (ASKED, None, row, f"{path}:1")


def test_a_text_is_a_users_turn(tmp_path: Path) -> None:
    (prompt,) = read_prompts(write(tmp_path / "a.jsonl", [{"prompt": "q"}]))
    assert prompt.messages == [{"role": "user", "content": "q"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, 'it takes a list in "messages"'),
        ({"messages": ["a"]}, 'it takes a list in "messages"'),
        ({"prompt": "a", "tools": "b"}, 'the field "tools" must be a list'),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "no turn of somebody else"),
    ],
)
def test_a_mistake_is_named_with_its_line(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl:2") as error:
        read_prompts(write(tmp_path / "a.jsonl", [{"prompt": "a"}, row]))
    assert message in str(error.value)
    with pytest.raises(UserError, match="holds no prompts"):
        read_prompts(write(tmp_path / "b.jsonl", []))
