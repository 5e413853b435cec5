"""Arithmetic by a whitelist: an own parser for + - * / and parentheses, exact, with bounded sizes.

Nothing is evaluated as Python. The parser keeps its own stacks, so that depth costs no recursion.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction

from fledge.errors import UserError
from fledge.rewards.matching import Row, Verifier, needed
from fledge.rewards.numbers import gold_number, read_number

MAX_CHARACTERS = 500
MAX_DEPTH = 50
MAX_NUMBERS = 50
MAX_DIGITS = 20

_TOKEN = re.compile(r" *(?:(?P<number>(?:0|[1-9][0-9]*)(?:\.[0-9]+)?)|(?P<mark>[-+*/()])) *")
_SIGNS = {"-": "negative", "+": "positive"}
_STRENGTH = {"+": 1, "-": 1, "*": 2, "/": 2, "negative": 3, "positive": 3}


class NotArithmetic(ValueError):
    """A text that is no expression, or has no value, or is too large."""


@dataclass
class _Stacks:
    """Values that wait for an operator, operators that wait for a value, and the numbers that were read."""

    values: list[Fraction] = field(default_factory=list)
    marks: list[str] = field(default_factory=list)
    numbers: list[Fraction] = field(default_factory=list)

    @property
    def is_signed(self) -> bool:
        """Whether the value that comes next has its sign."""
        return bool(self.marks) and self.marks[-1] in _SIGNS.values()

    def apply(self) -> None:
        """Take the last operator with its values and put what it gives in their place."""
        mark, right = self.marks.pop(), self.values.pop()
        if mark in _SIGNS.values():
            self.values.append(-right if mark == "negative" else right)
            return
        left = self.values.pop()
        if mark == "/" and right == 0:
            raise NotArithmetic("division by zero")
        results = {"+": lambda: left + right, "-": lambda: left - right, "*": lambda: left * right}
        self.values.append(results[mark]() if mark in results else left / right)

    def close(self) -> None:
        """Apply what stands behind the last opening parenthesis, and take that away."""
        while self.marks and self.marks[-1] != "(":
            self.apply()
        if not self.marks:
            raise NotArithmetic("a parenthesis was never opened")
        self.marks.pop()


def evaluate(text: str, plain: bool = False) -> tuple[Fraction, list[Fraction]]:
    """The exact value of an expression, and the numbers that it uses, in their order.

    An expression has whole numbers and decimals (digits 0 to 9, no leading zeros, at most 20 digits), the
    operators + - * / with their usual precedence, signs, parentheses and spaces; nothing else: no powers, no
    `//`, no names, no line breaks, no omitted multiplication. At most 500 characters, 50 numbers and
    parentheses 50 deep. `plain`: no signs and no decimals.
    Raises NotArithmetic for anything else, and for a division by zero.
    """
    if len(text) > MAX_CHARACTERS:
        raise NotArithmetic(f"longer than {MAX_CHARACTERS} characters")
    stacks, place, wants_value, depth = _Stacks(), 0, True, 0
    while place < len(text):
        found = _TOKEN.match(text, place)
        if found is None:
            raise NotArithmetic(f"{text[place]!r} is no part of an expression")
        place, literal, mark = found.end(), found["number"], found["mark"]
        if literal is not None:
            _check_number(literal, wants_value, plain, len(stacks.numbers))
            stacks.numbers.append(Fraction(literal))
            stacks.values.append(stacks.numbers[-1])
            wants_value = False
        elif mark == "(" and wants_value:
            depth += 1
            if depth > MAX_DEPTH:
                raise NotArithmetic(f"parentheses more than {MAX_DEPTH} deep")
            stacks.marks.append(mark)
        elif mark == ")" and not wants_value:
            depth -= 1
            stacks.close()
        elif mark in _SIGNS and wants_value and not plain and not stacks.is_signed:
            stacks.marks.append(_SIGNS[mark])
        elif mark in "+-*/" and not wants_value:
            while stacks.marks and _STRENGTH.get(stacks.marks[-1], 0) >= _STRENGTH[mark]:
                stacks.apply()
            stacks.marks.append(mark)
            wants_value = True
        else:
            raise NotArithmetic(f"{mark!r} stands in the wrong place")
    if wants_value or depth:
        raise NotArithmetic("the expression is not complete")
    while stacks.marks:
        stacks.apply()
    return stacks.values[0], stacks.numbers


def _check_number(literal: str, wants_value: bool, plain: bool, numbers: int) -> None:
    if not wants_value:
        raise NotArithmetic(f"{literal} follows without an operator")
    if numbers == MAX_NUMBERS or len(literal) > MAX_DIGITS + 1:
        raise NotArithmetic(f"more than {MAX_NUMBERS} numbers or {MAX_DIGITS} digits")
    if plain and "." in literal:
        raise NotArithmetic(f"{literal} is not whole")


def evaluate_line(text: str, plain: bool = False) -> tuple[Fraction, list[Fraction]]:
    """`evaluate` for a text that may say the value too, behind one equals sign: it must be the true one."""
    expression, equals, claimed = text.strip(" \t\r\n").partition("=")
    value, used = evaluate(expression, plain)
    if equals and read_number(claimed) != value:
        raise NotArithmetic(f"{expression} is not {claimed}")
    return value, used


def arithmetic(*, field: str = "answer") -> Verifier:
    """1 if the text is an expression with the row's value; it may end in `=` and the value."""

    def verify(text: str, row: Row) -> float:
        gold = gold_number(row, field)
        try:
            return float(evaluate_line(text)[0] == gold)
        except NotArithmetic:
            return 0.0

    return verify


def countdown() -> Verifier:
    """1 if the text is an expression of the row's `numbers` with the value `target`; it may end in `=` and
    the value. The row's `use` is "all" (each number exactly once, the default) or "any" (at most once)."""

    def verify(text: str, row: Row) -> float:
        given, target, use = _given(row), gold_number(row, "target"), row.get("use", "all")
        if use not in ("all", "any"):
            raise UserError(f'the field "use" must be "all" or "any", not {use!r}')
        try:
            value, used = evaluate_line(text, plain=True)
        except NotArithmetic:
            return 0.0
        missing, foreign = given - Counter(used), Counter(used) - given
        return float(value == target and not foreign and not (missing and use == "all"))

    return verify


def _given(row: Row) -> Counter[Fraction]:
    numbers = needed(row, "numbers")
    if not isinstance(numbers, list) or not numbers or not all(type(number) is int for number in numbers):
        raise UserError('the field "numbers" must be a list of whole numbers')
    return Counter(map(Fraction, numbers))
