"""Settings as people write them, and what is said about those that mean nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fledge.engine.settings import banned_sequences, read_constraint, row_params, split_biases, token_id
from fledge.errors import UserError
from fledge.tokenizer.bpe import Tokenizer
from fledge.types import Grammar, SamplingParams

DEFAULTS = SamplingParams(temperature=0.3, stop_ids=(5,), max_tokens=9)


def test_a_rows_settings_win(tokenizer: Tokenizer) -> None:
    row = {
        "prompt": "x", "answer": 3, "topic": "cats", "temperature": 1, "top_k": None, "max_tokens": 4,
        "seed": 7, "stop": "end", "stop_ids": [6], "ban": ["cats"], "echo": True,
        "logit_bias": {"12": -100, "a": 2.5, "<|im_end|>": 1},
    }  # fmt: skip
    a, end = tokenizer.encode("a")[0], tokenizer.end_of_turn_id
    assert row_params(row, DEFAULTS, tokenizer) == SamplingParams(
        temperature=1.0, max_tokens=4, seed=7, stop=("end",), stop_ids=(5, 6), echo=True,
        logit_bias={12: -100.0, a: 2.5, end: 1.0},
        banned=(tuple(tokenizer.encode("cats")), tuple(tokenizer.encode(" cats"))),
    )  # fmt: skip
    assert row_params({"prompt": "x"}, DEFAULTS, tokenizer) == DEFAULTS


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"temprature": 1}, "unknown key 'temprature'; the nearest setting is 'temperature'"),
        ({"max_token": 1}, "'max_tokens'"),
        ({"temperature": "hot"}, "temperature must be a number, not 'hot'"),
        ({"temperature": True}, "temperature must be a number"),
        ({"max_tokens": 2.5}, "max_tokens must be a whole number, not 2.5"),
        ({"max_tokens": None}, "max_tokens must be a whole number"),
        ({"stop": [1]}, "stop must be a text or a list of texts"),
        ({"stop_ids": ["a"]}, "stop_ids must be a list of ids"),
        ({"echo": 1}, "echo must be true or false"),
        ({"logit_bias": {"1": "x"}}, "logit_bias must be an object"),
        ({"logit_bias": {"99999": 1}}, "logit_bias: token 99999 is unknown"),
        ({"logit_bias": {"two cats": 1}}, "'two cats' is 6 tokens, not one"),
        ({"logit_bias": {"": 1}}, "'' is 0 tokens"),
        ({"ban": ""}, "banned word is empty"),
        ({"choices": "yes"}, "choices must be a list of texts"),
        ({"choices": []}, "choices: there are none"),
        ({"regex": ["a"]}, "regex must be a text"),
        ({"json_schema": "{}"}, "json_schema must be an object"),
        ({"regex": "a", "choices": ["a"]}, "choices and regex: a request can have one of them"),
        ({"gramar": "start: x"}, "the nearest setting is 'grammar'"),
    ],
)
def test_rows_that_mean_nothing(row: dict[str, Any], message: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=message.replace("two cats' is 6", "two cats' is .")) as error:
        row_params(row, DEFAULTS, tokenizer)
    assert "\n" not in str(error.value)


def test_constraints_of_rows(tokenizer: Tokenizer) -> None:
    default = dataclasses.replace(DEFAULTS, constraint=Grammar("regex", "a"))

    def of(row: dict[str, Any]) -> Grammar | None:
        return row_params(row, default, tokenizer).constraint

    assert of({}) == Grammar("regex", "a")
    assert of({"regex": None}) is None
    assert of({"choices": ["a", "b"]}) == Grammar("choices", '["a", "b"]')
    assert of({"json_schema": {"type": "null"}}) == Grammar("json_schema", '{"type": "null"}')
    assert of({"grammar": "start: /a/"}) == Grammar("lark", "start: /a/")


def test_constraints_of_a_command(tmp_path: Path) -> None:
    schema, lark = tmp_path / "a.json", tmp_path / "a.lark"
    schema.write_text('{"type": "null"}')
    lark.write_text("start: /é/", encoding="utf-8")
    assert read_constraint((), None, None, None) is None
    assert read_constraint((), None, str(schema), None) == Grammar("json_schema", '{"type": "null"}')
    assert read_constraint((), None, ' {"a": 1}', None) == Grammar("json_schema", ' {"a": 1}')
    assert read_constraint((), None, None, lark) == Grammar("lark", "start: /é/")
    lark.write_bytes(b"\xff")
    for given, message in [
        (((), None, None, lark), "not valid UTF-8"),
        (((), None, None, tmp_path / "none"), "cannot read the grammar"),
        (((), None, str(tmp_path / "none"), None), "no such file"),
        ((("a",), "a", None, None), "choices and regex"),
    ]:
        with pytest.raises(UserError, match=message):
            read_constraint(*given)


def test_flags(tokenizer: Tokenizer) -> None:
    assert split_biases(["42=-100", "a==3", "==0.5"]) == {"42": -100.0, "a=": 3.0, "=": 0.5}
    for wrong in ("42", "42=", "=3", "a=b"):
        with pytest.raises(UserError, match="TOKEN=BIAS"):
            split_biases([wrong])
    assert token_id("7", tokenizer) == 7
    assert banned_sequences([" a", "a"], tokenizer) == (
        tuple(tokenizer.encode(" a")),
        tuple(tokenizer.encode("a")),
    )


def test_what_needs_a_tokenizer_is_refused_without_one() -> None:
    row = {"prompt": "x", "temperature": 1, "stop": "end", "stop_ids": [6], "choices": ["a", "b"]}
    params = row_params(row, DEFAULTS, None)
    assert (params.temperature, params.stop, params.stop_ids) == (1.0, ("end",), (5, 6))
    for name, value in {"ban": "cats", "logit_bias": {"12": -100}}.items():
        with pytest.raises(UserError, match=f"^{name} goes with a local model"):
            row_params({**row, name: value}, DEFAULTS, None)
