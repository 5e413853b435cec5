"""Reversed addition: `123+456=` is answered by the digits of the sum, the least significant first: `975`.

Written this way each digit depends on digits that are already there, which a small model learns far sooner
(Lee et al. 2023, "Teaching arithmetic to small transformers").
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from fledge.tasks.files import Task, conversation, draw, is_test


@dataclass(frozen=True)
class Addition:
    """Two numbers to add."""

    a: int
    b: int

    @property
    def prompt(self) -> str:
        """What is asked: `123+456=`."""
        return f"{self.a}+{self.b}="

    @property
    def answer(self) -> str:
        """The sum's digits, the least significant first."""
        return str(self.a + self.b)[::-1]

    @property
    def key(self) -> tuple[int, int]:
        """The problem, whichever number comes first."""
        return min(self.a, self.b), max(self.a, self.b)

    @property
    def worked(self) -> str:
        """Digit by digit with the carries, then the answer on a line of its own: `8+7=15 2+6+1=9 1+3=4` and
        `594` for 128+367."""
        steps, carry = [], 0
        for x, y in zip(reversed(str(self.a)), reversed(str(self.b)), strict=True):
            digits = [int(x), int(y), *([carry] if carry else [])]
            steps.append(f"{'+'.join(map(str, digits))}={sum(digits)}")
            carry = sum(digits) // 10
        return f"{' '.join(steps)}\n{self.answer}"


def addition_task(
    seed: int, train: int, test: int, starter: int, text: int, digits: int = 3, steps: bool = True
) -> Task:
    """Problems of two numbers of `digits` digits: `train` prompts, `test` test questions, `starter`
    conversations and `text` texts. `steps`: those show the work (see `Addition.worked`), else the answer
    alone. Raises UserError if there are not so many problems."""

    def make(rng: random.Random, for_test: bool) -> Addition | None:
        least, most = 10 ** (digits - 1), 10**digits - 1
        problem = Addition(rng.randint(least, most), rng.randint(least, most))
        return problem if is_test(problem.key) == for_test else None

    def problems(purpose: str, count: int, for_test: bool = False) -> list[Addition]:
        return draw(purpose, seed, count, lambda rng: make(rng, for_test), lambda problem: problem.key)

    shown = problems("worked examples", max(starter, text))
    pairs = [(problem.prompt, problem.worked if steps else problem.answer) for problem in shown]
    return Task(
        "addition",
        "exact:last_line=true" if steps else "exact",
        {"seed": seed, "digits": digits, "steps": steps},
        sft=[conversation(*pair) for pair in pairs[:starter]],
        text=[{"text": "\n".join(pair)} for pair in pairs[:text]],
        prompts=[_row(problem) for problem in problems("prompts", train)],
        test=[_row(problem) for problem in problems("tests", test, for_test=True)],
    )


def _row(problem: Addition) -> dict[str, str]:
    return {"prompt": problem.prompt, "answer": problem.answer}
