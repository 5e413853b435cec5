"""The reward model's loss: TRL's numbers, the sum written by hand, and micro-batches that change nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fledge.data.comparisons import Comparison, ComparisonBatch, Pair, batch_of, in_batches
from fledge.data.preferences import ordered_pairs
from fledge.model.checkpoint import load_reward_model
from fledge.model.config import ModelConfig
from fledge.model.heads import RewardModel
from fledge.model.transformer import CausalLM
from fledge.train.losses import Term
from fledge.train.preference_losses import pair_nll, preference_loss

GOLDEN = Path(__file__).parents[1] / "golden" / "reward"
NUMBERS: dict[str, Any] = json.loads((GOLDEN / "losses.json").read_text())


def comparison(ids: list[list[int]], pairs: list[Pair]) -> Comparison:
    return Comparison("", [], [], ids, [], pairs)


def objective(terms: dict[str, Term], counts: dict[str, int]) -> Tensor:
    """What the loop makes of a loss's terms."""
    return torch.stack([term.weight * term.sum / counts[term.per] for term in terms.values()]).sum()


@pytest.mark.parametrize("case", NUMBERS["cases"], ids=lambda c: f"{c['margin']}-{c['centring']}")
def test_the_pair_loss_is_trls(case: dict[str, Any]) -> None:
    """Loss, accuracy, rewards and the size of every gradient, as RewardTrainer.compute_loss gave them."""
    model = load_reward_model(GOLDEN)
    prompts = [
        comparison(
            [example["chosen_ids"], example["rejected_ids"]],
            [Pair(0, 1, example["margin"] if case["margin"] else 0.0)],
        )
        for example in NUMBERS["examples"]
    ]
    batch = batch_of(prompts)
    terms = preference_loss(model, batch, case["centring"])
    loss = objective(terms, batch.denominators())
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    assert float(terms["accuracy"].sum) / 3 == pytest.approx(case["accuracy"])
    rewards = model(batch.input_ids, batch.last)
    assert rewards[0::2].tolist() + rewards[1::2].tolist() == pytest.approx(case["rewards"], abs=1e-5)
    norms = {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}
    assert norms == pytest.approx(case["gradient_norms"], rel=1e-4, abs=1e-6)


def fixed(rewards: list[float]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda ids, last: torch.tensor(rewards)


def test_the_k_wise_loss_is_the_sum_written_by_hand() -> None:
    """Ranks [1, 2, 2, 4]: of six pairs the tie is dropped."""
    a, b, c, d = 1.0, 0.25, -0.5, 0.75
    pairs = [Pair(i, j) for i, j in ordered_pairs([1, 2, 2, 4])]
    batch = batch_of([comparison([[1]] * 4, pairs)])
    by_hand = [math.log(1 + math.exp(-(x - y))) for x, y in ((a, b), (a, c), (a, d), (b, d), (c, d))]
    terms = preference_loss(fixed([a, b, c, d]), batch)
    assert float(terms["loss"].sum) == pytest.approx(sum(by_hand) / 5)
    assert float(terms["accuracy"].sum) == pytest.approx(3 / 5)


def test_prompts_count_alike_however_many_pairs_they_have() -> None:
    many = comparison([[1]] * 3, [Pair(0, 1), Pair(0, 2), Pair(1, 2)])
    one = comparison([[1]] * 2, [Pair(1, 0)])
    batch = batch_of([many, one])
    terms = preference_loss(fixed([0.0, 0.0, 0.0, 3.0, 0.0]), batch)
    assert batch.denominators() == {"tokens": 5, "prompts": 2, "pairs": 4}
    assert float(terms["loss"].sum) == pytest.approx(math.log(2) + math.log(1 + math.exp(3.0)))


def test_a_margin_must_be_won_too() -> None:
    apart = torch.tensor([1.5])
    nothing = torch.zeros(1)
    assert float(pair_nll(apart, nothing, torch.tensor([1.5]))) == pytest.approx(math.log(2))
    assert float(pair_nll(apart, nothing, nothing)) == pytest.approx(math.log(1 + math.exp(-1.5)))


def test_centring_pulls_the_mean_to_zero() -> None:
    batch = batch_of([comparison([[1]] * 2, [Pair(0, 1)])])
    terms = preference_loss(fixed([3.0, 2.0]), batch, 0.1)
    assert (float(terms["centring"].sum), terms["centring"].weight) == (25.0, 0.1)
    assert "centring" not in preference_loss(fixed([3.0, 2.0]), batch)


def random_prompts(count: int) -> list[Comparison]:
    rng = torch.Generator().manual_seed(1)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=rng))

    prompts = []
    for _ in range(count):
        ranks = [number(1, 4) for _ in range(number(2, 5))] + [9]
        ids = [[number(0, 50) for _ in range(number(2, 20))] for _ in ranks]
        margin = number(0, 3) / 2
        pairs = [Pair(i, j, margin) for i, j in ordered_pairs(ranks)]
        prompts.append(comparison(ids, pairs))
    return prompts


@pytest.mark.parametrize("centring", [0.0, 0.01])
def test_micro_batches_equal_the_big_batch(centring: float) -> None:
    config = ModelConfig("qwen3", 50, 16, 24, 2, 4, 2, 4, 32)
    language_model = CausalLM(config)
    language_model.init_weights(torch.Generator().manual_seed(0))
    model = RewardModel(language_model, torch.Generator().manual_seed(0))
    prompts = random_prompts(9)

    def gradients(batches: list[ComparisonBatch]) -> list[Tensor]:
        counts: dict[str, int] = {}
        for batch in batches:
            for name, number in batch.denominators().items():
                counts[name] = counts.get(name, 0) + number
        model.zero_grad()
        for batch in batches:
            objective(preference_loss(model, batch, centring), counts).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    small = [batch_of(part) for part in in_batches(prompts, 80)]
    assert len(small) > 3
    assert all(b.input_ids.numel() <= 80 or b.prompts == 1 for b in small)
    assert sum(batch.prompts for batch in small) == 9
    for whole, parts in zip(gradients([batch_of(prompts)]), gradients(small), strict=True):
        torch.testing.assert_close(whole, parts, atol=1e-6, rtol=1e-4)
