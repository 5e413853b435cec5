"""Expressions by a whitelist parser, and Countdown: the right value from the right numbers, and no tricks."""

from __future__ import annotations

import ast
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.errors import UserError
from fledge.rewards.arithmetic import NotArithmetic, evaluate
from fledge.rewards.verifiers import verifier

ROW = {"numbers": [3, 7, 25], "target": 46}


@st.composite
def expressions(draw: st.DrawFn, depth: int = 4) -> str:
    if depth == 0 or draw(st.booleans()):
        return draw(st.sampled_from(["{}", "-{}", "+{}", "{}.5"])).format(draw(st.integers(0, 99)))
    left, right = draw(expressions(depth=depth - 1)), draw(expressions(depth=depth - 1))
    mark, spaces = draw(st.sampled_from("+-*/")), draw(st.sampled_from(["", " "]))
    return draw(st.sampled_from(["{}", "({})", "-({})"])).format(f"{left}{spaces}{mark}{spaces}({right})")


def by_pythons_grammar(node: ast.expr) -> Fraction:
    """The value of an expression as Python parses it, in fractions."""
    match node:
        case ast.Constant(value=value):
            return Fraction(str(value))
        case ast.UnaryOp(op=op, operand=operand):
            value = by_pythons_grammar(operand)
            return -value if isinstance(op, ast.USub) else value
        case ast.BinOp(left=a, op=op, right=b):
            left, right = by_pythons_grammar(a), by_pythons_grammar(b)
            if isinstance(op, ast.Add):
                return left + right
            if isinstance(op, ast.Sub):
                return left - right
            return left * right if isinstance(op, ast.Mult) else left / right
    raise AssertionError(node)


@given(expressions())
def test_values_are_those_of_pythons_grammar(text: str) -> None:
    try:
        wanted: Fraction | None = by_pythons_grammar(ast.parse(text, mode="eval").body)
    except ZeroDivisionError:
        wanted = None
    if wanted is None:
        with pytest.raises(NotArithmetic, match="division by zero"):
            evaluate(text)
    else:
        assert evaluate(text)[0] == wanted


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "()", "1+", "+", "1 2", "2(3)", "(2)(3)", "(1", "1)", ")1(", "--1", "+-1", "1 - - - 1",
        "2**3", "2//3", "5%3", "2^3", "1e5", "1e999", "nan", "inf", "NaN", "0x10", "1_000", "007", "1.", ".5",
        "1/0", "1/(2-2)", "1\n+1", "1\t+1", "1,000", "1=1=1", "\u0663+1", "\uff11", "1\u200b+1", "\u202e1+1",
        "3\u00d77", "7\u00f77", "\u22121", "x", "__import__('os')", "().__class__", "abs(1)", "1 if 1 else 2",
        "(" * 10_000 + "1" + ")" * 10_000, "(" * 51 + "1" + ")" * 51, "-" * 10_000 + "1",
        "9" * 22, "1" + "+1" * 50, "1" * 501,
    ],
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(NotArithmetic):
        evaluate(text)
    assert verifier("arithmetic")(text, {"answer": 1}) == 0.0
    assert verifier("countdown")(text, {"numbers": [1], "target": 1}) == 0.0


def test_the_limits_themselves_are_allowed() -> None:
    assert evaluate("(" * 50 + "1" + ")" * 50)[0] == 1
    assert evaluate("1" + "+1" * 49)[0] == 50
    assert evaluate("9" * 20)[0] == 10**20 - 1


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("6*7", 1.0),
        ("42", 1.0),
        ("-(0-42)", 1.0),
        ("84/2 = 42", 1.0),
        ("84/2=42.0", 1.0),
        ("6*7=43", 0.0),
        ("6*8=42", 0.0),
        ("42=", 0.0),
        ("=42", 0.0),
        ("41 42", 0.0),
        ("6*7, 6*8", 0.0),
        ("The answer is 6*7", 0.0),
    ],
)
def test_arithmetic(text: str, reward: float) -> None:
    assert verifier("arithmetic")(text, {"answer": 42}) == reward


def test_arithmetic_is_exact() -> None:
    assert verifier("arithmetic")("0.1+0.2", {"answer": 0.3}) == 1.0
    assert verifier("arithmetic")("1/3+1/3+1/3", {"answer": 1}) == 1.0
    assert verifier("arithmetic")("1/3", {"answer": 0.3333333333333333}) == 0.0


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("3*7+25", 1.0),
        ("(3*7)+25 = 46", 1.0),
        (" 25+7*3\n", 1.0),
        ("46", 0.0),
        ("3*7+25=47", 0.0),
        ("3+7+25", 0.0),
        ("25+21", 0.0),
        ("3*7+25+0", 0.0),
        ("3*7+25*1", 0.0),
        ("37+25-16", 0.0),
        ("(3*7+25)*(3/3)", 0.0),
        ("3*7+(25)", 1.0),
        ("-(0-46)", 0.0),
        ("-3*-7+25", 0.0),
        ("3.0*7+25", 0.0),
        ("3*7+25; 3+7+25", 0.0),
        ("3*7+25\n3+7+25", 0.0),
        ("3*7+25 or 46", 0.0),
        ("46 from 3 7 25", 0.0),
        ("3 * 7 + 2 5", 0.0),
        ("", 0.0),
    ],
)
def test_countdown(text: str, reward: float) -> None:
    assert verifier("countdown")(text, ROW) == reward


def test_how_often_a_number_may_be_used() -> None:
    row = {"numbers": [2, 3, 3], "target": 6}
    assert verifier("countdown")("2*3", row) == 0.0
    assert verifier("countdown")("2*3", row | {"use": "any"}) == 1.0
    assert verifier("countdown")("3+3", row | {"use": "any"}) == 1.0
    assert verifier("countdown")("2+2+2", row | {"use": "any"}) == 0.0
    assert verifier("countdown")("3*3-2-1", row | {"use": "any"}) == 0.0
    assert verifier("countdown")("3*3-3", row | {"use": "any"}) == 0.0
    assert verifier("countdown")("2*3*(3/3)", row) == 0.0
    assert verifier("countdown")("3/3+2", {"numbers": [2, 3, 3], "target": 3}) == 1.0


def test_a_value_between_may_be_a_fraction() -> None:
    assert verifier("countdown")("8/(3-8/3)", {"numbers": [3, 3, 8, 8], "target": 24}) == 1.0
    assert verifier("countdown")("8/3", {"numbers": [3, 8], "target": "8/3"}) == 1.0
    assert verifier("countdown")("8/3", {"numbers": [3, 8], "target": 2}) == 0.0


def test_the_last_line_of_a_search() -> None:
    verify = verifier("countdown:last_line=true")
    assert verify("3+7=10 10 25: 35 15 250\n3*7=21 21 25: 46\n3*7+25", ROW) == 1.0
    assert verify("3*7+25\n3+7+25", ROW) == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"numbers": None}, "numbers"),
        ({"numbers": []}, "numbers"),
        ({"numbers": ["3"]}, "numbers"),
        ({"numbers": [True]}, "numbers"),
        ({"numbers": [1.5]}, "numbers"),
        ({"target": "many"}, "target"),
        ({"use": "some"}, "use"),
    ],
)
def test_a_wrong_row_is_an_error(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        verifier("countdown")("1", ROW | change)
