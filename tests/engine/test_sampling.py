"""Sampling: the distributions are the exact ones, and a row's draws are its own."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from fledge.engine.sampling import (
    Sampler,
    apply_temperature,
    apply_top_k,
    apply_top_p,
    draw,
    generator_for,
    validate,
)
from fledge.errors import UserError
from fledge.types import SamplingParams

CPU = torch.device("cpu")
LOGITS = [2.0, -1.0, 0.5, 1.5, 0.0, 1.0, -3.0, 0.25]


def exact(params: SamplingParams) -> list[float]:
    """The distribution by its definition: temperature, then the k best, then the fewest that hold p."""
    weights = {i: math.exp(score / params.temperature) for i, score in enumerate(LOGITS)}
    order = sorted(weights, key=lambda i: -weights[i])[: params.top_k]
    total, mass, kept = sum(weights[i] for i in order), 0.0, []
    for i in order:
        if kept and params.top_p is not None and mass >= params.top_p:
            break
        kept.append(i)
        mass += weights[i] / total
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(LOGITS))]


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
    ],
)
def test_chi_square_against_the_exact_distribution(params: SamplingParams) -> None:
    rows, steps = 400, 25
    sampler = Sampler([params] * rows, range(rows), CPU)
    logits_BV = torch.tensor([LOGITS] * rows)
    counts = Counter(token for _ in range(steps) for token in sampler(logits_BV).tolist())
    probabilities, n = exact(params), rows * steps
    assert all(counts[i] == 0 for i, p in enumerate(probabilities) if p == 0)
    live = [(counts[i], n * p) for i, p in enumerate(probabilities) if p > 0]
    chi_square = sum((seen - expected) ** 2 / expected for seen, expected in live)
    # The 0.001 point of chi-square for 0 to 7 degrees of freedom.
    limits = [1e-9, 10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.32]
    assert chi_square < limits[len(live) - 1]


def test_rows_with_different_settings_share_a_batch() -> None:
    settings = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.7, seed=1),
        SamplingParams(top_k=1, seed=2),
        SamplingParams(temperature=1.2, top_p=0.5, seed=3),
        SamplingParams(temperature=3.0, top_k=4, seed=4),
    ]
    together = Sampler(settings, range(5), CPU)
    alone = [Sampler([params], [row], CPU) for row, params in enumerate(settings)]
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        logits_BV = torch.randn(len(together.params), 30, generator=generator)
        if step == 30:  # rows leave; the others go on as if nothing had happened
            together.select([3, 0, 4])
            alone = [alone[3], alone[0], alone[4]]
            logits_BV = logits_BV[:3]
        expected = [int(one(logits_BV[i : i + 1])) for i, one in enumerate(alone)]
        assert together(logits_BV).tolist() == expected
        greedy = [i for i, params in enumerate(together.params) if params.temperature == 0]
        assert all(expected[i] == int(logits_BV[i].argmax()) for i in greedy)


def test_each_seed_and_row_has_its_own_numbers() -> None:
    keys = [(seed, row) for seed in (-1, 0, 1, 2**70) for row in range(50)]
    first = [torch.rand((), generator=generator_for(seed, row)).item() for seed, row in keys]
    assert len(set(first)) == 200
    assert torch.rand((), generator=generator_for(0, 7)).item() == first[57]


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
    sampler = Sampler([SamplingParams(temperature=temperature)], [0], CPU)
    assert int(sampler(logits_BV)) in ({0} if temperature < 1 else {0, 1, 2})


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
        ({"stop": ("a", "")}, "stop string is empty"),
    ],
)
def test_settings_without_a_meaning(change: dict[str, float], named: str) -> None:
    validate(SamplingParams(temperature=0.0, top_p=1.0, top_k=1, max_tokens=1, stop=("a",)))
    with pytest.raises(UserError, match=named) as error:
        validate(replace(SamplingParams(), **change))
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
