"""JSON: strict parsing, schemas, and texts and patterns made to hang or crash a validator."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from fledge.errors import UserError
from fledge.rewards.json_schema import validator
from fledge.rewards.matching import MAX_CHARACTERS
from fledge.rewards.verifiers import verifier

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "age": {"type": "integer", "minimum": 0},
        "tags": {"type": "array", "uniqueItems": True, "maxItems": 3},
    },
    "required": ["name"],
    "additionalProperties": False,
}


def reward(text: str, schema: Any) -> float:
    return verifier("json_schema")(text, {"schema": schema})


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('{"name": "Emma"}', 1.0),
        (' {"age": 3, "name": "Emma"}\n', 1.0),
        ('{"name": ""}', 0.0),
        ('{"name": "Emma", "age": 1.5}', 0.0),
        ('{"name": "Emma", "age": 1.0}', 1.0),
        ('{"name": "Emma", "age": true}', 0.0),
        ('{"name": "Emma", "more": 1}', 0.0),
        ('{"age": 3}', 0.0),
        ("[]", 0.0),
        ("", 0.0),
        ("Emma", 0.0),
        ('Sure: {"name": "Emma"}', 0.0),
        ('{"name": "Emma"} {"name": ""}', 0.0),
        ('{"name": "", "name": "Emma"}', 0.0),
        ("{'name': 'Emma'}", 0.0),
        ('{"name": "Emma",}', 0.0),
        ('{"name": "Emma", "tags": [1, 1.0]}', 0.0),
        ('{"name": "Emma", "tags": [1, true, "1"]}', 1.0),
        ('{"name": "\\ud800"}', 0.0),
    ],
)
def test_a_schema_decides(text: str, wanted: float, tmp_path: Path) -> None:
    assert reward(text, PERSON) == wanted
    (tmp_path / "person.json").write_text(json.dumps(PERSON))
    assert verifier(f"json_schema:schema={tmp_path / 'person.json'}")(text, {}) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "NaN",
        "[Infinity]",
        "-Infinity",
        "1e999",
        "[" * 10_000 + "]" * 10_000,
        '{"a":' * 50_000,
        "1" * 5000,
        "\ud800",
        "[" + "1," * MAX_CHARACTERS + "1]",
    ],
)
def test_what_pythons_parser_lets_pass_or_dies_of(text: str) -> None:
    assert reward(text, {}) == 0.0


def test_nesting_that_the_parser_takes_and_a_recursive_schema_does_not_survive() -> None:
    schema = {"type": "array", "items": {"$ref": "#"}}
    assert reward("[[[]]]", schema) == 1.0
    assert reward("[" * 900 + "]" * 900, schema) in (0.0, 1.0)


def test_patterns_are_matched_in_linear_time() -> None:
    schema = {"type": "string", "pattern": "^(a+)+$"}
    assert reward(json.dumps("a" * 20_000), schema) == 1.0
    assert reward(json.dumps("a" * 20_000 + "!"), schema) == 0.0


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("b", "abc", "ac"),
        ("^b", "bc", "ab"),
        ("^a|b$", "ac", "ca"),
        ("^[0-9]{3}$", "123", "1234"),
        ("^\u00e9$", "\u00e9", "e"),
        (r"^\p{L}+$", "\u00e9a", "e1"),
    ],
)
def test_a_pattern_may_match_any_part(pattern: str, matching: str, other: str) -> None:
    is_valid = validator({"pattern": pattern})
    assert is_valid(matching)
    assert not is_valid(other)
    assert is_valid(3)


def test_uniqueness_of_many_items_of_different_kinds_is_quick() -> None:
    items = [value for i in range(6000) for value in (i, str(i))]
    assert validator({"uniqueItems": True})(items)
    assert not validator({"uniqueItems": True})([*items, 7.0])
    assert validator({"uniqueItems": False})([1, 1])
    assert not validator({"uniqueItems": True})([{"a": [1, 2], "b": 0}, {"b": 0.0, "a": [1.0, 2]}])


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "number!"}, "number!"),
        ({"pattern": "("}, "unclosed group"),
        ({"patternProperties": {"a": {}}}, "patternProperties"),
        ({"properties": {"a": {"pattern": "(?=a)"}}}, "look-around"),
        ([], "is an object"),
    ],
)
def test_a_wrong_schema_is_an_error_at_once(schema: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    with pytest.raises(UserError, match=message):
        verifier(f"json_schema:schema={tmp_path / 'schema.json'}")


@pytest.mark.parametrize("reference", ["#/$defs/nothing", "https://example.com/schema.json", "other.json"])
def test_nothing_is_fetched(reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(urllib.request, "urlopen", asked.append)
    with pytest.raises(UserError, match="leads nowhere"):
        reward("{}", {"$ref": reference})
    assert not asked


@pytest.mark.parametrize("factor", [1e-308, 0.5, 3, 1e308])
@pytest.mark.parametrize("text", ["1e308", "-1e-308", "1" * 4000, "5e-324", "0"])
def test_numbers_at_the_ends_of_a_float_break_nothing(text: str, factor: float) -> None:
    assert reward(text, {"multipleOf": factor}) in (0.0, 1.0)
    assert reward(text, {"minimum": factor, "exclusiveMaximum": 1e300}) in (0.0, 1.0)


def test_references_into_the_schema_itself() -> None:
    schema = {"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer"}}}
    assert (reward("1", schema), reward('"1"', schema)) == (1.0, 0.0)


def test_an_older_draft_is_kept() -> None:
    """In draft 4 `exclusiveMinimum` is a boolean."""
    schema = {"$schema": "http://json-schema.org/draft-04/schema#", "minimum": 1, "exclusiveMinimum": True}
    assert (reward("1", schema), reward("2", schema)) == (0.0, 1.0)
