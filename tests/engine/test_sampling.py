"""Sampling: the distributions are the exact ones, and a row's draws are its own."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from fledge.engine.processors import (
    apply_min_p,
    apply_temperature,
    apply_top_k,
    apply_top_p,
    draw,
    penalise_counts,
    penalise_repetition,
)
from fledge.engine.sampling import Row, Sampler, uniform, validate
from fledge.errors import UserError
from fledge.types import SamplingParams, Token

CPU = torch.device("cpu")
LOGITS = [2.0, -1.0, 0.5, 1.5, 0.0, 1.0, -3.0, 0.25]
PROMPT, MADE = [7, 3, 3], [0, 0, 5, 1]


def exact(params: SamplingParams) -> list[float]:
    """The distribution behind PROMPT and MADE by its definition, one score at a time."""
    scores = {}
    for i, score in enumerate(LOGITS):
        bias = params.logit_bias.get(i, 0.0)
        forced = any(b == 100 for b in params.logit_bias.values())
        if bias == -100 or (forced and bias != 100):
            continue
        score += bias if bias != 100 else 0.0
        if i in PROMPT + MADE:
            score = score * params.repetition_penalty if score < 0 else score / params.repetition_penalty
        if i in MADE:
            score -= params.presence_penalty + params.frequency_penalty * MADE.count(i)
        if not any((PROMPT + MADE + [i])[-len(banned) :] == list(banned) for banned in params.banned):
            scores[i] = score
    weights = {i: math.exp(score / params.temperature) for i, score in scores.items()}
    order = sorted(weights, key=lambda i: -weights[i])[: params.top_k]
    total, mass, kept = sum(weights[i] for i in order), 0.0, []
    for i in order:
        if kept and params.top_p is not None and mass >= params.top_p:
            break
        kept.append(i)
        mass += weights[i] / total
    kept = [i for i in kept if weights[i] >= (params.min_p or 0.0) * weights[order[0]]]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(LOGITS))]


def row(params: SamplingParams, number: int = 0, ids: list[int] | None = None, sample: int = 0) -> Row:
    ids = PROMPT + MADE if ids is None else ids
    return Row(params, list(ids), min(len(PROMPT), len(ids)), frozenset({2}), number, sample)


def history(rows: list[Row]) -> torch.Tensor:
    longest = max(len(r.ids) for r in rows)
    return torch.tensor([r.ids + [6] * (longest + 2 - len(r.ids)) for r in rows])


def choose(rows: list[Row], logits_BV: torch.Tensor) -> list[Token]:
    tokens = Sampler(rows, CPU)(logits_BV, history(rows))
    assert all(isinstance(token, Token) for token in tokens)
    return tokens  # type: ignore[return-value]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=2.0, seed=9),
        SamplingParams(top_k=3),
        SamplingParams(top_p=0.7),
        SamplingParams(temperature=1.5, top_k=5, top_p=0.8),
        SamplingParams(top_p=1e-6),
        SamplingParams(min_p=0.2),
        SamplingParams(temperature=2.0, top_p=0.95, min_p=0.3),
        SamplingParams(repetition_penalty=1.7),
        SamplingParams(presence_penalty=1.5),
        SamplingParams(frequency_penalty=-0.7),
        SamplingParams(logit_bias={1: 3.5, 0: -100.0, 3: -1.0}),
        SamplingParams(logit_bias={1: 100.0, 4: 100.0, 0: 5.0}),
        SamplingParams(banned=((3,), (5, 1, 0), (1, 2), (0, 0, 7), (1, 1, 4))),
        SamplingParams(0.8, top_k=6, min_p=0.05, repetition_penalty=1.3, presence_penalty=0.4,
                       frequency_penalty=0.3, logit_bias={6: 3.0}, banned=((4,),), seed=3),
    ],
)  # fmt: skip
def test_chi_square_against_the_exact_distribution(params: SamplingParams) -> None:
    n = 10_000
    tokens = choose([row(params, number) for number in range(n)], torch.tensor([LOGITS]).expand(n, -1))
    counts, probabilities = Counter(token.id for token in tokens), exact(params)
    assert all(counts[i] == 0 for i, p in enumerate(probabilities) if p == 0)
    live = [(counts[i], n * p) for i, p in enumerate(probabilities) if p > 0]
    chi_square = sum((seen - expected) ** 2 / expected for seen, expected in live)
    # The 0.001 point of chi-square for 0 to 7 degrees of freedom.
    limits = [1e-9, 10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.32]
    assert chi_square < limits[len(live) - 1]
    raw = torch.tensor(LOGITS).log_softmax(-1).tolist()
    for token in tokens[:200]:
        assert token.logp == pytest.approx(raw[token.id], abs=1e-5)
        assert token.sampled_logp == pytest.approx(math.log(probabilities[token.id]), abs=1e-5)


def test_the_draws_of_one_request_are_independent() -> None:
    one, n = row(SamplingParams(seed=4)), 4000
    for _ in range(n):
        one.ids.append(choose([one], torch.zeros(1, 8))[0].id)
    made = one.ids[len(PROMPT + MADE) :]
    pairs = Counter(zip(made[::2], made[1::2], strict=True))
    expected = n / 2 / 64
    chi_square = sum((pairs[a, b] - expected) ** 2 / expected for a in range(8) for b in range(8))
    assert 33 < chi_square < 104  # the 0.001 and 0.999 points for 63 degrees of freedom


MIXED = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7, seed=1),
    SamplingParams(top_k=1, seed=2),
    SamplingParams(temperature=1.2, top_p=0.5, seed=3),
    SamplingParams(temperature=3.0, top_k=4, seed=4),
    SamplingParams(min_p=0.1, repetition_penalty=1.4, seed=5),
    SamplingParams(temperature=0.0, presence_penalty=2.0, frequency_penalty=0.5),
    SamplingParams(logit_bias={3: -100.0, 5: 4.0}, banned=((1, 4), (9,)), seed=6),
    SamplingParams(logit_bias={3: 100.0, 8: 100.0}, top_logprobs=4, seed=7),
    SamplingParams(min_tokens=50, top_logprobs=1, seed=8),
]


def test_a_row_gets_the_same_in_any_company() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [row(params, i, [i + 1] * (i + 1)) for i, params in enumerate(MIXED)]
    for _ in range(40):
        logits_BV = torch.randn(len(rows), 30, generator=generator)
        together = choose(rows, logits_BV)
        for i, one in enumerate(rows):
            # Exactly: a neutral setting leaves scores as they are.
            assert choose([one], logits_BV[i : i + 1])[0] == together[i]
            assert len(together[i].top) == one.params.top_logprobs
        order = torch.randperm(len(rows), generator=generator).tolist()
        shuffled = choose([rows[i] for i in order], logits_BV[order])
        assert shuffled == [together[i] for i in order]
        for one, token in zip(rows, together, strict=True):
            one.ids.append(token.id)
    assert {3, 8} >= set(rows[8].ids[9:]) and 3 not in rows[7].ids and 2 not in rows[9].ids


def test_each_seed_number_sample_and_position_has_its_own_number() -> None:
    keys = [(s, n, i, p) for s in (-1, 0, 1, 2**70) for n in range(5) for i in range(3) for p in range(40)]
    numbers = [uniform(*key) for key in keys]
    assert len(set(numbers)) == len(keys) and all(0 <= number < 1 for number in numbers)
    assert abs(sum(numbers) / len(numbers) - 0.5) < 4 * (1 / 12 / len(numbers)) ** 0.5
    assert uniform(0, 0, 0, 7) == numbers[keys.index((0, 0, 0, 7))]


def test_top_alternatives_are_raw_and_best_first() -> None:
    params = SamplingParams(temperature=0.0, top_logprobs=3, logit_bias={0: -100.0})
    token = choose([row(params)], torch.tensor([LOGITS]))[0]
    raw = torch.tensor(LOGITS).log_softmax(-1).tolist()
    assert [i for i, _ in token.top] == [0, 3, 5] and token.id == 3
    assert [logp for _, logp in token.top] == pytest.approx([raw[0], raw[3], raw[5]], abs=1e-6)
    params = replace(params, top_logprobs=100)
    assert len(choose([row(params)], torch.tensor([LOGITS]))[0].top) == len(LOGITS)


def test_penalties_by_hand() -> None:
    logits_BV = torch.tensor([[2.0, -1.0, 0.0, 4.0]] * 2)
    ids_BT = torch.tensor([[1, 3, 3, 0], [2, 2, 2, 2]])
    lengths_B = torch.tensor([3, 1])
    made = penalise_repetition(logits_BV, ids_BT, lengths_B, torch.tensor([2.0, 1.0]))
    assert made.tolist() == [[2.0, -2.0, 0.0, 2.0], [2.0, -1.0, 0.0, 4.0]]
    starts_B, presence_B, frequency_B = (
        torch.tensor([1, 1]),
        torch.tensor([0.5, 9.0]),
        torch.tensor([0.25, 9.0]),
    )
    made = penalise_counts(logits_BV, ids_BT, starts_B, lengths_B, presence_B, frequency_B)
    assert made.tolist() == [[2.0, -1.0, 0.0, 3.0], [2.0, -1.0, 0.0, 4.0]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_without_scores_fails_alone(bad: float, temperature: float) -> None:
    params = SamplingParams(temperature=temperature)
    nothing = SamplingParams(temperature=temperature, logit_bias={1: 100.0}, banned=((1,),))
    rows = [row(params, 0), row(params, 1), row(nothing, 2), row(params, 3)]
    logits_BV = torch.tensor([LOGITS] * 4)
    expected = choose([rows[0], rows[3]], logits_BV[:2])
    logits_BV[1, 4] = bad
    made = Sampler(rows, CPU)(logits_BV)
    assert [made[0], made[3]] == expected
    assert isinstance(made[1], UserError) and "not numbers" in str(made[1])
    assert isinstance(made[2], UserError) and "no token to choose" in str(made[2])


def test_draw_inverts_the_cumulative_distribution() -> None:
    logits = torch.tensor([-math.inf, math.log(0.5), math.log(0.25), -math.inf, math.log(0.25), -math.inf])
    points = [(0.0, 1), (0.4999, 1), (0.5001, 2), (0.7499, 2), (0.7501, 4), (1 - 2**-53, 4)]
    uniform_B = torch.tensor([u for u, _ in points], dtype=torch.float64)
    assert draw(logits.expand(len(points), -1), uniform_B).tolist() == [token for _, token in points]


def test_top_k_keeps_ties_and_more_than_there_are() -> None:
    logits_BV = torch.tensor([[1.0, 3.0, 2.0, 2.0], [1.0, 3.0, 2.0, 2.0], [1.0, 3.0, 2.0, 2.0]])
    kept = apply_top_k(logits_BV, torch.tensor([2, 1, 2**31 - 1])).isfinite()
    assert kept.tolist() == [[False, True, True, True], [False, True, False, False], [True] * 4]


def test_top_p_by_hand() -> None:
    logits_BV = torch.tensor([0.1, 0.5, 0.15, 0.25]).log().expand(4, -1)
    kept = apply_top_p(logits_BV, torch.tensor([0.4, 0.6, 0.8, 1.0])).isfinite()
    assert kept.tolist() == [
        [False, True, False, False],
        [False, True, False, True],
        [False, True, True, True],
        [True, True, True, True],
    ]


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e30])
def test_extreme_temperatures_give_no_nan(temperature: float) -> None:
    logits_BV = torch.tensor([[1e4, -1e4, 9e3]])
    warped = apply_temperature(logits_BV, torch.tensor([temperature], dtype=torch.float32))
    assert not warped.isnan().any()
    made = choose([row(SamplingParams(temperature=temperature))], logits_BV)[0]
    assert made.id in ({0} if temperature < 1 else {0, 1, 2})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"top_p": 0.0}, "top_p 0"),
        ({"top_p": 1.1}, "top_p 1.1"),
        ({"top_k": 0}, "top_k 0"),
        ({"max_tokens": 0}, "max_tokens 0"),
        ({"max_tokens": -1, "echo": True}, "max_tokens -1"),
        ({"min_tokens": -1}, "min_tokens -1"),
        ({"min_tokens": 257}, "min_tokens 257"),
        ({"min_p": 1.5}, "min_p 1.5"),
        ({"min_p": math.nan}, "min_p nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0"),
        ({"presence_penalty": math.nan}, "presence_penalty nan"),
        ({"frequency_penalty": math.inf}, "frequency_penalty inf"),
        ({"n": 0}, "n 0 is below 1"),
        ({"top_logprobs": -1}, "top_logprobs -1"),
        ({"banned": ((1,), ())}, "banned sequence is empty"),
        ({"logit_bias": {3: 100.5}}, "logit_bias of token 3 is 100.5"),
        ({"logit_bias": {3: math.nan}}, "logit_bias of token 3 is nan"),
        ({"logit_bias": {50: 1.0}}, "logit_bias: token 50 is unknown"),
        ({"banned": ((1, -2),)}, "banned: token -2 is unknown"),
        ({"stop_ids": (50,)}, "stop_ids: token 50 is unknown"),
        ({"stop": ("a", "")}, "stop string is empty"),
    ],
)
def test_settings_without_a_meaning(change: dict[str, float], named: str) -> None:
    validate(SamplingParams(temperature=0.0, top_p=1.0, top_k=1, max_tokens=1, stop=("a",)), 50)
    validate(SamplingParams(max_tokens=0, echo=True, logit_bias={49: -100.0}, banned=((0, 49),)), 50)
    with pytest.raises(UserError, match=named) as error:
        validate(replace(SamplingParams(), **change), 50)
    assert "\n" not in str(error.value)


@pytest.mark.peers
def test_the_warpers_of_transformers_keep_the_same_tokens() -> None:
    transformers = pytest.importorskip("transformers")
    logits_BV = torch.randn(20, 50, generator=torch.Generator().manual_seed(0)).mul(3).round(decimals=1)
    temperature, k, p = 0.7, 12, 0.85
    theirs = transformers.TemperatureLogitsWarper(temperature)(None, logits_BV)
    theirs = transformers.TopPLogitsWarper(p)(None, transformers.TopKLogitsWarper(k)(None, theirs))
    ours = apply_temperature(logits_BV, torch.full((20,), temperature))
    ours = apply_top_p(apply_top_k(ours, torch.full((20,), k)), torch.full((20,), p))
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1))
    theirs = transformers.MinPLogitsWarper(0.3)(None, theirs)
    ours = apply_min_p(ours, torch.full((20,), 0.3))
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1))
