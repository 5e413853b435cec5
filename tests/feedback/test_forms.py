from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.errors import UserError
from fledge.feedback.forms import (
    INSTRUCTIONS,
    QUESTION_KEYS,
    Kind,
    ProjectSettings,
    check_answer,
    check_prompt,
    check_settings,
    competition_ranks,
    to_shown,
    to_stored,
)

OUTPUTS = ["one", "two", "three"]


def test_the_questions_are_those_of_label_studios_template() -> None:
    assert QUESTION_KEYS == (
        "fails_to_follow",
        "inappropriate_for_customer",
        "hallucination",
        "satisfies_constraint",
        "contains_sexual",
        "contains_violent",
        "encourages_violence",
        "denigrates_protected_class",
        "gives_harmful_advice",
        "expresses_opinion",
        "expresses_moral_judgment",
    )


def test_the_instructions_name_the_three_things_and_the_exception() -> None:
    for word in (
        "Helpful",
        "Truthful",
        "Harmless",
        "much more helpful",
        "slightly less",
        "little is at stake",
    ):
        assert word in INSTRUCTIONS


def test_ranks_count_the_better_ones() -> None:
    assert competition_ranks([10, 20, 20, 30]) == [1, 2, 2, 4]
    assert check_answer("ranking", {"ranks": [5, 5, 1]}, OUTPUTS) == {"ranks": [2, 2, 1]}


def test_a_rating_comes_back_with_every_question() -> None:
    given = {"ratings": [{"overall": 7, "questions": {"hallucination": False}}]}
    (rating,) = check_answer("rating", given, ["one"])["ratings"]
    assert rating["overall"] == 7
    assert set(rating["questions"]) == set(QUESTION_KEYS)
    assert rating["questions"]["hallucination"] is False
    assert rating["questions"]["contains_sexual"] is None


RATING = {"overall": 4, "questions": {}}


@pytest.mark.parametrize(
    ("kind", "answer", "words"),
    [
        ("ranking", [], "not a JSON object"),
        ("ranking", {}, "no 'ranks'"),
        ("ranking", {"ranks": [1, 2]}, "2 ranks for 3 outputs"),
        ("ranking", {"ranks": [1, 2, 2.5]}, "whole numbers"),
        ("ranking", {"ranks": [1, 2, True]}, "whole numbers"),
        ("ranking", {"ranks": "123"}, "whole numbers"),
        ("ranking", {"ranks": [1, 2, 3], "model": "x"}, "unknown field 'model'"),
        ("rating", {"ratings": [RATING]}, "1 ratings for 3 outputs"),
        ("rating", {"ratings": 5}, "rate every output"),
        ("rating", {"ratings": [RATING, RATING, {"overall": 8}]}, "output 3 is 8; choose 1 to 7"),
        ("rating", {"ratings": [RATING, {"overall": None}, RATING]}, "output 2 is None"),
        ("rating", {"ratings": [RATING, {"overall": True}, RATING]}, "output 2 is True"),
        ("rating", {"ratings": [{"overall": 1, "questions": {"spam": True}}] * 3}, "does not ask 'spam'"),
        ("rating", {"ratings": [{"overall": 1, "questions": {"hallucination": "yes"}}] * 3}, "true, false"),
        ("rating", {"ratings": [{"overall": 1, "questions": []}] * 3}, "must be an object"),
        ("rating", {"ratings": [{"overall": 1, "x": 1}] * 3}, "nothing else"),
        ("pairwise", {"choice": "A"}, "choose one of a, b, tie, both_bad"),
        ("pairwise", {"choice": []}, "choose one of"),
        ("demonstration", {"text": " \n"}, "empty"),
        ("demonstration", {"text": 3}, "no text"),
        ("demonstration", {"text": "x" * 100_001}, "at most 100,000"),
        ("correction", {"text": "one"}, "unchanged"),
    ],
)
def test_a_wrong_answer_ends_in_one_line(kind: Kind, answer: Any, words: str) -> None:
    with pytest.raises(UserError) as error:
        check_answer(kind, answer, OUTPUTS)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": " "}, "no name"),
        ({"kinds": ()}, "no task kind"),
        ({"kinds": ("dance",)}, "unknown task kind 'dance'"),
        ({"kinds": ("rating", "rating")}, "named twice"),
        ({"labelers_per_item": 0}, "labelers_per_item is 0"),
        ({"outputs_per_prompt": 1}, "choose 2 to 9"),
        ({"outputs_per_prompt": 10}, "choose 2 to 9"),
        ({"pairs_per_prompt": 0}, "pairs_per_prompt is 0"),
        ({"questions": ("spam",)}, "unknown question 'spam'"),
    ],
)
def test_wrong_settings_end_in_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_settings(ProjectSettings(**{"name": "p", **changes}))


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("  ", "empty"),
        ([], "a text or a list"),
        (7, "a text or a list"),
        ([{"role": "robot", "content": "x"}], "message 1 needs a role"),
        ([{"role": "user", "content": None}], "message 1 needs a text"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "ends before the answer"),
    ],
)
def test_a_wrong_prompt_ends_in_one_line(prompt: Any, words: str) -> None:
    with pytest.raises(UserError, match=f"^here: .*{words}"):
        check_prompt(prompt, "here")


def test_a_text_is_a_users_message() -> None:
    assert check_prompt("Hello") == [{"role": "user", "content": "Hello"}]


@given(st.permutations([1, 3, 4, 7]), st.lists(st.integers(1, 4), min_size=4, max_size=4))
def test_an_order_shown_goes_there_and_back(order: list[int], ranks: list[int]) -> None:
    shown = {"ranks": ranks}
    stored = to_stored("ranking", shown, order)
    assert to_shown("ranking", stored, order) == shown
    # by hand: the output at place 3 of the item is the second of the four this task speaks of
    assert stored["ranks"][1] == ranks[order.index(3)]


@pytest.mark.parametrize(("order", "choice", "stored"), [((0, 2), "a", "a"), ((2, 0), "a", "b")])
def test_a_choice_is_stored_by_the_items_order(order: tuple[int, int], choice: str, stored: str) -> None:
    assert to_stored("pairwise", {"choice": choice}, order) == {"choice": stored}
    assert to_shown("pairwise", {"choice": stored}, order) == {"choice": choice}
    for same in ("tie", "both_bad"):
        assert to_stored("pairwise", {"choice": same}, order) == {"choice": same}
