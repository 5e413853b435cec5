"""Quality rules: numbers worked out by hand, thresholds from the papers, and properties of the table."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.data.quality import RULE_SETS, RULES, choose_rules, judge
from fledge.errors import UserError

PROSE = """Bees keep the temperature of their brood close to thirty-five degrees. On hot days, workers that
carry water spread drops over the cells, and others fan with their wings until the air has cooled.
When winter comes the colony gathers around its queen. The outer bees form a coat, and those inside shiver to
make heat. Do they take turns? Observers have seen that cold bees crawl inward, and that warm ones take their
place at the border. Honey is the fuel for all of this, and a hive may use twenty kilograms of it before the
first willow blooms. "That is why keepers leave enough," as the old books say.""".replace("\n", " ")


def words(count: int, length: int = 5) -> str:
    """So many different words, each of so many letters."""
    return " ".join(
        f"{i:x}".translate(str.maketrans("0123456789", "ghijklmnop")).rjust(length, "z") for i in range(count)
    )


@pytest.mark.parametrize(
    ("rule", "text", "reason"),
    [
        ("min-words", words(49), "49 words < 50"),
        ("min-words", words(50), None),
        ("max-words", "a " * 100_001, "100,001 words > 100,000"),
        ("max-words", "a " * 100_000, None),
        ("word-length", "ab " * 60, "mean word length 2.00 < 3"),
        ("word-length", words(60, 11), "mean word length 11.00 > 10"),
        ("word-length", words(60, 10), None),
        ("symbols", words(9) + " #", None),  # 1 in 10
        ("symbols", words(8) + " #", "hash signs per word 0.11 > 0.1"),
        ("symbols", words(8) + " …", "ellipses per word 0.11 > 0.1"),
        ("symbols", words(19) + " a............", None),  # one ellipsis, however many dots
        ("bullets", "- a\n" * 10, "lines that begin with a bullet 100% > 90%"),
        ("bullets", "- a\n" * 9 + "b", None),
        ("bullets", "-1\n*args\n" * 10, None),  # no bullet without a space
        ("ellipsis-lines", "Read more...\nOne.\nTwo.", "lines that end in an ellipsis 33% > 30%"),
        ("ellipsis-lines", "Read more...\n" * 3 + "One.\n" * 7, None),
        ("letters", "word 12 34 56 word", "words with a letter 40% < 80%"),
        ("letters", "a b c d 12", None),
        ("stop-words", "the the the", "1 different stop words < 2"),
        ("stop-words", "The end of it", None),
        ("lorem-ipsum", "Lorem Ipsum dolor", '"lorem ipsum"'),
        ("curly-brace", "int main() {", "a curly brace"),
        ("sentences", "One. Two. Three! Four?", "4 sentences < 5"),
        ("sentences", 'One. Two. Three! Four? "Five."', None),
        ("sentences", "Version 3.1.2.4.5.6 of it", "0 sentences < 5"),
        ("duplicate-lines", "a\n" * 4 + "b\nc\nd\ne\nf\n", "repeated lines 33% > 30%"),
        ("duplicate-lines", "a\n" * 4 + "b\nc\nd\ne\nf\ng\n", None),  # 3 of 10
        ("duplicate-line-characters", "abcd\nabcd\nefgh\nijkl\n", "characters in repeated lines 25% > 20%"),
        ("duplicate-paragraphs", "a\nb\n\n" * 2 + "c", "repeated paragraphs 33% > 30%"),
        (
            "duplicate-paragraph-characters",
            "abc\n\nabc\n\nabcdef",
            "characters in repeated paragraphs 25% > 20%",
        ),
        # "ab cd" twice: 8 of 12 characters.
        ("top-2-gram", "ab cd ef ab cd gh", "characters in the most frequent 2-gram (ab cd) 67% > 20%"),
        ("top-2-gram", words(200), None),
        # The second "a b c d e" repeats the first: 5 of 11 characters.
        ("duplicate-5-grams", "a b c d e x a b c d e", "characters in repeated 5-grams 45% > 15%"),
        ("duplicate-5-grams", "a b c d x a b c d y", None),
    ],
)  # fmt: skip
def test_a_rule_by_hand(rule: str, text: str, reason: str | None) -> None:
    assert RULES[rule].reason(text) == reason


def test_overlapping_runs_count_once() -> None:
    """A word said 20 times: 15 runs of 5 repeat the first, and cover 19 of the words."""
    assert RULES["duplicate-5-grams"].reason("abc " * 20) == "characters in repeated 5-grams 95% > 15%"
    assert RULES["top-2-gram"].reason("abc " * 20) == (
        "characters in the most frequent 2-gram (abc abc) 100% > 20%"
    )


@given(st.lists(st.sampled_from("abcd"), max_size=60))
def test_repeated_runs_are_those_that_counting_finds(letters: list[str]) -> None:
    """Against the plain definition: mark the words of every run that was there before."""
    for n, limit in zip(range(5, 11), (0.15, 0.14, 0.13, 0.12, 0.11, 0.10), strict=True):
        seen: set[tuple[str, ...]] = set()
        marked: set[int] = set()
        for start in range(len(letters) - n + 1):
            run = tuple(letters[start : start + n])
            if run in seen:
                marked.update(range(start, start + n))
            seen.add(run)
        expected = len(marked) > limit * len(letters)
        assert (RULES[f"duplicate-{n}-grams"].reason(" ".join(letters)) is not None) == expected


@pytest.mark.parametrize(
    ("rule", "text", "left"),
    [
        ("terminal-punctuation", "Menu\nA line.\nAnother one...\n“Said.”", "A line.\n“Said.”"),
        ("line-words", "Two words\nNow three words\n\nx", "Now three words\n"),
        ("javascript", "Turn on JavaScript now.\nText.", "Text."),
        ("policies", "Read our Privacy Policy.\nText.", "Text."),
    ],
)
def test_line_rules_cut_lines(rule: str, text: str, left: str) -> None:
    assert RULES[rule].cut(text).strip("\n") == left.strip("\n")
    assert judge(text, [RULES[rule]]).rule is None


def test_a_text_without_a_line_left_is_left_out() -> None:
    judged = judge("Menu\nHome\n", choose_rules(["terminal-punctuation", "c4"]))
    assert (judged.rule, judged.reason, judged.text) == ("terminal-punctuation", "no line is left", "")
    assert judged.cut[0].lines == ("Menu", "Home")


@given(st.text(st.sampled_from("ab .\n…#{é"), max_size=200))
def test_what_is_cut_and_what_is_left_make_up_the_text(text: str) -> None:
    judged = judge(text, choose_rules(["c4"]))
    assert len(judged.text.encode()) + sum(cut.bytes for cut in judged.cut) == len(text.encode())
    assert judge(judged.text, choose_rules(["c4"])).text == judged.text  # a second time changes nothing


def test_prose_passes_all_rules() -> None:
    assert judge(PROSE, choose_rules(["all"])).rule is None


def test_the_default_leaves_other_kinds_of_text_alone() -> None:
    """Code, a question, a book and Chinese are no page of English prose, and are kept."""
    code = "\n".join(f"def f{i}(x):\n    return x + {i}  # {i}\n" for i in range(40))
    book = words(150_000).replace(" zzzjg ", ".\n\n")
    for text in (code, "What is the capital of France?", book, "我爱你。" * 5):
        assert judge(text, choose_rules(["default"])).rule is None


def names(given: list[str]) -> set[str]:
    return {rule.name for rule in choose_rules(given)}


def test_rules_are_chosen_by_name_and_by_set() -> None:
    gopher = names(["gopher"])
    assert gopher == {name for name, rule in RULES.items() if rule.ruleset == "gopher"}
    assert names(["gopher", "no-stop-words"]) == gopher - {"stop-words"}
    assert names(["no-bullets"]) == set(RULE_SETS["default"]) - {"bullets"}
    assert names(["all", "no-c4"]) == {name for name, rule in RULES.items() if rule.ruleset != "c4"}
    assert names(["none"]) == names([]) == set()
    assert names(["none", "sentences"]) == {"sentences"}


def test_an_unknown_rule_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"--rules no-stopwords: .* the nearest is 'stop-words'"):
        choose_rules(["gopher", "no-stopwords"])


def test_every_rule_says_what_it_asks_for() -> None:
    for rule in RULES.values():
        assert rule.text and (rule.check is None) != (rule.keeps is None)
        assert re.fullmatch(r"[a-z0-9-]+", rule.name) and not rule.name.startswith("no-")
    assert not set(RULES) & set(RULE_SETS)
