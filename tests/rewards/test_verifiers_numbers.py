"""The last number of a text: how it is read, and what is not taken for one."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.errors import UserError
from fledge.rewards.numbers import numbers_in, read_number
from fledge.rewards.verifiers import verifier


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 42.", Fraction(42)),
        ("1,234,567.50 dollars", Fraction("1234567.5")),
        ("x = -3", Fraction(-3)),
        ("\u22123", Fraction(-3)),
        ("+7", Fraction(7)),
        ("5-3", Fraction(3)),
        ("(2)-3", Fraction(3)),
        ("3/4", Fraction(3, 4)),
        ("-1,000/3", Fraction(-1000, 3)),
        (".5", Fraction(1, 2)),
        ("2.5e-3", Fraction(1, 400)),
        ("$1,000", Fraction(1000)),
        ("**42**", Fraction(42)),
        ("50%", Fraction(50)),
        ("42km", Fraction(42)),
        ("x1 and x2 are 5", Fraction(5)),
        ("12 = 12, as 5 is x2", Fraction(5)),
        ("0.1", Fraction(1, 10)),
    ],
)
def test_a_number_is_read_exactly(text: str, number: Fraction) -> None:
    assert numbers_in(text)[-1] == number


@pytest.mark.parametrize(
    "text",
    [
        "1,23", "12,3456", "1.2.3", "1..2", "1/0", "1/2/3", "1.5/2", "1e999", "1e-999", "1e5e6",
        "1.5e3.2", "1_000",
        "9" * 101, "0." + "9" * 101, "1e9999999999", "5\u00b2", "5\u00bd",
        "\u0664\u0662", "\uff14\uff12", "1\u200b42", "\u202e24", "42\u2066", "4\x002", "42\ud800",
    ],
)  # fmt: skip
def test_what_looks_like_a_number_and_is_none(text: str) -> None:
    """It is a wrong answer, and does not give way to a number before it."""
    assert numbers_in(text)[-1] is None
    assert verifier("number")(f"42 {text}", {"answer": 42}) == 0.0


@pytest.mark.parametrize(
    "text", ["", "none", "NaN", "inf", "-Infinity", "x2", "v1.2.3", "- ", "e5", "--", "."]
)
def test_a_text_without_numbers(text: str) -> None:
    assert numbers_in(text) == []
    assert verifier("number")(text, {"answer": 0}) == 0.0


@given(st.fractions(), st.sampled_from(["", "+"]))
def test_fractions_are_read_back(number: Fraction, sign: str) -> None:
    written = str(number) if number < 0 else sign + str(number)
    assert read_number(written) == number


@given(st.integers(-(10**18), 10**18), st.integers(0, 9))
def test_separators_and_decimals_change_nothing(number: int, decimals: int) -> None:
    assert numbers_in(f"is {number:,}.{'0' * decimals}")[-1] == number


@given(st.text(max_size=40))
def test_no_text_is_an_error(text: str) -> None:
    numbers_in(text)
    assert verifier("number")(text, {"answer": Fraction(0).numerator}) in (0.0, 1.0)


@pytest.mark.parametrize(
    ("spec", "text", "reward"),
    [
        ("number", "42.0", 1.0),
        ("number", "42.001", 0.0),
        ("number:tolerance=0.01", "42.01", 1.0),
        ("number:tolerance=0.01", "42.0100001", 0.0),
        ("number:tolerance=1/3", "42.3", 1.0),
        ("number:relative=0.1", "37.8", 1.0),
        ("number:relative=0.1", "46.3", 0.0),
        ("number:tolerance=1,relative=0.1", "46", 1.0),
        ("number:tolerance=1,relative=0.1", "47", 0.0),
        ("number:tolerance=5,relative=0.1", "47", 1.0),
        ("number", "It is 41 or 42", 1.0),
        ("number", "It is 42 or 41", 0.0),
        ("number:only=true", "It is 41 or 42", 0.0),
        ("number:only=true", "It is 42", 1.0),
        ("number:after=A:", "Q: 20+22? A: 42", 1.0),
        ("number:after=A:", "20+22 is 42", 0.0),
        ("number:after=A:,only=true", "20+22: A: 42", 1.0),
        ("number:after=A:,only=true", "A: 41 42", 0.0),
    ],
)
def test_rewards(spec: str, text: str, reward: float) -> None:
    assert verifier(spec)(text, {"answer": 42}) == reward


def test_decimals_are_compared_as_they_are_written() -> None:
    """0.1 + 0.2 is 0.3 here, and 1/3 is no decimal."""
    assert verifier("number")("0.3", {"answer": 0.3}) == 1.0
    assert verifier("number:tolerance=0.1")("0.2", {"answer": 0.3}) == 1.0
    assert verifier("number")("0.3333333333333333", {"answer": "1/3"}) == 0.0
    assert verifier("number")("10000000000000000000000", {"answer": 1e22}) == 1.0


@pytest.mark.parametrize("gold", ["many", float("nan"), float("inf"), True, [1], "1 2", ""])
def test_a_gold_that_is_no_number_is_an_error(gold: Any) -> None:
    with pytest.raises(UserError, match='"answer" must be a number'):
        verifier("number")("1", {"answer": gold})
