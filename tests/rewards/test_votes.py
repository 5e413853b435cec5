"""What a vote counts: the part that the verifier looks at, in the form in which it compares it."""

from __future__ import annotations

import pytest

from fledge.rewards.votes import ballot


@pytest.mark.parametrize(
    ("spec", "text", "vote"),
    [
        ("exact", " 975 ", "975"),
        ("exact", "8+7=15\n594", "8+7=15 594"),
        ("exact:last_line=true", "8+7=15 1+3=4\n594\n", "594"),
        ("exact:field=solution,last_line=true", "a\nb", "b"),
        ("0.9*countdown:last_line=true", "7+3=10 25\n25 + 7*3 ", "25 + 7*3"),
        ("number:tolerance=0.01,after=Answer:", "2 or 3. Answer: it is 4.50 km", "9/2"),
        ("number", "four", None),
        ("number:after=Answer:", "4", None),
        ("normalised", "The Cat!", "cat"),
        ("regex:pattern=a,b=c,last_line=true", "x\ny", "y"),
        ("tictactoe", "\n7", "7"),
        ("exact", " \n", None),
        ("rules.py:function", "any  text", "any text"),
    ],
)
def test_what_is_voted_for(spec: str, text: str, vote: str | None) -> None:
    assert ballot([spec])(text) == vote


def test_the_first_verifier_of_several_says_where_the_answer_stands() -> None:
    specs = ["0.1*rules.py:length", "0.9*exact:last_line=true", "0.1*regex:pattern=(?s).*[0-9]"]
    assert ballot(specs)("work\n12") == "12"


def test_two_ways_to_the_same_number_are_two_votes_for_it() -> None:
    answer = ballot(["number"])
    assert answer("1/2 + 1/2 = 1.0") == answer("so it is 1,") == "1"
