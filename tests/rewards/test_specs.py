"""Rewards by name: verifiers, functions and reward models, alone and with weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fledge.errors import UserError
from fledge.model.config import ModelConfig
from fledge.model.heads import RewardModel
from fledge.model.transformer import CausalLM
from fledge.rewards.reward_model import save_reward_model
from fledge.rewards.specs import read_specs, reward_files, reward_model_of
from fledge.rewards.verifiers import Reward, weighted_sum
from fledge.tokenizer.bpe import SMALLEST_VOCAB_SIZE, train_bpe
from fledge.types import Rollout

TOKENIZER = train_bpe([], SMALLEST_VOCAB_SIZE)


def rollout(said: str, **row: Any) -> Rollout:
    asked = [{"role": "user", "content": "Hi"}]
    return Rollout([1, 2, 3], [False, True, True], [0.0] * 3, row, asked, said, True, "p.jsonl:4")  # type: ignore[arg-type]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    trunk = CausalLM(ModelConfig("qwen3", TOKENIZER.vocab_size, 16, 24, 1, 2, 2, 8, 32))
    reward = RewardModel(trunk, torch.Generator().manual_seed(0))
    out = tmp_path / "judge"
    out.mkdir()
    save_reward_model(out, 0, model=reward, tokenizer=TOKENIZER, origin={}, base=out)
    return out


def read(*specs: str) -> list[Reward]:
    return read_specs(specs, TOKENIZER, False, torch.device("cpu"), torch.float32, 32)


def test_all_kinds_in_one_sum(model: Path, tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text(
        "def length(rollouts):\n    return [len(one.completion) for one in rollouts]"
    )
    found = read("0.9*exact", f"-.1*{tmp_path}/r.py:length", f"2*{model}")
    assert [reward.weight for reward in found] == [0.9, -0.1, 2.0]
    assert [reward.name for reward in found] == ["exact", f"{tmp_path}/r.py:length", str(model)]
    one = rollout("abc", answer="abc")
    scores = [reward.function([one])[0] for reward in found]
    assert scores[:2] == [1.0, 3.0]
    assert weighted_sum(found)([one]) == pytest.approx([0.9 - 0.3 + 2 * scores[2]])


def test_verifiers_come_with_settings() -> None:
    (found,) = read("exact:last_line=true")
    assert found.function([rollout("x\n7", answer="7"), rollout("7\nx", answer="7")]) == [1.0, 0.0]


def test_which_reward_model_is_the_reward(model: Path, tmp_path: Path) -> None:
    """Only alone and unweighted is it what a value function can begin as."""
    assert reward_model_of([str(model)]) == model
    for specs in ([f"0.5*{model}"], [str(model), "exact"], ["exact"], ["r.py:f"]):
        assert reward_model_of(specs) is None
    assert [file.name for file in reward_files([f"0.5*{model}", "exact", "r.py:f"])] == ["model.safetensors"]


def test_a_directory_of_a_verifiers_name_is_written_as_a_path(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model.rename("exact")
    assert reward_model_of(["exact"]) is None and reward_model_of(["./exact"]) == Path("exact")
    Path("exact").rename("mine")
    assert reward_model_of(["mine"]) == Path("mine"), "it is there, so it is meant"


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "--reward: name at least one reward"),
        (["exakt"], "unknown verifier 'exakt'; the nearest is 'exact'"),
        (["exact:fild=x"], "'fild=x' is not SETTING=VALUE; the settings are field, after, last_line"),
        (["none/model"], "none/model: no such model directory"),
        (["none.py:f"], "none.py: no such file"),
        (["exact", "0.5*exact"], "the reward exact is there twice; name it once, with a weight"),
        (["0.5*0.5*exact"], "--reward 0.5*0.5*exact: it has two weights; give their product"),
    ],
)
def test_what_cannot_be_had(specs: list[str], message: str) -> None:
    with pytest.raises(UserError) as raised:
        read(*specs)
    assert message in str(raised.value)


def test_a_row_that_a_verifier_cannot_judge_is_named() -> None:
    (found,) = read("exact")
    with pytest.raises(UserError) as raised:
        found.function([rollout("abc", answer="abc"), rollout("abc")])
    assert "the reward exact failed: p.jsonl:4: " in str(raised.value)
    assert "the prompt is p.jsonl:4, the completion 'abc'" in str(raised.value)
