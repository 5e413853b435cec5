"""Verifiers that compare a text with the row's answer, as it is or normalised, or with a regular expression.

A verifier is a function of a text and the data row, with a reward from 0 to 1; it is made by a function whose
keywords are its settings.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from fledge.errors import UserError

Row = Mapping[str, Any]
Verifier = Callable[[str, Row], float]

# Longer texts match no expression and are no JSON: what a verifier spends on a text is bounded.
MAX_CHARACTERS = 100_000
_END_TOKEN = 256


def needed(row: Row, field: str) -> Any:
    """A field of a row. Raises UserError if it is missing or null."""
    if row.get(field) is None:
        raise UserError(f'the row has no field "{field}", which the reward compares with; add it')
    return row[field]


def answers(row: Row, field: str) -> list[str]:
    """The right answers: one text or whole number, or a list of them. Raises UserError."""
    value = needed(row, field)
    texts = [str(item) if type(item) is int else item for item in (value if type(value) is list else [value])]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f'the field "{field}" must be a text that is not empty, or a list of such')
    return texts


def exact(*, field: str = "answer") -> Verifier:
    """1 if the text is the answer character by character, white space at both ends aside."""

    def verify(text: str, row: Row) -> float:
        return float(any(text.strip() == answer.strip() for answer in answers(row, field)))

    return verify


def normalised(*, field: str = "answer") -> Verifier:
    """1 if the text is the answer after `normalise`."""

    def verify(text: str, row: Row) -> float:
        said, right = normalise(text), {normalise(answer) for answer in answers(row, field)}
        return float(bool(said) and said in right)

    return verify


def normalise(text: str) -> str:
    """Without case, punctuation, articles and needless white space, in this order:

    Unicode's composed form (NFC) and its case folding; apostrophes are dropped; all other punctuation (its
    categories P*) becomes a space, but for a hyphen that is the sign of a number and a point or comma between
    two digits; the words a, an and the are dropped unless nothing else is there; runs of white space become
    one space, and none is left at the ends. Invisible characters stay, and so make a difference.
    """
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    folded = re.sub("['\u2019\u02bc]", "", folded)
    kept = []
    for i, character in enumerate(folded):
        before, behind = folded[i - 1 : i], folded[i + 1 : i + 2]
        is_sign = character == "-" and _is_digit(behind) and not before.isalnum()
        is_inside = character in ".," and _is_digit(before) and _is_digit(behind)
        is_punctuation = unicodedata.category(character).startswith("P")
        kept.append(" " if is_punctuation and not (is_sign or is_inside) else character)
    words = "".join(kept).split()
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)


def _is_digit(character: str) -> bool:
    return character.isascii() and character.isdigit()


def regex(*, pattern: str | None = None, field: str = "pattern") -> Verifier:
    """1 if a regular expression, the setting or the row's, matches the whole text (see `matches`)."""
    if pattern is not None:
        matches(pattern, "")  # a wrong expression is an error before any text

    def verify(text: str, row: Row) -> float:
        expression = needed(row, field) if pattern is None else pattern
        if not isinstance(expression, str):
            raise UserError(f'the field "{field}" must be a text, a regular expression')
        return float(matches(expression, text))

    return verify


def matches(pattern: str, text: str) -> bool:
    """Whether an expression in Rust's syntax, without look-around and back-references, matches a whole text.

    It is matched by derivatives (llguidance), so no expression makes the time grow faster than the text.
    Texts of more than MAX_CHARACTERS, and those on which it needs too many states, match nothing.
    Raises UserError for a wrong expression.
    """
    return _accepts(_compiled(pattern), text)


def _accepts(matcher: LLMatcher, text: str) -> bool:
    try:
        read = text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    if len(text) > MAX_CHARACTERS:
        return False
    copy = matcher.deep_copy()
    return copy.try_consume_tokens(list(read)) == len(read) and copy.is_accepting()


@lru_cache(maxsize=256)
def _compiled(pattern: str, in_json: bool = False) -> LLMatcher:
    if in_json:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps({"type": "string", "pattern": pattern}))
    else:
        grammar = LLMatcher.grammar_from_regex(pattern)
    is_wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar, _bytes())
    if is_wrong:
        reasons = re.findall("error: (.+)", messages[0]) or [" ".join(messages[0].split())]
        raise UserError(f"the pattern {pattern!r} is not valid: {reasons[-1]}")
    return LLMatcher(_bytes(), grammar, log_level=0)


def is_pattern_in(pattern: str, text: str) -> bool:
    """Whether an expression matches some part of a text: `pattern` of a JSON schema (see `matches`)."""
    return _accepts(_compiled(pattern, in_json=True), json.dumps(text, ensure_ascii=False))


@lru_cache(maxsize=1)
def _bytes() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Bytes()))


class _Bytes:
    """A tokenizer whose tokens are the bytes, as llguidance's `TokenizerWrapper` asks for it."""

    eos_token_id, bos_token_id = _END_TOKEN, None
    special_token_ids: Sequence[int] = (_END_TOKEN,)
    tokens: Sequence[bytes] = tuple([*(bytes([i]) for i in range(256)), b"<end>"])

    def __call__(self, text: bytes) -> list[int]:
        return list(text)
