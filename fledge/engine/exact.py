"""Exact decoding: the most probable whole text, with a certificate that there is no better one.

A text's log-probability only falls as it grows, so that of a prefix bounds all that begin with it. Prefixes
are expanded best first (as Stahlberg & Byrne 2019, "On NMT search errors and model errors: cat got your
tongue?", do depth first); when the best open one is below the best whole text, that text is the answer. How
many prefixes that takes depends on the answer's probability p: at each length fewer than 1/p are above it.

How memory stays bounded: `prefixes.py`.

Shape suffixes: B prefixes expanded together, V vocabulary, W words of 32 bits, N prefixes that are opened.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fledge.engine import processors
from fledge.engine.beam import Beams, beam_search
from fledge.engine.constraints import Constraint, GrammarConstraint
from fledge.engine.engine import Engine
from fledge.engine.prefixes import OpenPrefixes, Prefixes, PrefixReader
from fledge.engine.sampling import validate
from fledge.engine.scheduler import check_ids
from fledge.engine.search import Hypothesis, completion_of, most_tokens, start_constraint
from fledge.errors import UserError
from fledge.types import Completion, SamplingParams, Token

# (expansions, log-probability of the best whole text, bound of all others), after every pass.
Progress = Callable[[int, float, float], None]


@dataclass(frozen=True)
class Budget:
    """When to give up: after so many prefixes, or seconds (None: no such limit)."""

    expansions: int = 10_000
    seconds: float | None = None


@dataclass(frozen=True)
class ExactResult:
    """The best whole text found. `bound`: no other has a higher log-probability, up to rounding; `certified`:
    so none is better than this one. `found_by` says which search had it first."""

    completion: Completion
    logp: float
    bound: float
    expansions: int
    seconds: float
    found_by: Literal["greedy", "beam", "exact"]

    @property
    def gap(self) -> float:
        """How much more probable another text might be, in nats."""
        return max(0.0, self.bound - self.logp)

    @property
    def certified(self) -> bool:
        """Whether there is none."""
        return self.gap == 0.0


@dataclass
class _Rules:
    """Where a text may end and go on."""

    end_ids: list[int]
    min_tokens: int
    room: int
    constraint: Constraint | None


@dataclass
class _Best:
    """The best whole text so far."""

    logp: float = -math.inf
    tokens: list[Token] = field(default_factory=list)
    found_by: Literal["greedy", "beam", "exact"] = "exact"


@torch.inference_mode()
def exact_search(
    engine: Engine,
    prompt: Sequence[int],
    params: SamplingParams,
    budget: Budget | None = None,
    seed_beams: int = 4,
    progress: Progress | None = None,
) -> ExactResult:
    """The most probable whole continuation of a prompt: one that an end id ends, of at least
    `params.min_tokens` ids and, with the end, at most `params.max_tokens`, within the constraint if there is
    one. The model's own log-probabilities decide: what rules exclude is not shared out among the rest.

    Starts from the best of greedy and beam search (`seed_beams` wide), so the result is never worse. Raises
    UserError for other settings of `params`, for a model without an end, and if there is no whole text, or
    none was found.
    """
    budget, started = budget or Budget(), time.monotonic()
    validate(params, engine.model.config.vocab_size)
    check_exact(params, budget)
    check_ids(prompt, "the prompt", engine.context - 1, engine.model.config.vocab_size)
    end_ids = sorted({i for i in (*engine.eos_ids, *params.stop_ids) if i < engine.model.config.vocab_size})
    if not end_ids:
        raise UserError("the model has no end-of-text id, so no text is whole; give one (stop_ids)")
    room, full = most_tokens(engine, len(prompt), params)
    constraint = start_constraint(engine, params, frozenset(end_ids))
    rules = _Rules(end_ids, params.min_tokens, room, constraint)
    best = _seed(engine, prompt, params, seed_beams)
    reader = PrefixReader(engine, list(prompt), room, budget.expansions)
    queue = OpenPrefixes()
    _expand(reader, [-1], reader.first_BV, rules, queue, best)
    expansions = 1
    while True:
        queue.tidy(best.logp, budget.expansions - expansions)
        if progress is not None:
            progress(expansions, best.logp, max(best.logp, queue.bound))
        taken = queue.take(min(reader.rows, budget.expansions - expansions))
        if not taken:
            break
        if budget.seconds is not None and time.monotonic() - started > budget.seconds:
            queue.dropped = max(queue.dropped, taken[0][0])
            break
        numbers, logps_BV = reader.read(taken)
        expansions += len(taken)
        _expand(reader, numbers, logps_BV, rules, queue, best)
    if not best.tokens:
        raise _none_found(queue.bound, expansions, rules)
    completion = completion_of(best.tokens, frozenset(end_ids), full)
    bound = max(best.logp, queue.bound)
    return ExactResult(completion, best.logp, bound, expansions, time.monotonic() - started, best.found_by)


def check_exact(params: SamplingParams, budget: Budget) -> None:
    """Raise UserError for settings that mean nothing, or under which a prefix bounds nothing."""
    if budget.expansions < 1:
        raise UserError(f"max_expansions {budget.expansions} is below 1")
    if budget.seconds is not None and not budget.seconds > 0:
        raise UserError(f"max_seconds {budget.seconds} is not above 0")
    changed = [
        name
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
                     "frequency_penalty", "logit_bias", "banned", "stop", "n", "top_logprobs", "echo")
        if getattr(params, name) != getattr(SamplingParams(), name)
    ]  # fmt: skip
    if changed:
        raise UserError(
            f"{changed[0]} does not go with exact search: it finds the one most probable text of the "
            "model as it is; a constraint, min_tokens, max_tokens and stop_ids may narrow it"
        )


def _none_found(bound: float, expansions: int, rules: _Rules) -> UserError:
    if bound == -math.inf:
        return UserError(
            f"no whole text is possible between min_tokens {rules.min_tokens} and max_tokens {rules.room}"
            + ("" if rules.constraint is None else " under the constraint")
        )
    return UserError(f"no whole text was found in {expansions:,} expansions; allow more, or raise max_tokens")


def _seed(engine: Engine, prompt: Sequence[int], params: SamplingParams, width: int) -> _Best:
    """The best whole text of greedy and beam search."""
    best = _Best()
    names: tuple[Literal["greedy", "beam"], ...] = ("greedy", "beam")
    for name, beams in zip(names, (Beams(1, 0.0, True), Beams(width, 0.0, "never")), strict=True):
        for found in _found(engine, prompt, params, beams):
            end = found.completion.stop_token
            if end is None or found.logp <= best.logp:
                continue
            inner = zip(found.completion.ids, found.completion.logps, strict=True)
            tokens = [*(Token(i, logp, logp) for i, logp in inner), end]
            if [token.id for token in tokens] != [token.id for token in best.tokens]:
                best = _Best(found.logp, tokens, name)
    return best


def _found(engine: Engine, prompt: Sequence[int], params: SamplingParams, beams: Beams) -> list[Hypothesis]:
    """What a beam finds; nothing where it runs into a dead end."""
    try:
        return beam_search(engine, [prompt], params, beams)[0]
    except UserError:
        return []


def _expand(
    reader: PrefixReader,
    numbers: list[int],
    logps_BV: Tensor,
    rules: _Rules,
    queue: OpenPrefixes,
    best: _Best,
) -> None:
    """Open what may follow after prefixes and could be better than the best whole text, which may change."""
    prefixes = reader.prefixes
    paths = [prefixes.path(number) for number in numbers]
    totals = [prefixes.totals[number] if number >= 0 else 0.0 for number in numbers]
    allowed_BV = _masked(logps_BV, paths, totals, prefixes, rules, queue)
    totals_B1 = torch.tensor(totals, dtype=torch.float64, device=logps_BV.device)[:, None]
    bounds_BV = totals_B1 + allowed_BV
    for row, path in enumerate(paths):
        ends = zip(rules.end_ids, bounds_BV[row, rules.end_ids].tolist(), strict=True)
        end_id, total = max(ends, key=lambda pair: pair[1])
        if len(path) >= rules.min_tokens and total > best.logp:
            _improve(best, prefixes, path, end_id, total, float(logps_BV[row, end_id]))
        if len(path) + 1 >= rules.room:
            bounds_BV[row] = -math.inf
    bounds_BV[:, rules.end_ids] = -math.inf
    queue.add(bounds_BV, numbers, best.logp)


def _improve(
    best: _Best, prefixes: Prefixes, path: list[int], end_id: int, total: float, end_logp: float
) -> None:
    """Make a prefix and its end the best text, unless it is the same one, computed in another batch."""
    ids = [*(prefixes.ids[number] for number in path), end_id]
    if ids == [token.id for token in best.tokens]:
        return
    totals = [0.0, *(prefixes.totals[number] for number in path)]
    logps = [*np.diff(totals).tolist(), end_logp]
    best.tokens = [Token(token_id, logp, logp) for token_id, logp in zip(ids, logps, strict=True)]
    best.logp, best.found_by = total, "exact"


def _masked(
    logps_BV: Tensor,
    paths: list[list[int]],
    totals: list[float],
    prefixes: Prefixes,
    rules: _Rules,
    queue: OpenPrefixes,
) -> Tensor:
    """The log-probabilities (fp64) of what the constraint allows behind each prefix, else -inf."""
    allowed_BV = logps_BV.double()
    if rules.constraint is None:
        return allowed_BV
    words_BW = torch.zeros(len(paths), -(-logps_BV.shape[1] // 32), dtype=torch.int32)
    for words_W, path, total in zip(words_BW, paths, totals, strict=True):
        state = rules.constraint.fork()
        try:
            for number in path:
                state.advance(prefixes.ids[number])
            state.mask(words_W)
        except UserError:  # nothing can follow, or it cannot be said what: then the prefix stays unsettled
            words_W.zero_()
            if not (isinstance(state, GrammarConstraint) and state.is_stuck):
                queue.dropped = max(queue.dropped, total)
    return processors.apply_mask(allowed_BV, words_BW.to(logps_BV.device))
