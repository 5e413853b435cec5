"""Sampling settings as people write them: words to ban, biases by token text, rows of a JSONL file."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fledge.engine.constraints import choices_grammar
from fledge.errors import UserError
from fledge.files import read_json
from fledge.tokenizer.bpe import Tokenizer
from fledge.types import Grammar, SamplingParams

_WHOLE = ("top_k", "max_tokens", "min_tokens", "seed", "n", "top_logprobs")
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
# What a completion must be; at most one of them.
CONSTRAINTS = ("choices", "regex", "json_schema", "grammar")
# What a row of a batch may set.
ROW_SETTINGS = (*_WHOLE, *_NUMBERS, "stop", "stop_ids", "ban", "logit_bias", "echo", *CONSTRAINTS)


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


def constraint(settings: Mapping[str, Any]) -> Grammar | None:
    """The one of `CONSTRAINTS` that is set: choices are texts, a schema is an object or JSON, the others are
    texts. Raises UserError for more than one."""
    given = [key for key in CONSTRAINTS if settings.get(key) is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: a request can have one of them; leave the others out")
    if not given:
        return None
    value = settings[given[0]]
    if given[0] == "choices":
        return choices_grammar(value)
    if given[0] == "json_schema":
        return Grammar("json_schema", value if isinstance(value, str) else json.dumps(value))
    return Grammar("regex" if given[0] == "regex" else "lark", value)


def read_constraint(
    choices: Sequence[str], regex: str | None, json_schema: str | None, grammar: Path | None
) -> Grammar | None:
    """`constraint` of what a command line has; the schema is JSON or a file of it, the grammar a file.
    Raises UserError for a file that cannot be read."""
    settings: dict[str, Any] = {"choices": list(choices) or None, "regex": regex, "json_schema": json_schema}
    if json_schema is not None and not json_schema.lstrip().startswith("{"):
        settings["json_schema"] = json.dumps(read_json(Path(json_schema)))
    if grammar is not None:
        try:
            settings["grammar"] = grammar.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{grammar}: not valid UTF-8; save it as UTF-8") from None
        except OSError as error:
            raise UserError(f"{grammar}: cannot read the grammar: {error.strerror}") from None
    return constraint(settings)


def local_only(name: str) -> UserError:
    """What is said about a setting that an endpoint cannot follow."""
    return UserError(f"{name} goes with a local model; leave it out, or leave out --endpoint")


def row_params(
    row: Mapping[str, Any], defaults: SamplingParams, tokenizer: Tokenizer | None
) -> SamplingParams:
    """The settings of a row of a batch: its own, else the defaults. Keys that are no settings mean nothing
    here. Raises UserError for a value of a wrong type, for a key that looks like a misspelt setting, and
    where there is no tokenizer (the model is behind an endpoint) for a setting that needs one."""
    changes: dict[str, Any] = {}
    for key, value in row.items():
        if key not in ROW_SETTINGS:
            if near := difflib.get_close_matches(key, ROW_SETTINGS, n=1, cutoff=0.85):
                raise UserError(f"unknown key {key!r}; the nearest setting is {near[0]!r}")
            continue
        changes[key] = _typed(key, value)
    for key in ("ban", "logit_bias"):
        if key in changes and tokenizer is None:
            raise local_only(key)
    if tokenizer is not None and "ban" in changes:
        changes["banned"] = banned_sequences(changes.pop("ban"), tokenizer)
    if tokenizer is not None and "logit_bias" in changes:
        changes["logit_bias"] = logit_bias(changes["logit_bias"], tokenizer)
    if "stop_ids" in changes:
        changes["stop_ids"] = (*defaults.stop_ids, *changes["stop_ids"])
    own = {key: changes.pop(key) for key in CONSTRAINTS if key in changes}
    if own:
        changes["constraint"] = constraint(own)
    return dataclasses.replace(defaults, **changes)


def _typed(key: str, value: Any) -> Any:
    """A JSON value as the setting has it. Raises UserError."""
    is_whole = type(value) is int
    if key in ("top_k", "top_p", "min_p", *CONSTRAINTS) and value is None:
        return None
    if (key in ("regex", "grammar") and isinstance(value, str)) or (
        key == "json_schema" and isinstance(value, dict)
    ):
        return value
    if (key in _WHOLE and is_whole) or (key == "echo" and isinstance(value, bool)):
        return value
    if key in _NUMBERS and (is_whole or isinstance(value, float)):
        return float(value)
    if key in ("stop", "ban", "choices"):
        if isinstance(value, str) and key != "choices":
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
    kinds |= {
        "choices": "a list of texts",
        "regex": "a text",
        "grammar": "a text",
        "json_schema": "an object",
    }
    kind = kinds.get(key, "a whole number" if key in _WHOLE else "a number")
    raise UserError(f"{key} must be {kind}, not {value!r}")
