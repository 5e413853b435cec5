"""Speculative decoding: a draft proposes several tokens, and the model reads them all in one pass.

A proposal is kept where the model says the same: at temperature 0 its best token; when sampling, with
probability min(1, p / q), p being the model's probability and q the draft's. Behind the first one that is not
kept, the token is drawn from what p has more than q, so that texts are distributed as without a draft
(Leviathan et al. 2023, "Fast inference from transformers via speculative decoding"; Chen et al. 2023,
"Accelerating large language model decoding with speculative sampling"). p is what the request samples from:
after penalties, bans, constraint, temperature and cuts, each with the tokens before it.

Shape suffixes: B rows, T proposals of a row, D proposals of all rows, N tokens read, C model width,
V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fledge.engine.constraints import Constraint
from fledge.engine.drafts import Draft, NewDraft, Proposal
from fledge.engine.generation import Generation
from fledge.engine.sampling import Sampler, broken_scores, top_logprobs, uniform
from fledge.engine.slots import Slots
from fledge.errors import UserError
from fledge.types import Token, pad_rows

# Proposals a pass where nobody says how many.
DRAFT_TOKENS = 6

# Adds a token to a completion; whether that ended it.
Accept = Callable[[Generation, Token | UserError], bool]


@dataclass
class Counts:
    """How it went: passes of the model, tokens that were proposed, proposals that were kept, tokens made in
    these passes, and their seconds with the draft's."""

    passes: int = 0
    proposed: int = 0
    kept: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class Speculation:
    """How an engine guesses: up to `tokens` ahead."""

    new_draft: NewDraft
    tokens: int = DRAFT_TOKENS
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UserError(f"draft_tokens {self.tokens} is below 1; it is how many tokens to guess ahead")


@dataclass
class _Guess:
    """What a row reads behind its last id: `drafted` proposals, then ids that its constraint forces.
    `states` are the constraint's before each proposal."""

    ids: list[int]
    drafted: int
    states: list[Constraint | None]


class Speculator:
    """Proposes and checks for one scheduler. All calls belong under `torch.inference_mode`."""

    def __init__(self, speculation: Speculation, slots: Slots) -> None:
        self._speculation, self._slots = speculation, slots
        self.clear()

    def clear(self) -> None:
        """Forget everything that was read."""
        self._draft: Draft | None = None
        self._ahead: WeakKeyDictionary[Generation, int] = WeakKeyDictionary()

    def decode(
        self, running: Sequence[Generation], room: Callable[[Generation], int], accept: Accept
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Read each row's last id and what is proposed or forced behind it, and accept what is kept. `room`:
        tokens that a completion may still have.

        Returns the scores (B, V) of the token behind, and for rows whose proposal was not kept, what that
        was drawn from (V,).
        """
        started = time.perf_counter()
        proposals, guesses = self._guesses(running, room)
        unread = [[g.row.ids[-1], *guess.ids] for g, guess in zip(running, guesses, strict=True)]
        before = [len(generation.row.ids) for generation in running]
        counts = self._speculation.counts
        if not any(guess.ids for guess in guesses):
            logits_BV, rejected = self._slots.step([ids[0] for ids in unread]), {}
            taken = [0] * len(running)
        else:
            logits_NV = self._read(unread)
            keep, tokens = self._check(running, guesses, proposals, logits_NV)
            taken = [self._take(*row, accept) for row in zip(running, guesses, keep, tokens, strict=True)]
            firsts = torch.tensor([0, *map(len, unread)]).cumsum(0)[:-1]
            logits_BV = logits_NV[(firsts + torch.tensor(taken)).to(logits_NV.device)]
            rejected = _rejected(running, guesses, proposals, taken, logits_NV)
            self._slots.cut([length + count for length, count in zip(before, taken, strict=True)])
            self._note(running, before)
        for generation, guess, count in zip(running, guesses, taken, strict=True):
            if guess.drafted:
                kept = min(count, guess.drafted)
                self._ahead[generation] = 2 * kept + 1
                counts.proposed += guess.drafted
                counts.kept += kept
        counts.passes += len(running)
        counts.tokens += sum(taken) + sum(not generation.done for generation in running)
        counts.seconds += time.perf_counter() - started
        return logits_BV, rejected

    def _guesses(
        self, running: Sequence[Generation], room: Callable[[Generation], int]
    ) -> tuple[list[Proposal], list[_Guess]]:
        """What each row reads: what it is forced to, or what the draft proposes. As many tokens are proposed
        as seem worth it: one more than twice those that were kept last."""
        if self._draft is None:
            self._draft = self._speculation.new_draft(self._slots.rows, self._slots.slots)
        tokens = self._speculation.tokens
        most = [0 if g.forced else min(tokens, self._ahead.get(g, tokens), room(g) - 1) for g in running]
        proposals = self._draft.propose(running, most) if any(most) else [Proposal([])] * len(running)
        return proposals, [_guess(g, p, room(g)) for g, p in zip(running, proposals, strict=True)]

    def _read(self, unread: list[list[int]]) -> Tensor:
        """The scores (N, V) behind each of the ids, row after row."""
        lengths_B = torch.tensor([len(ids) for ids in unread], device=self._slots.device)
        pieces = [hidden_BTC for _, hidden_BTC in self._slots.read(0, unread)]
        hidden_BTC = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        real_BT = torch.arange(hidden_BTC.shape[1], device=self._slots.device) < lengths_B[:, None]
        return self._slots.decoder.logits(hidden_BTC[real_BT])

    def _check(
        self,
        running: Sequence[Generation],
        guesses: list[_Guess],
        proposals: list[Proposal],
        logits_NV: Tensor,
    ) -> tuple[list[list[bool]], list[list[Token]]]:
        """Of each row: which proposals the model would keep, were those before them kept; and all it guessed,
        as tokens. What is forced is always kept."""
        places = [first + i for first, guess in _firsts(guesses) for i in range(len(guess.ids))]
        drafted = [first + i for first, guess in _firsts(guesses) for i in range(guess.drafted)]
        ids_N1 = torch.tensor([i for guess in guesses for i in guess.ids], device=logits_NV.device)[:, None]
        guessed_NV = logits_NV[places]
        normaliser_N = guessed_NV.logsumexp(-1)
        raw = (guessed_NV.gather(1, ids_N1)[:, 0] - normaliser_N).tolist()
        tops = [
            g.request.params.top_logprobs
            for g, guess in zip(running, guesses, strict=True)
            for _ in guess.ids
        ]
        alternatives = top_logprobs(guessed_NV, normaliser_N, tops)
        checked = iter(self._checked(running, guesses, proposals, logits_NV[drafted]) if drafted else ())
        found = iter(zip(raw, alternatives, strict=True))
        keep: list[list[bool]] = []
        tokens: list[list[Token]] = []
        for guess in guesses:
            verdicts = [next(checked) if i < guess.drafted else (True, 0.0) for i in range(len(guess.ids))]
            keep.append([is_kept for is_kept, _ in verdicts])
            tokens.append([])
            for token_id, (_, sampled) in zip(guess.ids, verdicts, strict=True):
                logp, top = next(found)
                tokens[-1].append(Token(token_id, logp, sampled, top))
        return keep, tokens

    def _checked(
        self,
        running: Sequence[Generation],
        guesses: list[_Guess],
        proposals: list[Proposal],
        logits_DV: Tensor,
    ) -> list[tuple[bool, float]]:
        """Whether each drafted id is kept, and its log-probability where it is made."""
        rows = [
            replace(g.row, ids=[*g.row.ids, *guess.ids[:i]], constraint=guess.states[i])
            for g, guess in zip(running, guesses, strict=True)
            for i in range(guess.drafted)
        ]
        ids = [i for guess in guesses for i in guess.ids[: guess.drafted]]
        ids_D1 = torch.tensor(ids, device=logits_DV.device)[:, None]
        sampler = Sampler(rows, logits_DV.device)
        history_DT = None
        if sampler.needs_history:
            history_DT = pad_rows([row.ids for row in rows], 0).to(logits_DV.device)
        scores_DV, errors = sampler.processed(logits_DV, history_DT)
        is_best = (scores_DV.argmax(-1) == ids_D1[:, 0]).tolist()
        if not sampler.all_greedy:
            warped_DV = sampler.warp(scores_DV)
            scores_DV = torch.where(sampler.greedy_B[:, None], scores_DV, warped_DV)
        logps_D = scores_DV.gather(1, ids_D1)[:, 0] - scores_DV.logsumexp(-1)
        p, logps = logps_D.exp().tolist(), logps_D.tolist()
        q = _draft_probabilities(guesses, proposals)
        checked = []
        for i, row in enumerate(rows):
            if row.params.temperature == 0:
                is_kept = is_best[i] and p[i] > 0  # not where there is no choice
            else:
                u = uniform(row.params.seed, row.number, row.sample, row.made, "accept")
                is_kept = u * q[i] < p[i]
            checked.append((is_kept and i not in errors, logps[i]))
        return checked

    def _take(
        self, generation: Generation, guess: _Guess, keep: list[bool], tokens: list[Token], accept: Accept
    ) -> int:
        """Accept what is kept, up to the end; how many that are."""
        for i, token in enumerate(tokens):
            if not keep[i]:
                return i
            if accept(generation, token if math.isfinite(token.logp) else broken_scores()):
                return i + 1
        return len(tokens)

    def _note(self, running: Sequence[Generation], before: list[int]) -> None:
        rows, positions, ids = list[int](), list[int](), list[int]()
        for i, (generation, first) in enumerate(zip(running, before, strict=True)):
            new = generation.row.ids[first:]
            rows += [i] * len(new)
            positions += range(first, first + len(new))
            ids += new
        self._slots.note(rows, positions, ids)


def _firsts(guesses: list[_Guess]) -> list[tuple[int, _Guess]]:
    """Where the scores behind each row's last id are, of those read with its guess."""
    found, first = [], 0
    for guess in guesses:
        found.append((first, guess))
        first += len(guess.ids) + 1
    return found


def _guess(generation: Generation, proposal: Proposal, room: int) -> _Guess:
    """What is forced, or a proposal, as far as it can be part of the text; if a constraint forces ids behind
    one of its tokens, these instead of the rest."""
    if generation.forced:
        return _Guess(generation.forced, 0, [])
    row, states = generation.row, list[Constraint | None]()
    ids = list[int]()
    for token_id in proposal.ids:
        states.append(row.constraint)
        ids.append(token_id)
        if token_id in row.end_ids:
            break
        if row.constraint is not None:
            row = replace(row, constraint=row.constraint.fork())
            assert row.constraint is not None
            try:
                row.constraint.advance(token_id)
            except UserError:  # it is not possible: it will not be kept
                break
            if forced := row.forced()[: room - len(ids)]:
                return _Guess([*ids, *forced], len(ids), states)
    return _Guess(ids, len(ids), states)


def _draft_probabilities(guesses: list[_Guess], proposals: list[Proposal]) -> list[float]:
    """The probability with which each drafted id was proposed."""
    found: list[float] = []
    for guess, proposal in zip(guesses, proposals, strict=True):
        if proposal.probabilities_TV is None:
            found += [1.0] * guess.drafted
        elif guess.drafted:
            ids_T = torch.tensor(guess.ids[: guess.drafted], device=proposal.probabilities_TV.device)
            found += proposal.probabilities_TV[: guess.drafted].gather(1, ids_T[:, None])[:, 0].tolist()
    return found


def _rejected(
    running: Sequence[Generation],
    guesses: list[_Guess],
    proposals: list[Proposal],
    taken: list[int],
    logits_NV: Tensor,
) -> dict[int, Tensor]:
    """For sampling rows whose proposal was not kept, what that was drawn from (V,)."""
    found: dict[int, Tensor] = {}
    for i, (generation, guess, proposal, count) in enumerate(
        zip(running, guesses, proposals, taken, strict=True)
    ):
        if count >= guess.drafted or generation.done or generation.row.params.temperature == 0:
            continue
        if proposal.probabilities_TV is not None:
            found[i] = proposal.probabilities_TV[count].to(logits_NV.device)
        else:
            found[i] = torch.zeros_like(logits_NV[0])
            found[i][guess.ids[count]] = 1.0
    return found
