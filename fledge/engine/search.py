"""What beam search and exact search have in common: where a text ends, and rows of a cache that fork."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fledge.engine.constraints import Constraint
from fledge.engine.engine import Engine
from fledge.errors import UserError
from fledge.model.kv_cache import KVCache
from fledge.types import Completion, FinishReason, SamplingParams, Token


@dataclass(frozen=True)
class Hypothesis:
    """A continuation that was found, and what it was ranked by: its score, or (stochastic) its
    log-probability plus Gumbel noise."""

    completion: Completion
    score: float

    @property
    def logp(self) -> float:
        """The model's own log-probability of all tokens, the end among them."""
        return logp_of(self.completion)


def start_constraint(engine: Engine, params: SamplingParams, end_ids: frozenset[int]) -> Constraint | None:
    """The beginning of a text by the request's grammar. Raises UserError if nothing could end it."""
    if params.constraint is None:
        return None
    if engine.grammars is None:
        raise UserError("this engine was made without Grammars and can hold no text to a constraint")
    if not end_ids:
        raise UserError("the model has no end-of-text id; a search under a constraint needs one (stop_ids)")
    return engine.grammars.start(params.constraint, end_ids)


def most_tokens(engine: Engine, prompt_tokens: int, params: SamplingParams) -> tuple[int, FinishReason]:
    """The most tokens that a completion can have, its end among them, and what to call that limit."""
    room = engine.context - prompt_tokens
    return (params.max_tokens, "length") if params.max_tokens <= room else (room, "context")


def copy_rows(cache: KVCache, rows: Sequence[int], tokens: int) -> None:
    """Let row i hold what row `rows[i]` held, up to `tokens` of it; later rows stay. Layer by layer, so that
    only one layer is in memory twice."""
    if list(rows) == list(range(len(rows))):
        return
    rows_B = torch.tensor(rows, device=cache.lengths_B.device)
    for t in cache.layers:
        t[: len(rows), :, :tokens] = t[rows_B, :, :tokens]
    cache.lengths_B[: len(rows)] = cache.lengths_B[rows_B]


def completion_of(tokens: list[Token], end_ids: frozenset[int], full: FinishReason) -> Completion:
    """Tokens as a completion; the end is no part of its ids."""
    is_whole = tokens[-1].id in end_ids
    inner = tokens[:-1] if is_whole else tokens
    return Completion(
        [token.id for token in inner],
        [token.logp for token in inner],
        "stop" if is_whole else full,
        [token.sampled_logp for token in inner],
        [() for _ in inner],
        tokens[-1] if is_whole else None,
    )


def logp_of(completion: Completion) -> float:
    """The model's own log-probability (nats) of all tokens, the end among them."""
    end = completion.stop_token
    return math.fsum(completion.logps) + (end.logp if end else 0.0)
