"""Exact, normalised and regular-expression matches, and what of a text they look at."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.errors import UserError
from fledge.rewards.matching import MAX_CHARACTERS, matches, normalise
from fledge.rewards.verifiers import verifier

GOLD = {"answer": "Paris"}


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("Paris", 1.0),
        ("  Paris\n", 1.0),
        ("paris", 0.0),
        ("Paris.", 0.0),
        ("", 0.0),
        ("Paris or London", 0.0),
        ("London\nParis", 0.0),
        ("Par\u200bis", 0.0),
        ("\u202eParis", 0.0),
    ],
)
def test_exact(text: str, reward: float) -> None:
    assert verifier("exact")(text, GOLD) == reward


@pytest.mark.parametrize("gold", ["Paris", 7, ["London", "Paris"], [7, "x"]])
def test_one_of_several_answers_is_enough(gold: Any) -> None:
    said = "7" if gold == 7 or 7 in (gold if isinstance(gold, list) else []) else "Paris"
    assert verifier("exact")(said, {"answer": gold}) == 1.0
    assert verifier("exact")("Rome", {"answer": gold}) == 0.0


@pytest.mark.parametrize("gold", [None, "", " ", [], ["a", ""], 1.5, True, {"a": 1}])
def test_a_gold_answer_that_nothing_can_be_compared_with_is_an_error(gold: Any) -> None:
    """An empty gold answer would reward silence."""
    with pytest.raises(UserError, match="answer"):
        verifier("exact")("", {"answer": gold})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The Louvre!", "louvre"),
        ("  a\tdog,  an owl ", "Dog owl"),
        ("don't", "Don\u2019t"),
        ("well-known", "well known"),
        ("Stra\u00dfe", "STRASSE"),
        ("e\u0301t\u00e9", "\u00c9T\u00c9"),
        ("(1) -5.", "1 -5"),
    ],
)
def test_what_normalising_makes_equal(one: str, other: str) -> None:
    assert normalise(one) == normalise(other) != ""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("3.5", "35"),
        ("1,5", "15"),
        ("-5", "5"),
        ("1/2", "12"),
        ("2*3", "23"),
        ("\u0664\u0662", "42"),
        ("\uff14\uff12", "42"),
        ("x\u00b2", "x2"),
        ("a<b", "a>b"),
        ("$5", "5"),
        ("yes\u200b", "yes"),
    ],
)
def test_what_normalising_keeps_apart(one: str, other: str) -> None:
    assert normalise(one) != normalise(other)


def test_an_answer_of_articles_or_of_nothing_is_not_matched_by_silence() -> None:
    verify = verifier("normalised")
    assert verify("A", {"answer": "a"}) == 1.0
    assert verify("the", {"answer": "a"}) == 0.0
    assert verify("", {"answer": "a"}) == 0.0
    assert verify("!?", {"answer": "..."}) == 0.0
    assert verify("yes no", {"answer": "yes"}) == 0.0


@pytest.mark.parametrize(
    ("pattern", "text", "reward"),
    [
        ("[0-9]{3}", "123", 1.0),
        ("[0-9]{3}", "1234", 0.0),
        ("[0-9]{3}", "\u0661\u0662\u0663", 0.0),
        (".*yes.*", "no\nyes", 0.0),
        ("(?s).*yes.*", "no\nyes", 1.0),
        ("(?i)yes|no", "NO", 1.0),
        ("(yes|no)", "yesno", 0.0),
        ("a{1,3}", "aaa", 1.0),
    ],
)
def test_regex_matches_the_whole_text(pattern: str, text: str, reward: float) -> None:
    assert verifier(f"regex:pattern={pattern}")(text, {}) == reward
    assert verifier("regex")(text, {"pattern": pattern}) == reward


PATTERNS = st.recursive(
    st.sampled_from(["a", "b", "[ab]", "[^a]", "."]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from("*+?")).map(lambda two: f"(?:{two[0]}){two[1]}"),
        inner.map(lambda one: f"(?:{one}){{1,2}}"),
    ),
    max_leaves=6,
)


@given(PATTERNS, st.text(alphabet="abc\u00e9\n", max_size=6))
def test_patterns_mean_what_they_mean_in_python(pattern: str, text: str) -> None:
    assert matches(pattern, text) == (re.fullmatch(pattern, text) is not None)


def test_a_pattern_that_makes_backtracking_explode_takes_one_pass() -> None:
    """With backtracking each of these would take longer than the universe has lasted."""
    for pattern in ("(a+)+b", "(a|aa)+b", "(a|a)*b", "(x*x*)*y", "((a*)*)*b"):
        assert not matches(pattern, "a" * 50_000)
    assert matches("(a|b)*a(a|b){200}", "ba" * 20_000)


def test_a_text_that_is_too_long_matches_nothing() -> None:
    assert matches("a*", "a" * MAX_CHARACTERS)
    assert not matches("a*", "a" * (MAX_CHARACTERS + 1))
    assert not matches("(?s).*", "\ud800")


@pytest.mark.parametrize("pattern", ["(", "(?=a)b", r"(a)\1"])
def test_a_pattern_that_cannot_be_had_is_an_error_at_once(pattern: str) -> None:
    with pytest.raises(UserError, match="pattern"):
        verifier(f"regex:pattern={pattern}")


def test_without_the_mark_there_is_nothing_that_could_be_right() -> None:
    verify = verifier("regex:pattern=.*,after=#")
    assert (verify("a", {}), verify("#", {}), verify("", {})) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("spec", "text", "reward"),
    [
        ("exact:after=#", "Rome # Paris", 1.0),
        ("exact:after=#", "Paris", 0.0),
        ("exact:after=#", "# Paris # Rome", 0.0),
        ("exact:after=#", "# Rome # Paris", 1.0),
        ("exact:after=#", "# Paris #", 0.0),
        ("exact:last_line=true", "Rome\nParis\n", 1.0),
        ("exact:last_line=true", "Paris\nRome", 0.0),
        ("exact:last_line=true", "Paris", 1.0),
        ("exact:after=answer:,last_line=true", "answer: Rome\nParis", 1.0),
        ("exact:last_line=false", "Rome\nParis", 0.0),
    ],
)
def test_of_several_answers_only_the_last_place_counts(spec: str, text: str, reward: float) -> None:
    assert verifier(spec)(text, GOLD) == reward
