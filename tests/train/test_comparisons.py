"""Steps of comparisons: each prompt once an epoch, the same whenever they are begun."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from fledge.data.comparisons import Comparison, Pair
from fledge.errors import UserError
from fledge.model.config import ModelConfig
from fledge.model.heads import RewardModel
from fledge.model.transformer import CausalLM
from fledge.train import memory
from fledge.train.comparisons import Plan, held_out_figures, memory_line, reward_steps, steps_of

PROMPTS = [
    Comparison(str(i), [], [], [[i, 1 + i % 3, 5], [i, 2] + [7] * (i % 4)], [], [Pair(0, 1)])
    for i in range(10)
]


def seen(first: int, epochs: float, batch: int = 4, micro: int = 12, seed: int = 0) -> list[list[int]]:
    """The prompts of each step, by the first id of their rows."""
    steps = reward_steps(Plan(batch, micro, epochs, seed), PROMPTS)(first, {}, None)
    return [sorted(int(b.input_ids[i, 0]) for b in s.batches for i in b.better) for s in steps]


def test_every_prompt_is_seen_once_an_epoch() -> None:
    found = seen(0, 3.0)
    assert len(found) == steps_of(10, 4, 3.0) == 8
    assert [len(step) for step in found] == [4] * 7 + [2]
    assert Counter(i for step in found for i in step) == dict.fromkeys(range(10), 3)
    assert len(seen(0, 0.5)) == steps_of(10, 4, 0.5) == 2
    assert seen(0, 1e-9) != [] and steps_of(10, 4, 1e-9) == 1


def test_steps_do_not_depend_on_where_they_are_begun() -> None:
    whole = seen(0, 3.0)
    assert seen(3, 3.0) == whole[3:]
    assert seen(0, 3.0, micro=1000) == whole, "micro-batches change nothing"
    assert seen(0, 3.0, seed=1) != whole


def model() -> RewardModel:
    language_model = CausalLM(ModelConfig("qwen3", 50, 16, 24, 2, 4, 2, 4, 32))
    language_model.init_weights(torch.Generator().manual_seed(0))
    return RewardModel(language_model, torch.Generator().manual_seed(0))


def test_figures_do_not_depend_on_the_batches() -> None:
    made = model()
    whole = held_out_figures(made, PROMPTS, torch.float32, 1000)
    parts = held_out_figures(made, PROMPTS, torch.float32, 1)
    assert whole == pytest.approx(parts)
    with torch.no_grad():
        made.score.weight.zero_()
    flat = held_out_figures(made, PROMPTS, torch.float32, 1000)
    assert flat == {"validation": pytest.approx(0.693147, abs=1e-6), "validation_accuracy": 0.0}


def test_what_does_not_fit_is_said_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory_line(model(), PROMPTS, 1000, torch.float32, False).startswith("memory: about ")
    language_model = CausalLM(ModelConfig("qwen3", 50, 16, 24, 2, 4, 2, 4, 32))
    assert memory_line(language_model, PROMPTS, 1000, torch.float32, False).startswith("memory: about ")
    monkeypatch.setattr(memory, "free_bytes", lambda device: -1e12)
    with pytest.raises(UserError, match="training would take about"):
        memory_line(model(), PROMPTS, 1000, torch.float32, False)
