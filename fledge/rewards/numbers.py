"""The number that a text ends with, and the verifier that compares it with the row's."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import Any

from fledge.errors import UserError
from fledge.rewards.matching import Row, Verifier, needed

# A number with what is written directly behind it, or a word, of whose digits none is a number. A sign counts
# only where nothing stands before it that it could be the operator of.
_TOKEN = re.compile(
    r"(?P<number>(?:(?<![\w)])[-+\u2212])?(?:(?<!\.)\.)?[0-9](?:[0-9.,/]|_(?=[0-9])|[eE][-+]?(?=[0-9]))*)"
    r"(?P<unit>[^\W\d]\w*)?"
    r"|[^\W\d]+(?:[0-9]\w*(?:[.,/][0-9]\w*)*)?"
)
_NUMBER = re.compile(
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.(?P<decimals>[0-9]+))?"
    r"(?:[eE](?P<exponent>[-+]?[0-9]{1,3})|/(?P<divisor>[0-9]+))?"
)
MAX_DIGITS = 100
MAX_EXPONENT = 400


def read_number(text: str) -> Fraction | None:
    """The exact value of a text that is one number, else None.

    A number is a sign (+, - or U+2212) or none and then digits 0 to 9, of which those before the point may
    be parted into groups of three by commas; behind a point more digits; behind that an exponent (`e5`, at
    most 400) or, for a whole number, `/` and another (a fraction). At most 100 digits; no infinity, no NaN.
    """
    stripped = text.strip(" \t\r\n")
    sign = -1 if stripped[:1] in ("-", "\u2212") else 1
    bare = stripped[1:].lstrip(" ") if stripped[:1] in ("-", "+", "\u2212") else stripped
    found = _NUMBER.fullmatch(bare) if len(bare) <= 2 * MAX_DIGITS else None
    if found is None or (found["whole"] is None and found["decimals"] is None):
        return None
    whole, decimals = (found["whole"] or "0").replace(",", ""), found["decimals"] or ""
    divisor, exponent = found["divisor"] or "1", int(found["exponent"] or "0")
    if len(whole) + len(decimals) + len(divisor) > MAX_DIGITS or abs(exponent) > MAX_EXPONENT:
        return None
    if int(divisor) == 0 or (found["divisor"] and decimals):
        return None
    return sign * Fraction(int(whole + decimals), int(divisor)) * Fraction(10) ** (exponent - len(decimals))


def numbers_in(text: str) -> list[Fraction | None]:
    """The numbers of a text in their order; None for digits that look like a number and are none (`1,23`,
    `1.2.3`, `1/0`, `5\u00b2`, an exponent that is too large).

    Digits behind a letter (`x2`) are a name and no number; letters behind them (`42km`) are a unit. A hyphen
    between two numbers is no sign, nor is one that a space parts from its digits. A text with digits of other
    scripts or invisible characters (zero-width, direction marks, controls) has one None: it does not say what
    it seems to say.
    """
    if any(map(_is_misleading, text)):
        return [None]
    found = (match for match in _TOKEN.finditer(text) if match["number"])
    return [
        None if _is_digit_like(match["unit"]) else read_number(match["number"].rstrip(".,/"))
        for match in found
    ]


def _is_digit_like(unit: str | None) -> bool:
    return unit is not None and unicodedata.category(unit[0]) in ("No", "Nl")


def _is_misleading(character: str) -> bool:
    if character.isascii():
        return not (character.isprintable() or character in "\t\n\r")
    return unicodedata.category(character) in ("Nd", "Cc", "Cf", "Cs", "Co")


def gold_number(row: Row, field: str) -> Fraction:
    """A row's number: a JSON number, read as it is written, or a text. Raises UserError."""
    value: Any = needed(row, field)
    is_number = type(value) in (int, float, str)
    found = read_number(str(value)) if is_number else None
    if found is None:
        raise UserError(f'the field "{field}" must be a number, or a text that is one, not {value!r}')
    return found


def number(
    *,
    field: str = "answer",
    tolerance: Fraction = Fraction(0),
    relative: Fraction = Fraction(0),
    only: bool = False,
) -> Verifier:
    """1 if the last number of the text is the row's, or differs from it by at most `tolerance` or the share
    `relative` of it; exact arithmetic. What looks like a number and is none counts as a wrong one. With
    `only`, a text with more than one number gets 0."""

    def verify(text: str, row: Row) -> float:
        gold = gold_number(row, field)
        found = numbers_in(text)
        if not found or found[-1] is None or (only and len(found) > 1):
            return 0.0
        return float(abs(found[-1] - gold) <= max(tolerance, relative * abs(gold)))

    return verify
