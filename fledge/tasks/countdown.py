"""Countdown: make a target of some numbers with + - * /, each used once; with the search written out as text.

Asked as `46 from 3 7 25`. A search takes two numbers, writes what one operation makes of them and the
numbers that are left, and goes on from there; with two numbers left it lists all that they can make. What is
deeper is set in by a space. It ends when the target is there, and the expression follows on its own line:

    7+3=10 25 10: 35 15 250
    7-3=4 25 4: 29 21 100
    7*3=21 25 21: 46
    25+7*3

Values between are whole and above 0, as in the television game (a search as text: Gandhi et al. 2024,
"Stream of Search").
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fledge.tasks.files import Task, conversation, draw, is_test

MIN_TARGET = 10
# Random orders in which a search is tried before a problem is given up as an example.
TRIES = 100


@dataclass(frozen=True)
class Term:
    """A value and the expression that has it; `strength` is that of its weakest operator (3: none)."""

    value: int
    text: str
    strength: int = 3


@dataclass(frozen=True)
class Countdown:
    """Numbers and a target; `solution` is one expression that makes it."""

    numbers: tuple[int, ...]
    target: int
    solution: str

    @property
    def prompt(self) -> str:
        """What is asked: `46 from 3 7 25`."""
        return f"{self.target} from {' '.join(map(str, self.numbers))}"

    @property
    def key(self) -> tuple[int, ...]:
        """The problem, in whichever order the numbers come."""
        return (self.target, *sorted(self.numbers))


def results(one: Term, other: Term) -> Iterator[tuple[str, Term]]:
    """What one operation makes of two terms: its mark and the result, in the order + - * /; the larger value
    comes first."""
    a, b = (one, other) if one.value >= other.value else (other, one)
    yield "+", Term(a.value + b.value, f"{a.text}+{b.text}", 1)
    if a.value > b.value:
        yield "-", Term(a.value - b.value, f"{a.text}-{_inside(b, 2)}", 1)
    yield "*", Term(a.value * b.value, f"{_inside(a, 2)}*{_inside(b, 2)}", 2)
    if a.value % b.value == 0:
        yield "/", Term(a.value // b.value, f"{_inside(a, 2)}/{_inside(b, 3)}", 2)


def search(numbers: Sequence[int], target: int, rng: random.Random, max_lines: int) -> list[str] | None:
    """The lines of a depth-first search that tries operations in random order, the last one the solution;
    None if it is longer than `max_lines` or there is no solution."""
    lines: list[str] = []

    def from_terms(terms: list[Term]) -> Term | None:
        steps = [
            (line, [term for k, term in enumerate(terms) if k not in (i, j)] + [made])
            for i, j in itertools.combinations(range(len(terms)), 2)
            for line, made in _step_lines(terms[i], terms[j])
        ]
        rng.shuffle(steps)
        for line, left in steps:
            if len(lines) + 2 > max_lines:
                return None
            values = " ".join(str(term.value) for term in left)
            start = f"{' ' * (len(numbers) - len(terms))}{line} {values}"
            if len(left) > 2:
                lines.append(start)
                if found := from_terms(left):
                    return found
                continue
            listed, last = _until(target, left)
            lines.append(f"{start}: {' '.join(listed)}")
            if last is not None:
                return last
        return None

    found = from_terms([Term(number, str(number)) for number in numbers])
    return [*lines, found.text] if found else None


def countdown_task(
    seed: int,
    train: int,
    test: int,
    starter: int,
    text: int,
    numbers: Sequence[int] = (3, 4),
    largest: int = 20,
    max_target: int = 99,
    trace_lines: int = 16,
    steps: bool = True,
) -> Task:
    """Problems of as many numbers from 1 to `largest` as `numbers` says, with targets from 10 to
    `max_target`: `train` prompts, `test` test questions, `starter` conversations and `text` texts that show a
    search of at most `trace_lines` lines (a problem for which a hundred random orders find none is no
    example), or without `steps` the expression alone. Raises UserError if there are not so many problems."""

    def make(rng: random.Random, for_test: bool) -> Countdown | None:
        problem = _random_problem(rng, rng.choice(numbers), largest)
        is_wanted = problem is not None and MIN_TARGET <= problem.target <= max_target
        return problem if problem and is_wanted and is_test(problem.key) == for_test else None

    def worked(rng: random.Random) -> tuple[Countdown, list[str]] | None:
        problem = make(rng, for_test=False)
        if problem is None:
            return None
        if not steps:
            return problem, [problem.solution]
        searches = (search(problem.numbers, problem.target, rng, trace_lines) for _ in range(TRIES))
        lines = next(filter(None, searches), None)
        return (problem, lines) if lines else None

    def problems(purpose: str, count: int, for_test: bool = False) -> list[Countdown]:
        return draw(purpose, seed, count, lambda rng: make(rng, for_test), lambda problem: problem.key)

    shown = draw("worked examples", seed, max(starter, text), worked, lambda pair: pair[0].key)
    pairs = [(problem.prompt, "\n".join(lines)) for problem, lines in shown]
    return Task(
        "countdown",
        "countdown:last_line=true" if steps else "countdown",
        {
            "seed": seed,
            "numbers": list(numbers),
            "largest": largest,
            "max_target": max_target,
            "trace_lines": trace_lines,
            "steps": steps,
        },
        sft=[conversation(*pair) for pair in pairs[:starter]],
        text=[{"text": "\n".join(pair)} for pair in pairs[:text]],
        prompts=[_row(problem) for problem in problems("prompts", train)],
        test=[_row(problem) for problem in problems("tests", test, for_test=True)],
    )


def _row(problem: Countdown) -> dict[str, object]:
    return {
        "prompt": problem.prompt,
        "numbers": list(problem.numbers),
        "target": problem.target,
        "use": "all",
        "solution": problem.solution,
    }


def _random_problem(rng: random.Random, count: int, largest: int) -> Countdown | None:
    """Random numbers, joined by random operations to the target; None where the target is one of them."""
    numbers = tuple(rng.randint(1, largest) for _ in range(count))
    terms = [Term(number, str(number)) for number in numbers]
    while len(terms) > 1:
        one, other = (terms.pop(rng.randrange(len(terms))) for _ in range(2))
        terms.append(rng.choice(list(results(one, other)))[1])
    return None if terms[0].value in numbers else Countdown(numbers, terms[0].value, terms[0].text)


def _step_lines(one: Term, other: Term) -> Iterator[tuple[str, Term]]:
    a, b = max(one.value, other.value), min(one.value, other.value)
    for mark, made in results(one, other):
        yield f"{a}{mark}{b}={made.value}", made


def _until(target: int, two: Sequence[Term]) -> tuple[list[str], Term | None]:
    """What the last two numbers make, to the target if that is among it."""
    listed = []
    for _, made in results(two[0], two[1]):
        listed.append(str(made.value))
        if made.value == target:
            return listed, made
    return listed, None


def _inside(term: Term, strength: int) -> str:
    """A term as an operand of an operator that binds so strongly."""
    return f"({term.text})" if term.strength < strength else term.text
