"""Quality rules by name: what a page of plain prose keeps to, after the papers on Gopher and C4."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from fledge.config import nearest
from fledge.data.rules import (
    Text,
    bullets,
    curly_brace,
    duplicate_ngrams,
    duplicates,
    ellipsis_lines,
    ends_a_sentence,
    has_three_words,
    letters,
    lorem_ipsum,
    max_words,
    min_words,
    sentences,
    stop_words,
    symbols,
    top_ngram,
    without_javascript,
    without_policy,
    word_length,
)
from fledge.errors import UserError

Check = Callable[[Text], str | None]
KeepLine = Callable[[str], bool]


@dataclass(frozen=True)
class Rule:
    """A rule by its name; it looks at documents (`check`) or at lines (`keeps`)."""

    name: str
    ruleset: str
    text: str
    """What it asks for, in words."""
    check: Check | None = None
    """The reason for which a document is left out, with its number; None if it may stay."""
    keeps: KeepLine | None = None
    """Whether a line stays."""

    def reason(self, text: str) -> str | None:
        """Why a document would be left out by this rule alone; None if it stays."""
        return self.check(Text(text)) if self.check else None

    def cut(self, text: str) -> str:
        """The text without the lines that this rule takes out; blank lines stay."""
        lines = text.split("\n")
        kept = [line for line in lines if self.keeps is None or not line.strip() or self.keeps(line.strip())]
        return text if len(kept) == len(lines) else "\n".join(kept).strip("\n")


def _repetition_rules() -> Iterator[Rule]:
    for what, limit in (("lines", 0.3), ("paragraphs", 0.3)):
        name = f"duplicate-{what}"
        said = f"at most {limit:.0%} of {what} repeat an earlier one"
        yield Rule(name, "gopher-repetition", said, partial(duplicates, what, "number", limit))
    for what, limit in (("lines", 0.2), ("paragraphs", 0.2)):
        name = f"duplicate-{what[:-1]}-characters"
        said = f"at most {limit:.0%} of characters are in {what} that repeat an earlier one"
        yield Rule(name, "gopher-repetition", said, partial(duplicates, what, "characters", limit))
    for n, limit in ((2, 0.20), (3, 0.18), (4, 0.16)):
        said = f"at most {limit:.0%} of characters are in the most frequent run of {n} words"
        yield Rule(f"top-{n}-gram", "gopher-repetition", said, partial(top_ngram, n, limit))
    for n, limit in zip(range(5, 11), (0.15, 0.14, 0.13, 0.12, 0.11, 0.10), strict=True):
        said = f"at most {limit:.0%} of characters are in runs of {n} words that repeat an earlier one"
        yield Rule(f"duplicate-{n}-grams", "gopher-repetition", said, partial(duplicate_ngrams, n, limit))


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("terminal-punctuation", "c4", "lines end in a full stop, ?, ! or a quotation mark",
             keeps=ends_a_sentence),
        Rule("line-words", "c4", "lines have at least 3 words", keeps=has_three_words),
        Rule("javascript", "c4", "lines do not mention JavaScript", keeps=without_javascript),
        Rule("policies", "c4", "lines do not mention terms of use or cookies", keeps=without_policy),
        Rule("min-words", "gopher", "at least 50 words", min_words),
        Rule("max-words", "gopher", "at most 100,000 words", max_words),
        Rule("word-length", "gopher", "words have 3 to 10 characters in the mean", word_length),
        Rule("symbols", "gopher", "at most 0.1 hash signs and 0.1 ellipses per word", symbols),
        Rule("bullets", "gopher", "at most 90% of lines begin with a bullet", bullets),
        Rule("ellipsis-lines", "gopher", "at most 30% of lines end in an ellipsis", ellipsis_lines),
        Rule("letters", "gopher", "at least 80% of words have a letter", letters),
        Rule("stop-words", "gopher", "at least two of: the, be, to, of, and, that, have, with", stop_words),
        *_repetition_rules(),
        Rule("lorem-ipsum", "c4", 'no "lorem ipsum"', lorem_ipsum),
        Rule("curly-brace", "c4", "no curly brace", curly_brace),
        Rule("sentences", "c4", "at least 5 sentences", sentences),
    )
}  # fmt: skip
"""All rules by name, in the order in which they are applied: lines are cut before documents are judged."""

DEFAULT_RULES = ("default",)
# What leaves code, questions, tables and books alone: these rules took below 1% of each of eight sources of
# clean text of different kinds (docs/data/cleaning.md).
_DEFAULT = ("bullets", "ellipsis-lines", "duplicate-paragraphs", "duplicate-paragraph-characters")
RULE_SETS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    **{
        ruleset: tuple(rule.name for rule in RULES.values() if rule.ruleset == ruleset)
        for ruleset in ("gopher", "gopher-repetition", "c4")
    },
    "all": tuple(RULES),
    "none": (),
}


def choose_rules(names: Sequence[str]) -> tuple[Rule, ...]:
    """The rules that a list of names means, in the order of the table.

    A name is a rule or a set of rules; with `no-` in front it is taken out again. A list of nothing but
    `no-...` takes out of the default set. Raises UserError for an unknown name.
    """
    chosen: set[str] = set()
    if names and all(name.startswith("no-") for name in names):
        chosen.update(RULE_SETS["default"])
    for name in names:
        plain = name.removeprefix("no-")
        if plain not in RULES and plain not in RULE_SETS:
            known = nearest(plain, [*RULE_SETS, *RULES])
            raise UserError(
                f"--rules {name}: there is no such rule or set of rules; the nearest is {known!r}"
            )
        members = RULE_SETS.get(plain, (plain,))
        if name.startswith("no-"):
            chosen.difference_update(members)
        else:
            chosen.update(members)
    return tuple(rule for rule in RULES.values() if rule.name in chosen)


@dataclass(frozen=True)
class Cut:
    """The lines that a rule took out of a text."""

    rule: str
    lines: tuple[str, ...]
    bytes: int
    """With their line breaks."""


@dataclass(frozen=True)
class Judged:
    """What rules made of a text."""

    text: str
    """What is left of it."""
    rule: str | None = None
    """The rule that left the document out; None if it stays."""
    reason: str = ""
    cut: tuple[Cut, ...] = ()
    """What line rules took out."""


def judge(text: str, rules: Iterable[Rule]) -> Judged:
    """Apply rules in their order; the first that leaves the document out is the last that is asked."""
    result = Judged(text)
    shared = Text(text)
    for rule in rules:
        if rule.keeps:
            left = rule.cut(shared.text)
            if left != shared.text:
                lines = tuple(line for line in shared.lines if not rule.keeps(line))
                size = len(shared.text.encode()) - len(left.encode())
                result = replace(result, text=left, cut=(*result.cut, Cut(rule.name, lines, size)))
                shared = Text(left)
                if not left.strip():
                    return replace(result, rule=rule.name, reason="no line is left")
        elif rule.check and (reason := rule.check(shared)):
            return replace(result, rule=rule.name, reason=reason)
    return result
