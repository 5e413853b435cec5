"""Reversed addition: the form, the work, and that the work is right."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fledge.rewards.arithmetic import evaluate
from fledge.tasks.addition import Addition, addition_task


def test_the_form_by_hand() -> None:
    """128 + 367 = 495, 999 + 111 = 1110."""
    problem = Addition(128, 367)
    assert (problem.prompt, problem.answer) == ("128+367=", "594")
    assert problem.worked == "8+7=15 2+6+1=9 1+3=4\n594"
    assert Addition(999, 111).worked == "9+1=10 9+1+1=11 9+1+1=11\n0111"
    assert Addition(123, 456).worked == "3+6=9 2+5=7 1+4=5\n975"


@given(st.integers(100, 999), st.integers(100, 999))
def test_every_step_is_true_and_they_spell_the_answer(a: int, b: int) -> None:
    steps, answer = Addition(a, b).worked.split("\n")
    values = []
    for step in steps.split():
        said, claimed = step.split("=")
        assert evaluate(said)[0] == int(claimed)
        values.append(int(claimed))
    assert int(answer[::-1]) == a + b
    assert "".join(str(value % 10) for value in values[:-1]) + str(values[-1])[::-1] == answer


def test_answers_alone() -> None:
    task = addition_task(0, train=5, test=5, starter=5, text=5, steps=False)
    assert task.reward == "exact"
    for line in task.text:
        asked, said = line["text"].split("\n")
        a, b = map(int, asked.rstrip("=").split("+"))
        assert int(said[::-1]) == a + b


def test_a_problem_is_the_same_in_either_order() -> None:
    assert Addition(1, 2).key == Addition(2, 1).key != Addition(1, 3).key


def test_other_sizes() -> None:
    task = addition_task(3, train=50, test=20, starter=10, text=0, digits=5)
    numbers = [number for row in task.prompts for number in row["prompt"].rstrip("=").split("+")]
    assert {len(number) for number in numbers} == {5}
    assert (len(task.prompts), len(task.test), len(task.sft), len(task.text)) == (50, 20, 10, 0)
