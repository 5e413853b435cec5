"""Prompts: where they end, which are too long, and that none is on both sides."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.data.comparisons import compare, split_by_prompt
from fledge.data.preferences import read_rankings
from fledge.data.prompts import Prompt
from fledge.errors import UserError
from fledge.tokenizer.bpe import SMALLEST_VOCAB_SIZE, Tokenizer, train_bpe
from fledge.tokenizer.chat import encode_chat
from fledge.train.prompts import EncodedPrompt, encode_prompts, end_ids, prompts_at, read_split
from fledge.types import Message


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([], SMALLEST_VOCAB_SIZE)


def asked(text: str, ids: list[int]) -> EncodedPrompt:
    return EncodedPrompt(Prompt([{"role": "user", "content": text}], None, {}, f"file:{text}"), ids)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_prompt_ends_where_the_assistant_begins(tokenizer: Tokenizer) -> None:
    """Its ids begin those of every conversation that it grows into; `plain`: those of a document."""
    messages: list[Message] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    prompts = [Prompt(messages[:1], None, {}, "x:1")]
    (chat,), _ = encode_prompts(prompts, tokenizer, False, 99)
    whole = encode_chat(tokenizer, messages)
    assert whole.ids[: len(chat.ids)] == chat.ids and whole.mask.index(True) == len(chat.ids)
    (plain,), _ = encode_prompts(prompts, tokenizer, True, 99)
    assert plain.ids == [tokenizer.eos_id, *tokenizer.encode("Hi")]
    assert end_ids(tokenizer, False) == [tokenizer.end_of_turn_id, tokenizer.eos_id]
    assert end_ids(tokenizer, True) == [tokenizer.eos_id]
    with pytest.raises(UserError, match="y:7: several turns"):
        encode_prompts([Prompt(messages * 2, None, {}, "y:7")], tokenizer, True, 99)


def test_long_prompts_are_left_out_and_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a" * n} for n in (3, 40, 4, 41)])
    found = read_split([path], tokenizer, True, 10, 0.0)
    assert [len(prompt.ids) for prompt in found.train] == [4, 5]
    assert found.overlong == [f"{path}:2", f"{path}:4"]
    assert found.longest == 5
    assert f"2 leave no room for a completion ({path}:2, {path}:4)" in str(found)
    with pytest.raises(UserError, match=r"p\.jsonl: no prompt leaves room .* at most 3 tokens"):
        read_split([path], tokenizer, True, 3, 0.0)


@given(
    numbers=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    share=st.sampled_from([0.0, 0.01, 0.5, 0.99]),
)
def test_no_prompt_is_on_both_sides(numbers: list[int], share: float, tokenizer: Tokenizer) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_jsonl(
            Path(folder) / "p.jsonl", [{"prompt": f"number {n}", "at": i} for i, n in enumerate(numbers)]
        )
        found = read_split([path], tokenizer, True, 99, share)
    sides = [{prompt.prompt.row["prompt"] for prompt in side} for side in (found.train, found.held)]
    assert not sides[0] & sides[1] and sides[0]
    assert len(found.train) + len(found.held) == len(numbers)
    assert bool(sides[1]) == (share > 0 and len(set(numbers)) > 1)


def test_every_prompt_comes_up_as_often() -> None:
    prompts = [asked(str(i), [i]) for i in range(7)]
    found = [prompt for number in range(7) for prompt in prompts_at(prompts, number, 3, seed=5)]
    assert set(Counter(prompt.prompt.where for prompt in found).values()) == {3}
    again = [prompt for number in range(7) for prompt in prompts_at(prompts, number, 3, seed=5)]
    assert [prompt.ids for prompt in found] == [prompt.ids for prompt in again]
    first, second = found[:7], found[7:14]
    assert [prompt.ids for prompt in first] != [prompt.ids for prompt in second], "another order each epoch"


def test_what_is_held_out_of_preferences_is_held_out_here(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The reward model's examination and the policy's are about the same prompts."""
    rows = [{"prompt": f"number {n}", "chosen": "a", "rejected": "b"} for n in range(40)]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    found = read_split([path], tokenizer, False, 999, 0.3)
    _, held = split_by_prompt(compare(read_rankings(path), tokenizer, 999).prompts, 0.3)
    assert 0 < len(held) < 40
    assert [one.prompt.messages for one in found.held] == [comparison.prompt for comparison in held]
