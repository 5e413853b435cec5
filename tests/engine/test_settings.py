"""Settings as people write them, and what is said about those that mean nothing."""

from __future__ import annotations

from typing import Any

import pytest

from fledge.engine.settings import banned_sequences, row_params, split_biases, token_id
from fledge.errors import UserError
from fledge.tokenizer.bpe import Tokenizer
from fledge.types import SamplingParams

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
    ],
)
def test_rows_that_mean_nothing(row: dict[str, Any], message: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=message.replace("two cats' is 6", "two cats' is .")) as error:
        row_params(row, DEFAULTS, tokenizer)
    assert "\n" not in str(error.value)


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
