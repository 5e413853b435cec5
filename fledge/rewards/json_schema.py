"""The verifier for JSON: a text that parses strictly and is an instance of a schema."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
from jsonschema.validators import extend, validator_for  # type: ignore[import-untyped]
from referencing import Registry
from referencing.exceptions import Unresolvable

from fledge.errors import UserError
from fledge.files import read_json
from fledge.rewards.matching import MAX_CHARACTERS, Row, Verifier, is_pattern_in, needed

IsValid = Callable[[Any], bool]


def json_schema(*, schema: Path | None = None, field: str = "schema") -> Verifier:
    """1 if the whole text is JSON (see `parse_json`) that the schema allows: that of a file, or the row's."""
    of_file = None if schema is None else validator(read_json(schema))

    def verify(text: str, row: Row) -> float:
        is_valid = of_file or _cached_validator(json.dumps(needed(row, field)))
        try:
            return float(is_valid(parse_json(text)))
        except (ValueError, RecursionError, OverflowError):
            return 0.0

    return verify


def parse_json(text: str) -> Any:
    """The value of a JSON text as RFC 8259 has it, white space around it aside.

    Raises ValueError for what Python's parser would let pass: NaN and Infinity, numbers too large for a
    float, a key that an object has twice, half of a surrogate pair; and for more than MAX_CHARACTERS.
    RecursionError for what is nested too deep.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"longer than {MAX_CHARACTERS} characters")
    value = json.loads(
        text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_object_of_different_keys
    )
    json.dumps(value, ensure_ascii=False).encode()
    return value


def validator(schema: Any) -> IsValid:
    """Whether a value is an instance of a JSON schema, by the draft that its `$schema` names, else 2020-12.

    Nothing is fetched: a reference leads into the schema itself. `pattern` is a regular expression in Rust's
    syntax, matched in linear time; `uniqueItems` takes time that grows as the list does; `format` says
    nothing. Raises UserError for a wrong schema, and for `patternProperties`, which would be matched by
    backtracking.
    """
    if not isinstance(schema, (dict, bool)):
        raise UserError(f"json_schema: a schema is an object, not {json.dumps(schema)[:40]}")
    for pattern in _patterns(schema):
        is_pattern_in(pattern, "")  # a wrong expression is an error before any text
    draft = validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        draft.check_schema(schema, format_checker=None)  # patterns are not Python's
    except jsonschema.SchemaError as error:
        raise UserError(f"json_schema: {error.json_path}: {' '.join(error.message.split())}") from None
    bounded = extend(draft, {"pattern": _pattern, "uniqueItems": _unique_items})
    checker = bounded(schema, registry=Registry())

    def is_valid(value: Any) -> bool:
        try:
            return bool(checker.is_valid(value))
        except Unresolvable as error:
            raise UserError(f"json_schema: the reference {error.ref!r} leads nowhere in the schema") from None

    return is_valid


@lru_cache(maxsize=256)
def _cached_validator(schema: str) -> IsValid:
    return validator(json.loads(schema))


def _patterns(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if "patternProperties" in schema:
            raise UserError("json_schema: patternProperties is not supported; name the properties")
        if isinstance(schema.get("pattern"), str):
            yield schema["pattern"]
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from _patterns(part)


def _pattern(_validator: Any, pattern: str, value: Any, _schema: Any) -> Iterator[jsonschema.ValidationError]:
    if isinstance(value, str) and not is_pattern_in(pattern, value):
        yield jsonschema.ValidationError(f"does not match {pattern!r}")


def _unique_items(_validator: Any, wanted: bool, value: Any, _schema: Any) -> Iterator[Any]:
    """By what items are equal to in JSON: 1 and 1.0 are, 1 and true are not."""
    if wanted and isinstance(value, list):
        written = {json.dumps(_whole(item), sort_keys=True) for item in value}
        if len(written) < len(value):
            yield jsonschema.ValidationError("has the same item twice")


def _whole(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return {key: _whole(item) for key, item in value.items()} if isinstance(value, dict) else value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _finite(literal: str) -> float:
    if not math.isfinite(value := float(literal)):
        raise ValueError(f"{literal} is too large")
    return value


def _object_of_different_keys(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has the same key twice")
    return found
