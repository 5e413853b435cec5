"""Beam search: the best continuations found by following a few prefixes at a time.

Scores, ends and the three ways to stop early are those of `transformers`' `generate(num_beams=...)` (5.23);
with `stochastic` it is sampling without replacement (Kool et al. 2019, "Stochastic beams and where to find
them"). Every running beam has a row of one static cache; when beams fork, rows are copied.

Shape suffixes: B running beams of all prompts, K running beams of one prompt, N candidates, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fledge.engine.constraints import Constraint
from fledge.engine.engine import Engine
from fledge.engine.gumbel import given_maximum, gumbel
from fledge.engine.reading import read_rows
from fledge.engine.sampling import Row, Sampler, broken_scores, no_choice, validate
from fledge.engine.scheduler import check_ids, slots_needed
from fledge.engine.search import Hypothesis, completion_of, copy_rows, most_tokens, start_constraint
from fledge.engine.slots import Slots
from fledge.errors import UserError
from fledge.types import FinishReason, SamplingParams, Token, pad_rows

EarlyStopping = bool | Literal["never"]


@dataclass(frozen=True)
class Beams:
    """How to search: `width` prefixes are followed. A finished text's score is its log-probability divided
    by (its tokens) ** `length_penalty`.

    `early_stopping` True ends when `width` texts are finished; False when the best running beam, at its
    present length, scores no better than the worst of them; "never" when no length up to the longest could.
    `stochastic`: a sample without replacement instead of the best; length penalty and early stopping have no
    part in it.
    """

    width: int
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    stochastic: bool = False


@dataclass(frozen=True)
class _Beam:
    """A prefix. `total` is the sum of its scores, `key` what stochastic beams are ranked by; `parent` is the
    row whose keys and values it goes on from."""

    row: Row
    tokens: list[Token]
    total: float
    key: float
    parent: int


@dataclass
class _Search:
    """One prompt's beams."""

    number: int
    room: int
    full: FinishReason
    running: list[_Beam]
    finished: list[tuple[float, _Beam]]


@torch.inference_mode()
def beam_search(
    engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams, beams: Beams
) -> list[list[Hypothesis]]:
    """The `params.n` best of `beams.width` continuations of each prompt, best first.

    Bias, penalties, bans, `min_tokens` and the constraint change log-probabilities and do not renormalise
    them; `temperature` divides the raw scores first. A text is whole with an end id, also under a constraint
    behind whose text nothing can follow. Stochastic beams draw from what `Engine.generate` samples from
    (there `top_k`, `top_p` and `min_p` are possible too), with random numbers of (`params.seed`, the prompt's
    number, position); the first of them is an ordinary sample.
    Raises UserError for what `Engine.generate` does, and for settings that mean nothing here.
    """
    vocab_size = engine.model.config.vocab_size
    validate(params, vocab_size)
    check_beams(params, beams)
    for number, prompt in enumerate(prompts, start=1):
        check_ids(prompt, f"text {number} of {len(prompts)}", engine.context - 1, vocab_size)
    if not prompts:
        return []
    end_ids = frozenset(i for i in (*engine.eos_ids, *params.stop_ids) if i < vocab_size)
    constraint = start_constraint(engine, params, end_ids)
    longest = slots_needed(max(map(len, prompts)), params.max_tokens, engine.context)
    wanted = min(len(prompts), max(1, engine.batch_size // beams.width)) * beams.width
    found: list[list[Hypothesis]] = []
    slots = engine.new_scheduler(wanted, longest).slots
    if slots.rows < beams.width:
        raise UserError(f"{beams.width} beams of {longest} tokens do not fit the memory; take fewer")
    while len(found) < len(prompts):
        first, last = len(found), len(found) + slots.rows // beams.width
        group = [
            _start(engine, list(prompt), number, params, end_ids, constraint)
            for number, prompt in enumerate(prompts[first:last], start=first)
        ]
        if found:
            slots.clear()
        _run(slots, group, beams)
        found += [_hypotheses(search, params.n) for search in group]
    return found


def check_beams(params: SamplingParams, beams: Beams) -> None:
    """Raise UserError for settings that mean nothing, or not together."""
    if beams.width < 1:
        raise UserError(f"beams {beams.width} is below 1")
    if params.n > beams.width:
        raise UserError(f"n {params.n} is more than the {beams.width} beams; take more beams")
    if params.temperature == 0:
        raise UserError("temperature 0 is greedy decoding; leave it out with beams, or leave out the beams")
    if not abs(beams.length_penalty) <= 20:
        raise UserError(f"length_penalty {beams.length_penalty} is not between -20 and 20; 0 is none")
    if params.stop:
        raise UserError("stop strings do not go with beams; end at token ids (stop_ids) instead")
    if params.top_logprobs or params.echo:
        raise UserError("top_logprobs and echo do not go with beams; score the result instead")
    if beams.stochastic and (beams.length_penalty != 1.0 or beams.early_stopping is not False):
        raise UserError(
            "stochastic beams are a sample: length_penalty and early_stopping do not go with them"
        )
    cuts = {"top_k": params.top_k, "top_p": params.top_p, "min_p": params.min_p}
    if not beams.stochastic and (given := [name for name, value in cuts.items() if value is not None]):
        raise UserError(f"{given[0]} is for sampling; leave it out, or make the beams stochastic")


def _start(
    engine: Engine,
    prompt: list[int],
    number: int,
    params: SamplingParams,
    end_ids: frozenset[int],
    constraint: Constraint | None,
) -> _Search:
    room, full = most_tokens(engine, len(prompt), params)
    state = None if constraint is None else constraint.fork()
    row = Row(params, prompt, len(prompt), end_ids, number, 0, state)
    key = float(gumbel(params.seed, number, -1, (1,))[0])
    return _Search(number, room, full, [_Beam(row, [], 0.0, key, 0)], [])


def _run(slots: Slots, group: list[_Search], beams: Beams) -> None:
    """Search until every prompt of the group is done."""
    prompts = [search.running[0].row.ids for search in group]
    rests = [prompt[slots.take(prompt, reuse=False) :] for prompt in prompts]
    logits_BV, _ = read_rows(slots, 0, rests, {}, {})
    cache, active = slots.cache, group
    while True:
        rows = [beam.row for search in active for beam in search.running]
        logps_BV, scores_BV, errors = _scores(rows, logits_BV, beams.stochastic)
        first = 0
        for search in active:
            last = first + len(search.running)
            logps_KV, scores_KV = logps_BV[first:last], scores_BV[first:last]
            advance = _sample if beams.stochastic else _advance
            before = search.running[0].row
            advance(search, first, logps_KV, scores_KV, beams)
            if not search.running and not search.finished:
                raise next((errors[i] for i in range(first, last) if i in errors), no_choice(before))
            first = last
        active = [search for search in active if search.running]
        if not active:
            return
        running = [beam for search in active for beam in search.running]
        copy_rows(cache, [beam.parent for beam in running], max(len(beam.row.ids) for beam in running))
        view = cache.rows(0, len(running))
        ids_B = torch.tensor([beam.tokens[-1].id for beam in running], device=slots.device)
        logits_BV = slots.decoder.step(ids_B, view)
        cache.lengths_B[: len(running)] = view.lengths_B


def _scores(
    rows: list[Row], logits_BV: Tensor, stochastic: bool
) -> tuple[Tensor, Tensor, dict[int, UserError]]:
    """The model's log-probabilities, what beams are ranked by (-inf: impossible), and why a row has none."""
    logps_BV = logits_BV.log_softmax(-1)
    if not bool(logits_BV.logsumexp(-1).isfinite().all()):
        raise broken_scores()
    temperature = rows[0].params.temperature
    # A sample is of what the engine samples from; a search changes log-probabilities, as `transformers` does.
    scores_BV = logits_BV
    if not stochastic:
        scores_BV = logps_BV if temperature == 1 else (logits_BV / temperature).log_softmax(-1)
    sampler = Sampler(rows, logits_BV.device)
    history_BT = None
    if sampler.needs_history:
        history_BT = pad_rows([row.ids for row in rows], 0).to(logits_BV.device)
    scores_BV, errors = sampler.processed(scores_BV, history_BT)
    for i in errors:
        scores_BV = scores_BV.index_fill(0, torch.tensor([i], device=scores_BV.device), -math.inf)
    if stochastic:
        none_B = scores_BV.amax(-1) == -math.inf
        warped_BV = sampler.warp(scores_BV.masked_fill(none_B[:, None], 0.0))
        scores_BV = warped_BV.log_softmax(-1).masked_fill(none_B[:, None], -math.inf)
    return logps_BV, scores_BV, errors


def _advance(search: _Search, first: int, logps_KV: Tensor, scores_KV: Tensor, beams: Beams) -> None:
    """One token more for the best beams; the ends among the best `width` candidates are finished texts."""
    running, end_ids = search.running, search.running[0].row.end_ids
    made = len(running[0].tokens) + 1
    totals_KV = _totals(running, scores_KV)
    # So many that `width` go on even if every beam's ends are the best candidates.
    kept = min(max(2, 1 + len(end_ids)) * beams.width, totals_KV.numel())
    totals_N, flat_N = totals_KV.flatten().topk(kept)
    going_on: list[_Beam] = []
    ended: list[tuple[float, _Beam]] = []
    for rank, (total, place) in enumerate(zip(totals_N.tolist(), flat_N.tolist(), strict=True)):
        k, token_id = divmod(place, totals_KV.shape[1])
        ends = token_id in end_ids or made == search.room
        if total == -math.inf or (rank >= beams.width if ends else len(going_on) == beams.width):
            continue
        beam = _child(running[k], first + k, _token(token_id, logps_KV[k], scores_KV[k]), ends)
        if ends:
            ended.append((float(beam.total / made**beams.length_penalty), beam))
        else:
            going_on.append(beam)
    merged = sorted([*search.finished, *ended], key=lambda pair: -pair[0])
    search.finished = merged[: beams.width]
    search.running = going_on if going_on and _can_improve(search, going_on[0].total, made, beams) else []


def _can_improve(search: _Search, best: float, made: int, beams: Beams) -> bool:
    """Whether to go on: see `Beams.early_stopping`."""
    if len(search.finished) < beams.width:
        return True
    if beams.early_stopping is True:
        return False
    length = search.room if beams.early_stopping == "never" and beams.length_penalty > 0 else made
    return bool(best / length**beams.length_penalty > search.finished[-1][0])


def _sample(search: _Search, first: int, logps_KV: Tensor, scores_KV: Tensor, beams: Beams) -> None:
    """One token more for the beams of largest perturbed log-probability; whole texts compete with them.

    The perturbed log-probabilities of a beam's children are Gumbel noise given that their maximum is the
    beam's own (Kool et al. 2019, section 4.1 and, for the numbers, appendix B.3)."""
    running, row, device = search.running, search.running[0].row, scores_KV.device
    made = len(running[0].tokens) + 1
    totals_KV = _totals(running, scores_KV)
    noise_KV = gumbel(row.params.seed, search.number, made, tuple(totals_KV.shape)).to(device)
    key_K1 = torch.tensor([[beam.key] for beam in running], dtype=torch.float64, device=device)
    keys_KV = given_maximum(totals_KV + noise_KV, key_K1).masked_fill(totals_KV == -math.inf, -math.inf)
    keys_N, flat_N = keys_KV.flatten().topk(min(beams.width, keys_KV.numel()))
    candidates: list[tuple[float, int | _Beam]] = [*search.finished]
    candidates += [(k, p) for k, p in zip(keys_N.tolist(), flat_N.tolist(), strict=True) if k > -math.inf]
    search.finished, search.running = [], []
    for key, candidate in sorted(candidates, key=lambda pair: -pair[0])[: beams.width]:
        if isinstance(candidate, _Beam):
            search.finished.append((key, candidate))
            continue
        k, token_id = divmod(candidate, keys_KV.shape[1])
        ends = token_id in row.end_ids or made == search.room
        beam = _child(running[k], first + k, _token(token_id, logps_KV[k], scores_KV[k]), ends, key)
        if ends:
            search.finished.append((key, beam))
        else:
            search.running.append(beam)


def _totals(running: list[_Beam], scores_KV: Tensor) -> Tensor:
    """The sum of scores (K, V) of each running beam with each token more, fp64."""
    totals = [[beam.total] for beam in running]
    return torch.tensor(totals, dtype=torch.float64, device=scores_KV.device) + scores_KV


def _token(token_id: int, logps_V: Tensor, scores_V: Tensor) -> Token:
    return Token(token_id, float(logps_V[token_id]), float(scores_V[token_id]))


def _child(beam: _Beam, parent: int, token: Token, ends: bool, key: float = 0.0) -> _Beam:
    """A beam with a token more; `parent` is its row."""
    constraint = beam.row.constraint
    if constraint is not None and not ends:
        constraint = constraint.fork()
        constraint.advance(token.id)
    row = replace(beam.row, ids=[*beam.row.ids, token.id], constraint=constraint)
    return _Beam(row, [*beam.tokens, token], beam.total + token.sampled_logp, key, parent)


def _hypotheses(search: _Search, n: int) -> list[Hypothesis]:
    return [
        Hypothesis(completion_of(beam.tokens, beam.row.end_ids, search.full), score)
        for score, beam in search.finished[:n]
    ]
