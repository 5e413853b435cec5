"""From scores to a chosen token, with settings of its own for every row of a batch.

The processors come in the order of `transformers`' `generate` (5.23, `_get_logits_processor`; frequency and
presence, which it lacks, follow the repetition penalty as in vLLM), each left out when no row needs it:

    logit bias, repetition penalty, frequency and presence penalty, banned sequences, minimum length,
    the constraint's mask; then, for rows that sample: temperature, top-k, top-p, min-p.

A row's random number is a hash of its seed, its number and its position: no state, so rows may join, leave,
fork and roll back, and what a row draws never depends on its neighbours.

Shape suffixes: B rows, V vocabulary, T tokens of the longest row, N (row, id) pairs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fledge.engine import processors
from fledge.engine.constraints import Constraint
from fledge.errors import UserError
from fledge.types import SamplingParams, Token

# Scores that are multiplied or divided by this, or less it times a count of tokens, stay numbers in fp32.
LARGEST = 1e20
# A bias of this size is a ban or, positive, a command.
FULL_BIAS = 100.0


def validate(params: SamplingParams, vocab_size: int | None = None) -> None:
    """Raise UserError for a value that means nothing, or (given its size) an id outside the vocabulary."""
    if not 0 <= params.temperature <= LARGEST:
        raise UserError(f"temperature {params.temperature} is not from 0 to {LARGEST:g}; 0 is greedy")
    if params.top_k is not None and params.top_k < 1:
        raise UserError(f"top_k {params.top_k} is below 1; leave it out to consider every token")
    if params.top_p is not None and not 0 < params.top_p <= 1:
        raise UserError(f"top_p {params.top_p} is not in (0, 1]; 1 keeps every token")
    if params.min_p is not None and not 0 <= params.min_p <= 1:
        raise UserError(f"min_p {params.min_p} is not in [0, 1]; 0 keeps every token")
    if not 1 / LARGEST <= params.repetition_penalty <= LARGEST:
        penalty = params.repetition_penalty
        raise UserError(f"repetition_penalty {penalty} is not above 0, and at most {LARGEST:g}; 1 is none")
    for name in ("presence_penalty", "frequency_penalty"):
        if not abs(getattr(params, name)) <= LARGEST:
            raise UserError(
                f"{name} {getattr(params, name)} is not from -{LARGEST:g} to {LARGEST:g}; 0 is none"
            )
    if params.max_tokens < (0 if params.echo else 1):
        raise UserError(f"max_tokens {params.max_tokens} is below 1")
    if not 0 <= params.min_tokens <= params.max_tokens:
        raise UserError(f"min_tokens {params.min_tokens} is not between 0 and max_tokens {params.max_tokens}")
    if params.n < 1:
        raise UserError(f"n {params.n} is below 1; it is how many completions to make")
    if params.top_logprobs < 0:
        raise UserError(f"top_logprobs {params.top_logprobs} is below 0")
    if "" in params.stop:
        raise UserError("a stop string is empty; it would end every answer before its first character")
    if () in params.banned:
        raise UserError("a banned sequence is empty; it has no token to ban")
    for token_id, bias in params.logit_bias.items():
        if not -FULL_BIAS <= bias <= FULL_BIAS:
            raise UserError(f"logit_bias of token {token_id} is {bias}; it must be between -100 and 100")
    if vocab_size is not None:
        _validate_ids(params, vocab_size)


def _validate_ids(params: SamplingParams, vocab_size: int) -> None:
    banned = {token_id for sequence in params.banned for token_id in sequence}
    for name, ids in (("logit_bias", params.logit_bias), ("stop_ids", params.stop_ids), ("banned", banned)):
        if unknown := sorted(token_id for token_id in ids if not 0 <= token_id < vocab_size):
            raise UserError(
                f"{name}: token {unknown[0]} is unknown; the model's ids go from 0 to {vocab_size - 1}"
            )


def uniform(seed: int, number: int, sample: int, position: int, purpose: str = "sampling") -> float:
    """A number in [0, 1), the same on every machine: for token `position` of the completion `sample` of the
    request `number` of a call with `seed`."""
    digest = hashlib.sha256(f"{purpose}/{seed}/{number}/{sample}/{position}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) * 2.0**-53


@dataclass
class Row:
    """What choosing a row's next token depends on: `ids` are the prompt's and those made so far."""

    params: SamplingParams
    ids: list[int]
    prompt_tokens: int
    end_ids: frozenset[int] = field(default=frozenset())
    number: int = 0
    sample: int = 0
    constraint: Constraint | None = None

    @property
    def made(self) -> int:
        """How many tokens were made."""
        return len(self.ids) - self.prompt_tokens

    def forced(self) -> list[int]:
        """The ids that come next because the constraint leaves nothing else. Where a ban might forbid one
        they are chosen one by one."""
        if self.constraint is None or self.params.banned or self.params.logit_bias:
            return []
        return self.constraint.forced()


class Sampler:
    """Chooses the next token of every row of a batch. Make another when rows join, leave or change places."""

    def __init__(self, rows: Sequence[Row], device: torch.device) -> None:
        """Gather one parameter tensor a setting; None for a setting that no row uses."""
        self.rows, self.device = list(rows), device
        settings = [row.params for row in rows]
        self.greedy_B = self._tensor([p.temperature == 0 for p in settings], torch.bool)
        self.all_greedy = all(p.temperature == 0 for p in settings)
        self.temperature_B = self._tensor([p.temperature or 1.0 for p in settings])
        self.top_k_B = self._used(
            [min(p.top_k or processors.EVERY, processors.EVERY) for p in settings], processors.EVERY
        )
        self.top_p_B = self._used([p.top_p or 1.0 for p in settings], 1.0)
        self.min_p_B = self._used([p.min_p or 0.0 for p in settings], 0.0)
        self.repetition_B = self._used([p.repetition_penalty for p in settings], 1.0)
        self.presence_B = self._used([p.presence_penalty for p in settings], 0.0)
        self.frequency_B = self._used([p.frequency_penalty for p in settings], 0.0)
        self.top_logprobs = max(p.top_logprobs for p in settings)
        self._gather_bias(settings)
        # What is always banned is found once, what depends on the last tokens at every step.
        self.always = [(i, s[0]) for i, p in enumerate(settings) for s in p.banned if len(s) == 1]
        self.has_bans = any(p.banned or p.min_tokens for p in settings)
        self.constraints = [(i, r.constraint) for i, r in enumerate(self.rows) if r.constraint is not None]

    def _gather_bias(self, settings: list[SamplingParams]) -> None:
        pairs = [(i, token, bias) for i, p in enumerate(settings) for token, bias in p.logit_bias.items()]
        added = [(i, t, -math.inf if b <= -FULL_BIAS else b) for i, t, b in pairs if b < FULL_BIAS]
        self.bias = (*self._pairs([(i, t) for i, t, _ in added]), self._tensor([b for _, _, b in added]))
        self.forced = self._pairs([(i, t) for i, t, b in pairs if b >= FULL_BIAS])

    @property
    def needs_history(self) -> bool:
        """Whether a row's scores depend on the ids that it has."""
        penalties = (self.repetition_B, self.presence_B, self.frequency_B)
        return any(penalty_B is not None for penalty_B in penalties)

    def __call__(
        self,
        logits_BV: Tensor,
        history_BT: Tensor | None = None,
        rejected: Mapping[int, Tensor] | None = None,
    ) -> list[Token | UserError]:
        """The next token of each row for raw fp32 scores; a UserError for a row that has none.

        `history_BT` begins with the rows' ids, right-padded; it is read only where `needs_history`.
        `rejected`: rows whose proposed token was not kept, with what it was drawn from (see `without`).
        """
        normaliser_B = logits_BV.logsumexp(-1)
        broken_B = ~normaliser_B.isfinite()
        any_broken = bool(broken_B.any())
        if any_broken:
            logits_BV = logits_BV.masked_fill(broken_B[:, None], 0.0)
        processed_BV, errors = self.processed(logits_BV, history_BT)
        ids_B = best_B = processed_BV.argmax(-1)
        no_choice_B = processed_BV.gather(1, best_B[:, None])[:, 0] == -math.inf
        if not self.all_greedy:
            processed_BV = processed_BV.masked_fill(no_choice_B[:, None], 0.0)
            warped_BV = self.warp(processed_BV)
            draws = [uniform(r.params.seed, r.number, r.sample, r.made) for r in self.rows]
            left_BV = processors.without(warped_BV, rejected) if rejected else warped_BV
            drawn_B = processors.draw(left_BV, self._tensor(draws, torch.float64))
            ids_B = torch.where(self.greedy_B, best_B, drawn_B)
            processed_BV = torch.where(self.greedy_B[:, None], processed_BV, warped_BV)
        raw = (logits_BV.gather(1, ids_B[:, None])[:, 0] - normaliser_B).tolist()
        if processed_BV is logits_BV:
            sampled = raw
        else:
            sampled_B = processed_BV.gather(1, ids_B[:, None])[:, 0] - processed_BV.logsumexp(-1)
            sampled = sampled_B.tolist()
        tops = top_logprobs(logits_BV, normaliser_B, [row.params.top_logprobs for row in self.rows])
        tokens: list[Token | UserError] = list(map(Token, ids_B.tolist(), raw, sampled, tops))
        if any_broken:
            for i in broken_B.nonzero()[:, 0].tolist():
                tokens[i] = broken_scores()
        for i in no_choice_B.nonzero()[:, 0].tolist():
            tokens[i] = no_choice(self.rows[i])
        for i, error in errors.items():
            tokens[i] = error
        return tokens

    def processed(self, logits_BV: Tensor, history_BT: Tensor | None) -> tuple[Tensor, dict[int, UserError]]:
        """Scores after bias, penalties, bans and constraints (-inf: impossible), and why a row has none."""
        processed_BV = self._process(logits_BV, history_BT)
        words_BW, errors = self._masks(processed_BV.shape[1])
        if words_BW is not None:
            processed_BV = processors.apply_mask(processed_BV, words_BW)
        return processed_BV, errors

    def _process(self, logits_BV: Tensor, history_BT: Tensor | None) -> Tensor:
        """Bias, penalties and bans."""
        if len(self.bias[0]):
            logits_BV = processors.add_bias(logits_BV, *self.bias)
        if len(self.forced[0]):
            logits_BV = processors.keep_only(logits_BV, *self.forced)
        if self.needs_history:
            assert history_BT is not None
            lengths_B = self._tensor([len(row.ids) for row in self.rows], torch.int64)
            history_BT = history_BT[: len(self.rows), : max(len(row.ids) for row in self.rows)]
            if self.repetition_B is not None:
                logits_BV = processors.penalise_repetition(
                    logits_BV, history_BT, lengths_B, self.repetition_B
                )
            if self.presence_B is not None or self.frequency_B is not None:
                starts_B = self._tensor([row.prompt_tokens for row in self.rows], torch.int64)
                none_B = torch.zeros(len(self.rows), device=self.device)
                presence_B = none_B if self.presence_B is None else self.presence_B
                frequency_B = none_B if self.frequency_B is None else self.frequency_B
                logits_BV = processors.penalise_counts(
                    logits_BV, history_BT, starts_B, lengths_B, presence_B, frequency_B
                )
        if self.has_bans and (banned := self._banned()):
            logits_BV = processors.ban(logits_BV, *self._pairs(banned))
        return logits_BV

    def _masks(self, vocab_size: int) -> tuple[Tensor | None, dict[int, UserError]]:
        """What the rows' constraints allow (B, W), all for a row without one; the errors of rows."""
        errors: dict[int, UserError] = {}
        if not self.constraints:
            return None, errors
        words_BW = torch.full((len(self.rows), -(-vocab_size // 32)), -1, dtype=torch.int32)
        for i, constraint in self.constraints:
            try:
                constraint.mask(words_BW[i])
            except UserError as error:
                errors[i] = error
        return words_BW.to(self.device), errors

    def warp(self, logits_BV: Tensor) -> Tensor:
        """Temperature and what is cut off, for the rows that sample."""
        logits_BV = processors.apply_temperature(logits_BV, self.temperature_B)
        if self.top_k_B is not None:
            logits_BV = processors.apply_top_k(logits_BV, self.top_k_B)
        if self.top_p_B is not None:
            logits_BV = processors.apply_top_p(logits_BV, self.top_p_B)
        if self.min_p_B is not None:
            logits_BV = processors.apply_min_p(logits_BV, self.min_p_B)
        return logits_BV

    def _banned(self) -> list[tuple[int, int]]:
        """The (row, id) pairs that may not come next."""
        pairs = list(self.always)
        for i, row in enumerate(self.rows):
            for sequence in row.params.banned:
                start = len(sequence) - 1
                if start and tuple(row.ids[-start:]) == sequence[:-1]:
                    pairs.append((i, sequence[-1]))
            if row.made < row.params.min_tokens:
                pairs += [(i, token_id) for token_id in row.end_ids]
        return pairs

    def _tensor(self, values: Sequence[float | bool], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def _used(self, values: Sequence[float], neutral: float) -> Tensor | None:
        if all(value == neutral for value in values):
            return None
        return self._tensor(values, torch.int64 if isinstance(neutral, int) else torch.float32)

    def _pairs(self, pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        rows, ids = [row for row, _ in pairs], [token_id for _, token_id in pairs]
        return self._tensor(rows, torch.int64), self._tensor(ids, torch.int64)


def top_logprobs(
    logits_NV: Tensor, normaliser_N: Tensor, counts: Sequence[int]
) -> list[tuple[tuple[int, float], ...]]:
    """The `counts[n]` most probable ids of each row with their log-probabilities, best first."""
    most = min(max(counts), logits_NV.shape[1])
    if most == 0:
        return [()] * len(counts)
    values_NK, ids_NK = logits_NV.topk(most, dim=-1)
    logps = (values_NK - normaliser_N[:, None]).tolist()
    ids = ids_NK.tolist()
    return [tuple(zip(ids[n][:k], logps[n][:k], strict=True)) for n, k in enumerate(counts)]


def no_choice(row: Row) -> UserError:
    """The error for a row whose settings leave no token."""
    if row.constraint is None:
        return UserError("logit_bias and bans leave no token to choose; allow more of them")
    if row.made < row.params.min_tokens and row.constraint.finished:
        return UserError(
            f"the constraint's text is complete after {row.made} tokens and cannot go on to min_tokens "
            f"{row.params.min_tokens}; lower it or allow longer texts"
        )
    return UserError(
        f"after {row.made} tokens the constraint, bans and logit_bias together leave no token to choose; "
        "loosen one of them"
    )


def broken_scores() -> UserError:
    """The error for scores that are NaN or infinite."""
    return UserError(
        "the model's scores are not numbers (NaN or infinite): its weights are damaged, "
        "or its training diverged; use an earlier checkpoint"
    )
