"""Verifiable rewards by name: `exact`, `number:tolerance=0.01`, `0.9*countdown`, `rewards.py:function`.

A spec is `[WEIGHT*]NAME[:SETTING=VALUE,...]`. The settings of a verifier are the keywords of the function
that makes it; besides, each has those of `Part`, which say what of a text is looked at.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from fledge.config import nearest
from fledge.errors import UserError
from fledge.rewards.arithmetic import arithmetic, countdown
from fledge.rewards.functions import checked, is_function, load_function
from fledge.rewards.games import tictactoe
from fledge.rewards.json_schema import json_schema
from fledge.rewards.matching import Row, Verifier, exact, normalised, regex
from fledge.rewards.numbers import number, read_number
from fledge.types import RewardFunction, Rollout

VERIFIERS: dict[str, Callable[..., Verifier]] = {
    "exact": exact,
    "normalised": normalised,
    "number": number,
    "regex": regex,
    "json_schema": json_schema,
    "arithmetic": arithmetic,
    "countdown": countdown,
    "tictactoe": tictactoe,
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """What of a text is verified: all, or with `after` what stands behind its last occurrence (a text without
    one gets 0), of that with `last_line` only the last line; white space at the ends aside. So however many
    answers a text lists, one counts."""

    after: str | None = None
    last_line: bool = False

    def of(self, text: str) -> str | None:
        """That part; None if there is none."""
        if self.after is not None:
            _, found, text = text.rpartition(self.after)
            if not found:
                return None
        return text.strip().rpartition("\n")[2] if self.last_line else text


@dataclass(frozen=True)
class Reward:
    """One spec: its own text without the weight, the weight, and the rewards before it is applied."""

    name: str
    weight: float
    function: RewardFunction


def verifier(spec: str) -> Verifier:
    """The verifier of a spec without a weight. Raises UserError for an unknown name, setting or value."""
    name, _, written = spec.partition(":")
    if name not in VERIFIERS:
        raise UserError(
            f"reward {spec!r}: unknown verifier {name!r}; the nearest is {nearest(name, VERIFIERS)!r}"
        )
    part, values = _read_settings(spec, name, written)
    verify = VERIFIERS[name](**values)

    def verify_part(text: str, row: Row) -> float:
        looked_at = part.of(text)
        reward = verify(looked_at or "", row)  # a wrong row is an error whatever the text is
        return 0.0 if looked_at is None else reward

    return verify_part


def part_of(spec: str) -> Part:
    """The part of a completion that a verifier looks at, from its spec without a weight."""
    name, _, written = spec.partition(":")
    return _read_settings(spec, name, written)[0]


def _read_settings(spec: str, name: str, written: str) -> tuple[Part, dict[str, Any]]:
    """The part that is looked at, and the verifier's own settings."""
    make = VERIFIERS[name]
    hints = {**get_type_hints(make), **get_type_hints(Part)}
    hints = {key: hints[key] for key in [*inspect.signature(make).parameters, "after", "last_line"]}
    values = {key: _typed(spec, key, value, hints) for key, value in _settings(spec, written, hints)}
    return Part(**{key: values.pop(key) for key in ("after", "last_line") if key in values}), values


def rewards_of(verify: Verifier, rollouts: list[Rollout]) -> list[float]:
    """What a verifier says of roll-outs; 0 for one that was cut off. Raises UserError, with file and line,
    for a row that lacks what is verified."""
    rewards = []
    for rollout in rollouts:
        try:
            reward = verify(rollout.completion, rollout.row)
        except UserError as error:
            raise UserError(f"{rollout.where}: {error}" if rollout.where else str(error)) from None
        rewards.append(reward if rollout.ended else 0.0)
    return rewards


def split_weight(spec: str) -> tuple[float, str]:
    """The weight of a spec (1 where it has none) and the rest."""
    found = re.fullmatch(r"(-?[0-9]*\.?[0-9]+)\*(.+)", spec, re.DOTALL)
    return (float(found[1]), found[2]) if found else (1.0, spec)


def read_reward(spec: str) -> Reward:
    """One spec, with its weight (1 where it has none). Raises UserError."""
    weight, bare = split_weight(spec)
    if bare.partition(":")[0] not in VERIFIERS and is_function(bare):
        return Reward(bare, weight, checked(load_function(bare), bare))
    return Reward(bare, weight, partial(rewards_of, verifier(bare)))


def reward_function(specs: str | Sequence[str]) -> RewardFunction:
    """The weighted sum of one spec or several. Raises UserError."""
    return weighted_sum(read_rewards([specs] if isinstance(specs, str) else specs))


def read_rewards(specs: Sequence[str]) -> list[Reward]:
    """Several specs. Raises UserError, also if there are none."""
    if not specs:
        raise UserError("no reward is named; the verifiers are " + ", ".join(VERIFIERS))
    return [read_reward(spec) for spec in specs]


def highest(rewards: Sequence[Reward]) -> float | None:
    """The most that all together can give, 1 for each verifier; None where a function is among them."""
    if not all(one.name.partition(":")[0] in VERIFIERS for one in rewards):
        return None
    return sum(max(one.weight, 0.0) for one in rewards)


def weighted_sum(rewards: Sequence[Reward]) -> RewardFunction:
    """One reward function of several."""

    def summed(rollouts: list[Rollout]) -> list[float]:
        columns = [reward.function(rollouts) for reward in rewards]
        weights = [reward.weight for reward in rewards]
        return [sum(w * r for w, r in zip(weights, row, strict=True)) for row in zip(*columns, strict=True)]

    return summed


def _settings(spec: str, written: str, hints: dict[str, Any]) -> list[tuple[str, str]]:
    """`a=1,b=2` as pairs. A comma ends a value only where the name of a setting follows: those of patterns
    need no quotes."""
    if not written:
        return []
    known = "|".join(hints)
    pairs = []
    for item in re.split(rf",(?=(?:{known})=)", written):
        name, equals, value = item.partition("=")
        if name not in hints or not equals:
            raise UserError(
                f"reward {spec!r}: {item!r} is not SETTING=VALUE; the settings are {', '.join(hints)}"
            )
        pairs.append((name, value))
    if len(dict(pairs)) < len(pairs):
        raise UserError(f"reward {spec!r}: a setting is there twice; leave one out")
    return pairs


def _typed(spec: str, name: str, value: str, hints: dict[str, Any]) -> Any:
    """The value of a setting in the type that its verifier takes."""
    wanted = ""
    if hints[name] is bool:
        wanted = "" if value in ("true", "false") else "true or false"
        converted: Any = value == "true"
    elif hints[name] is Fraction:
        converted = read_number(value)
        wanted = "" if converted is not None and converted >= 0 else "a number of at least 0"
    elif hints[name] == Path | None:
        converted = Path(value)
    else:
        converted, wanted = value, "" if value else "a text that is not empty"
    if wanted:
        raise UserError(f"reward {spec!r}: {name} must be {wanted}, not {value!r}")
    return converted
