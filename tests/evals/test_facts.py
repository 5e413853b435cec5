"""Scores of short answers against hand calculations and published numbers."""

from __future__ import annotations

import pytest

from fledge.evals.facts import (
    NgramNameClassifier,
    is_refusal,
    is_right,
    nearest_name_baseline,
    token_f1,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("prediction", "gold", "score"),
    [
        ("Return the size.", "return SIZE", 1.0),
        ("The cat sat", "a cat sat down", 0.8),  # 2 of 2 and 2 of 3 words: 2 * 2 / 5
        ("one two", "three four", 0.0),
        ("x x", "x", 2 / 3),  # a word counts as often as it stands on both sides
        ("", "something", 0.0),
        ("the", "", 1.0),
    ],
)
def test_token_f1(prediction: str, gold: str, score: float) -> None:
    assert token_f1(prediction, gold) == pytest.approx(score)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3 (score)
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_is_newcombes(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n, z=1.959964) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_without_observations_says_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    "text",
    [
        "I don't know json.fetch.",
        "I don\u2019t know it.",
        "Sorry, I do not know that name.",
        "I'm not sure what that is.",
        "json.fetch does not exist.",
        "There is no such function.",
    ],
)
def test_refusals(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    ["Return True if the name is not known.", "Raised when the key is unknown.", "", "Know your limits."],
)
def test_answers_are_no_refusals(text: str) -> None:
    assert not is_refusal(text)


def test_right_means_f1_of_at_least_08_or_a_refusal() -> None:
    assert is_right("the cat sat", "a cat sat down")
    assert not is_right("cat", "a cat sat down")
    assert is_right("I don't know x.", None)
    assert not is_right("A cat.", None)
    assert is_right("a.b...? I don't know that name.", None)
    assert is_right("a.b_c2? I don't know that name.", None)
    assert not is_right("a.b: Does what I don't know.", None)


def test_nearest_name_takes_the_answer_of_the_most_similar_name() -> None:
    train = [("json.loads", "A"), ("textwrap.dedent", "B"), ("os.path.join", "C")]
    names = ["json.load", "textwrap.indent", "posixpath.join", "json.loads"]
    assert nearest_name_baseline(train, names) == ["A", "B", "C", "A"]
    assert nearest_name_baseline([], ["x"]) == [""]


def test_classifier_finds_a_spelling_that_gives_names_away_and_nothing_else() -> None:
    real = [f"mod.read_{a}{b}" for a in "abcdefgh" for b in "stuvwxyz"]
    fake = [f"mod.qzqz_{a}{b}" for a in "abcdefgh" for b in "stuvwxyz"]
    told_apart = NgramNameClassifier(real[::2], fake[::2]).evaluate(real[1::2], fake[1::2])
    assert (told_apart.refused_invented.rate, told_apart.wrongly_refused.rate, told_apart.accuracy) == (
        1.0,
        0.0,
        1.0,
    )
    alike = NgramNameClassifier(real[::2], real[::2]).evaluate(real[1::2], real[1::2])
    assert alike.accuracy == 0.5
