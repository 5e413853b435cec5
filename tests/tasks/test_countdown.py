"""Countdown: expressions without needless parentheses, true searches, solvable problems."""

from __future__ import annotations

import itertools
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.rewards.arithmetic import evaluate
from fledge.rewards.verifiers import verifier
from fledge.tasks.countdown import Term, countdown_task, results, search


def term(text: str, strength: int = 3) -> Term:
    return Term(int(evaluate(text)[0]), text, strength)


def test_parentheses_stand_where_they_are_needed() -> None:
    made = dict(results(term("7-2", 1), term("8-3", 1)))
    assert {mark: one.text for mark, one in made.items()} == {
        "+": "7-2+8-3",
        "*": "(7-2)*(8-3)",
        "/": "(7-2)/(8-3)",
    }
    made = dict(results(term("9"), term("2*3", 2)))
    assert (made["-"].text, made["*"].text) == ("9-2*3", "9*2*3")
    assert dict(results(term("12"), term("2*3", 2)))["/"].text == "12/(2*3)"
    assert dict(results(term("9"), term("7-2", 1)))["-"].text == "9-(7-2)"


@given(st.lists(st.integers(1, 20), min_size=2, max_size=4), st.integers(0, 2**32))
def test_the_text_of_a_term_has_its_value_and_all_numbers(numbers: list[int], seed: int) -> None:
    rng = random.Random(seed)
    terms = [Term(number, str(number)) for number in numbers]
    while len(terms) > 1:
        one, other = terms.pop(), terms.pop(rng.randrange(len(terms)))
        terms.append(rng.choice(list(results(one, other)))[1])
    value, used = evaluate(terms[0].text, plain=True)
    assert value == terms[0].value > 0
    assert sorted(used) == sorted(numbers)


def all_values(terms: tuple[int, ...]) -> set[int]:
    """Whatever whole positive numbers make with + - * /, values between whole and positive too."""
    if len(terms) == 1:
        return {terms[0]}
    found = set()
    for i, j in itertools.permutations(range(len(terms)), 2):
        a, b = terms[i], terms[j]
        rest = tuple(value for k, value in enumerate(terms) if k not in (i, j))
        made = [a + b, a * b, *([a - b] if a > b else []), *([a // b] if a % b == 0 else [])]
        for value in made:
            found |= all_values((*rest, value))
    return found


@pytest.mark.parametrize("numbers", [(3, 7, 25), (1, 1, 1), (2, 5, 9), (1, 3, 4, 6)])
def test_a_search_without_a_limit_finds_what_can_be_made_and_nothing_else(numbers: tuple[int, ...]) -> None:
    possible = all_values(numbers)
    for target, rng in itertools.product(range(1, 40), (Unshuffled(), random.Random(0))):
        lines = search(numbers, target, rng, max_lines=10_000)
        assert (lines is not None) == (target in possible)
        if lines:
            row = {"numbers": list(numbers), "target": target}
            assert verifier("countdown")(lines[-1], row) == 1.0


class Unshuffled(random.Random):
    """Leaves the order as it is: the first number with the second (+ - * /), with the third, and so on."""

    def shuffle(self, x: object) -> None:
        pass


def test_searches_by_hand() -> None:
    assert search((3, 7, 25), 46, Unshuffled(), 10) == [
        "7+3=10 25 10: 35 15 250",
        "7-3=4 25 4: 29 21 100",
        "7*3=21 25 21: 46",
        "25+7*3",
    ]
    assert search((6, 1, 2, 5), 60, Unshuffled(), 100) == [
        "6+1=7 2 5 7",
        " 5+2=7 7 7: 14 49 1",
        " 5-2=3 7 3: 10 4 21",
        " 5*2=10 7 10: 17 3 70",
        " 7+2=9 5 9: 14 4 45",
        " 7-2=5 5 5: 10 25 1",
        " 7*2=14 5 14: 19 9 70",
        " 7+5=12 2 12: 14 10 24 6",
        " 7-5=2 2 2: 4 4 1",
        " 7*5=35 2 35: 37 33 70",
        "6-1=5 2 5 5",
        " 5+2=7 5 7: 12 2 35",
        " 5-2=3 5 3: 8 2 15",
        " 5*2=10 5 10: 15 5 50 2",
        " 5+2=7 5 7: 12 2 35",
        " 5-2=3 5 3: 8 2 15",
        " 5*2=10 5 10: 15 5 50 2",
        " 5+5=10 2 10: 12 8 20 5",
        " 5*5=25 2 25: 27 23 50",
        " 5/5=1 2 1: 3 1 2 2",
        "6*1=6 2 5 6",
        " 5+2=7 6 7: 13 1 42",
        " 5-2=3 6 3: 9 3 18 2",
        " 5*2=10 6 10: 16 4 60",
        "5*2*6*1",
    ]


def test_the_limit_counts_the_solution() -> None:
    lines = search((3, 7, 25), 46, random.Random(0), 100)
    assert lines is not None
    assert search((3, 7, 25), 46, random.Random(0), len(lines)) == lines
    assert search((3, 7, 25), 46, random.Random(0), len(lines) - 1) is None


def test_every_line_of_a_search_is_true() -> None:
    """The numbers left are those there were but for the two that were taken, with what they made; what is
    listed is what the last two make; only the last list has the target."""
    task = countdown_task(0, train=1, test=1, starter=150, text=0, trace_lines=16)
    for example in task.sft:
        asked, said = (message["content"] for message in example["messages"])
        target, numbers = asked.split(" from ")
        *lines, solution = said.split("\n")
        assert len(lines) + 1 <= 16
        left_at = {0: sorted(map(int, numbers.split()))}
        for line in lines:
            found = re.fullmatch(r"( *)((\d+)[-+*/](\d+))=(\d+)((?: \d+)+)(:(?: \d+)+)?", line)
            assert found is not None
            depth, left = len(found[1]), sorted(map(int, found[6].split()))
            before = list(left_at[depth])
            before.remove(int(found[3]))
            before.remove(int(found[4]))
            assert evaluate(found[2])[0] == int(found[5])
            assert left == sorted([*before, int(found[5])])
            left_at[depth + 1] = left
            assert (found[7] is not None) == (len(left) == 2)
            if found[7]:
                listed = list(map(int, found[7][1:].split()))
                large, small = left[1], left[0]
                possible = [large + small, *([large - small] if large > small else []), large * small]
                possible += [large // small] if large % small == 0 else []
                ends = int(target) in possible
                assert listed == (possible[: possible.index(int(target)) + 1] if ends else possible)
                assert ends == (line is lines[-1])
        assert evaluate(solution)[0] == int(target)


def test_problems_are_within_the_settings_and_have_a_solution() -> None:
    task = countdown_task(0, train=300, test=30, starter=1, text=1, numbers=(3, 4), largest=15, max_target=30)
    verify = verifier("countdown")
    assert {len(row["numbers"]) for row in task.prompts} == {3, 4}
    for row in task.prompts + task.test:
        assert 10 <= row["target"] <= 30
        assert all(1 <= number <= 15 for number in row["numbers"])
        assert row["target"] not in row["numbers"]
        assert verify(row["solution"], row) == 1.0


def test_expressions_alone() -> None:
    task = countdown_task(0, train=5, test=5, starter=20, text=20, numbers=(3,), steps=False)
    assert task.reward == "countdown"
    for line in task.text:
        asked, said = line["text"].split("\n")
        target, numbers = asked.split(" from ")
        value, used = evaluate(said, plain=True)
        assert value == int(target) and sorted(used) == sorted(map(int, numbers.split()))
