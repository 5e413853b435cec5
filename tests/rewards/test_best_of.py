"""Best-of-n: the bound of its KL, and that the best one is taken."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fledge.data.prompts import Prompt
from fledge.engine.text import LocalChat, load_engine
from fledge.errors import UserError
from fledge.rewards.best_of import best_replies, bound_line, kl_bound, pick_best, write_best_of
from fledge.rewards.reward_model import Judge
from fledge.tokenizer.bpe import Tokenizer, train_bpe
from fledge.types import SamplingParams
from tests.models import chain_model


def test_the_bound_is_reached_by_a_fine_distribution() -> None:
    """With m equally likely completions of different rewards, the i-th best of them is best of n with
    probability ((m - i + 1)^n - (m - i)^n) / m^n; its KL comes to the bound from below as m grows."""
    for n in (1, 2, 4, 16):
        exact = []
        for m in (10, 10_000):
            best = [(i / m) ** n - ((i - 1) / m) ** n for i in range(1, m + 1)]
            exact.append(sum(p * math.log(p * m) for p in best if p > 0))
        assert exact[0] <= exact[1] <= kl_bound(n) + 1e-9
        assert exact[1] == pytest.approx(kl_bound(n), abs=2e-3)


def test_the_line_that_is_printed() -> None:
    assert bound_line(16) == "best of 16: KL to the model's own distribution at most 1.835 nats"


def test_the_first_of_the_best_is_taken() -> None:
    best = pick_best(["a", "b", "c", "d"], [0.5, 2.0, -1.0, 2.0])
    assert (best.chosen, best.place, best.reward) == ("b", 1, 2.0)
    assert best.rewards == [0.5, 2.0, -1.0, 2.0]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["one two three"], 265)


class Counts(nn.Module):
    """A reward model whose reward is how often an id is in the row."""

    def __init__(self, token_id: int, context: int) -> None:
        super().__init__()
        self.score = nn.Linear(1, 1)
        self.token_id = token_id
        self.config = type("Config", (), {"max_position_embeddings": context})

    def forward(self, ids: Tensor, last: Tensor) -> Tensor:
        return (ids == self.token_id).sum(1).float()


def judge(tokenizer: Tokenizer, letter: str, context: int = 1000) -> Judge:
    (token_id,) = tokenizer.encode(letter)
    return Judge(Counts(token_id, context), tokenizer, offset=-1.0)


@pytest.fixture
def chat(tokenizer: Tokenizer, tmp_path: Path) -> LocalChat:
    """A model that writes x and y as a coin falls, six of them."""
    model = chain_model(tokenizer, {})
    x, y = tokenizer.encode("xy")
    with torch.no_grad():
        model.lm_head.weight.fill_(0.0)
        model.lm_head.weight[[x, y]] = 50.0
    from fledge.model.checkpoint import save_model

    directory = tmp_path / "model"
    directory.mkdir()
    save_model(directory, model, tokenizer, {"stage": "sft"}, [tokenizer.eos_id])
    return LocalChat(*load_engine(directory))


def test_more_samples_give_higher_rewards(chat: LocalChat, tokenizer: Tokenizer) -> None:
    asked = [[{"role": "user", "content": f"{i}"}] for i in range(8)]
    means = []
    for n in (1, 16):
        params = SamplingParams(temperature=1.0, max_tokens=6, seed=3)
        found = best_replies(chat, judge(tokenizer, "x"), asked, params, n)
        assert all(len(best.rewards) == n for best in found)
        for best in found:
            assert best.reward == max(best.rewards) == best.chosen.text.count("x") - 1.0
        means.append(sum(best.reward for best in found) / 8)
    assert means[1] > means[0] + 1


def test_replies_that_cannot_be_scored_are_never_chosen(chat: LocalChat, tokenizer: Tokenizer) -> None:
    asked = [[{"role": "user", "content": "a"}]]
    params = SamplingParams(temperature=1.0, max_tokens=6)
    for context, finished_only in ((5, False), (1000, True)):  # none fits; none came to its end
        scorer = judge(tokenizer, "x", context)
        (best,) = best_replies(chat, scorer, asked, params, 3, finished_only)
        assert best.rewards == [-math.inf] * 3
    with pytest.raises(UserError, match="--best-of 0: must be at least 1"):
        best_replies(chat, judge(tokenizer, "x"), asked, params, 0)


def test_only_finished_replies_are_written(chat: LocalChat, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The model ends its turn a third of the time at each token, so within three tokens mostly."""
    with torch.no_grad():
        chat.engine.model.lm_head.weight[tokenizer.end_of_turn_id] = 50.0
    prompts = [Prompt([{"role": "user", "content": str(i)}], None, {}, f"a:{i}") for i in range(20)]
    params = SamplingParams(temperature=1.0, max_tokens=3)
    made = write_best_of(tmp_path / "a.jsonl", chat, judge(tokenizer, "x"), prompts, params, 4)
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert made["prompts"] == len(rows) == 20 - made["unfinished"] > 10
    assert made["mean_best_reward"] > made["mean_reward"]
    for row in rows:
        assert row["reward"] == row["messages"][-1]["content"].count("x") - 1.0
        assert row["reward"] == max(reward for reward in row["rewards"] if reward is not None)
        assert len(row["messages"][-1]["content"]) < 3
    tooled = [Prompt(prompts[0].messages, [{}], {}, "a:7")]
    with pytest.raises(UserError, match="a:7: best-of-n is for prompts without tools"):
        write_best_of(tmp_path / "b.jsonl", chat, judge(tokenizer, "x"), tooled, params, 4)
