"""What of a completion is an answer that others may have given too: what a majority vote counts.

It is the part that the verifier looks at, so that two ways to the same answer are two votes for it. Nothing
here sees a row: what is right plays no part in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fledge.rewards.matching import normalise
from fledge.rewards.numbers import numbers_in
from fledge.rewards.verifiers import VERIFIERS, Part, part_of, split_weight

Ballot = Callable[[str], str | None]


def ballot(specs: Sequence[str]) -> Ballot:
    """A function that says what a completion votes for; None if it gives no answer.

    Of rewards that were read before (see `read_reward`): the part that the first verifier among them looks
    at (`after`, `last_line`), without needless white space; for `normalised` its normalised form, for
    `number` its last number. Without a verifier, the whole text.
    """
    own = (split_weight(spec)[1] for spec in specs)
    bare = next((one for one in own if _name(one) in VERIFIERS), "")
    name, part = _name(bare), part_of(bare) if bare else Part()

    def answer(text: str) -> str | None:
        looked_at = part.of(text) or ""
        if name == "number":
            found = numbers_in(looked_at)
            return str(found[-1]) if found and found[-1] is not None else None
        return (normalise(looked_at) if name == "normalised" else " ".join(looked_at.split())) or None

    return answer


def _name(bare: str) -> str:
    return bare.partition(":")[0]
