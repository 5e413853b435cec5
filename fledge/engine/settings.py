"""Sampling settings as people write them: words to ban, biases by token text, rows of a JSONL file."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from fledge.errors import UserError
from fledge.tokenizer.bpe import Tokenizer
from fledge.types import SamplingParams

_WHOLE = ("top_k", "max_tokens", "min_tokens", "seed", "n", "top_logprobs")
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
# What a row of a batch may set.
ROW_SETTINGS = (*_WHOLE, *_NUMBERS, "stop", "stop_ids", "ban", "logit_bias", "echo")


def token_id(name: str, tokenizer: Tokenizer) -> int:
    """The id of a token given as a number, or as text that is exactly one token. Raises UserError."""
    if name.isascii() and name.isdigit():
        if int(name) >= tokenizer.vocab_size:
            raise UserError(
                f"logit_bias: token {name} is unknown; the ids go from 0 to {tokenizer.vocab_size - 1}"
            )
        return int(name)
    ids = tokenizer.encode_special(name)
    if len(ids) != 1:
        raise UserError(f"logit_bias: {name!r} is {len(ids)} tokens, not one; give a token, or an id")
    return ids[0]


def logit_bias(biases: Mapping[str, float], tokenizer: Tokenizer) -> dict[int, float]:
    """Biases by id, out of biases by id or text."""
    return {token_id(name, tokenizer): float(bias) for name, bias in biases.items()}


def split_biases(texts: Iterable[str]) -> dict[str, float]:
    """`TOKEN=BIAS` texts as a mapping. Raises UserError for one of another form."""
    biases = {}
    for text in texts:
        name, _, bias = text.rpartition("=")
        try:
            biases[name] = float(bias)
        except ValueError:
            name = ""
        if not name:
            raise UserError(f"--logit-bias {text!r} is not of the form TOKEN=BIAS, such as 42=-100")
    return biases


def banned_sequences(words: Iterable[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The ids of words that must not be made, each at a line's start and behind a space. Raises UserError."""
    sequences: list[tuple[int, ...]] = []
    for word in words:
        if not word:
            raise UserError("a banned word is empty; leave it out")
        sequences += [tuple(tokenizer.encode(word)), tuple(tokenizer.encode(" " + word.lstrip(" ")))]
    return tuple(dict.fromkeys(sequences))


def row_params(row: Mapping[str, Any], defaults: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
    """The settings of a row of a batch: its own, else the defaults. Keys that are no settings mean nothing
    here. Raises UserError for a value of a wrong type and for a key that looks like a misspelt setting."""
    changes: dict[str, Any] = {}
    for key, value in row.items():
        if key not in ROW_SETTINGS:
            if near := difflib.get_close_matches(key, ROW_SETTINGS, n=1, cutoff=0.85):
                raise UserError(f"unknown key {key!r}; the nearest setting is {near[0]!r}")
            continue
        changes[key] = _typed(key, value)
    if "ban" in changes:
        changes["banned"] = banned_sequences(changes.pop("ban"), tokenizer)
    if "logit_bias" in changes:
        changes["logit_bias"] = logit_bias(changes["logit_bias"], tokenizer)
    if "stop_ids" in changes:
        changes["stop_ids"] = (*defaults.stop_ids, *changes["stop_ids"])
    return dataclasses.replace(defaults, **changes)


def _typed(key: str, value: Any) -> Any:
    """A JSON value as the setting has it. Raises UserError."""
    is_whole = type(value) is int
    if key in ("top_k", "top_p", "min_p") and value is None:
        return None
    if (key in _WHOLE and is_whole) or (key == "echo" and isinstance(value, bool)):
        return value
    if key in _NUMBERS and (is_whole or isinstance(value, float)):
        return float(value)
    if key in ("stop", "ban"):
        if isinstance(value, str):
            return (value,)
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
    if key == "stop_ids" and isinstance(value, list) and all(type(item) is int for item in value):
        return tuple(value)
    is_object = key == "logit_bias" and isinstance(value, dict)
    if is_object and all(type(bias) in (int, float) for bias in value.values()):
        return value
    kinds = {"stop": "a text or a list of texts", "ban": "a text or a list of texts", "echo": "true or false"}
    kinds |= {"stop_ids": "a list of ids", "logit_bias": "an object of tokens and numbers"}
    kind = kinds.get(key, "a whole number" if key in _WHOLE else "a number")
    raise UserError(f"{key} must be {kind}, not {value!r}")
