"""Reward functions: found by name, checked, and what a reward model reads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fledge.errors import UserError
from fledge.model.config import ModelConfig
from fledge.model.heads import RewardModel
from fledge.model.transformer import CausalLM
from fledge.rewards.functions import checked, files_of, load_function, reward_from, reward_of
from fledge.rewards.reward_model import Judge, save_reward_model
from fledge.tokenizer.bpe import SMALLEST_VOCAB_SIZE, Tokenizer, train_bpe
from fledge.tokenizer.chat import encode_chat
from fledge.types import Message, Rollout


def rollout(said: str, number: int = 1, ids: tuple[int, ...] = (1, 2, 3)) -> Rollout:
    mask = [False] + [True] * (len(ids) - 1)
    asked: Message = {"role": "user", "content": "Hi"}
    return Rollout(list(ids), mask, [0.0] * len(ids), {}, [asked], said, True, f"p.jsonl:{number}")


THREE = [rollout("one", 1), rollout("two", 2), rollout("bad " + "x" * 300, 3)]


def refused(reward: Any, rollouts: list[Rollout]) -> str:
    with pytest.raises(UserError) as raised:
        checked(reward, "r.py:f")(rollouts)
    return str(raised.value)


def test_numbers_are_passed_on() -> None:
    for numbers in ([1, 2.5, True], torch.tensor([1.0, 2.5, 1.0])):
        found = checked(lambda _rollouts, n=numbers: n, "x")(THREE)  # type: ignore[misc]
        assert found == [1.0, 2.5, 1.0] and all(type(number) is float for number in found)


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "seven"])
def test_what_is_no_number_is_refused(value: Any) -> None:
    message = refused(lambda rollouts: [0.0, value, 0.0], THREE)
    assert message == f"the reward r.py:f returned {value!r}, no finite number; " + (
        "the prompt is p.jsonl:2, the completion 'two'"
    )


def test_too_few_numbers_are_refused() -> None:
    message = refused(lambda rollouts: [0.0, 1.0], THREE)
    assert message.startswith(
        "the reward r.py:f returned 2 numbers for 3 completions; the prompt is p.jsonl:3"
    )
    assert "returned 4 numbers for 3 completions" in refused(lambda rollouts: [0.0] * 4, THREE)


def test_the_completion_that_breaks_it_is_shown() -> None:
    """Found by asking for one after the other; cut where it is long; on one line."""

    def picky(rollouts: list[Rollout]) -> list[float]:
        return [1 / ("bad" not in one.completion) for one in rollouts]

    message = refused(picky, THREE)
    assert message.startswith(
        "the reward r.py:f failed: ZeroDivisionError: division by zero; the prompt is p.j"
    )
    assert message.endswith(f"p.jsonl:3, the completion {'bad ' + 'x' * 196 + '...'!r}")

    def never_many(rollouts: list[Rollout]) -> list[float]:
        if len(rollouts) > 1:
            raise UserError("too many")
        return [0.0]

    assert "failed: too many; the prompt is p.jsonl:1" in refused(never_many, THREE)
    assert "\n" not in refused(lambda rollouts: [math.nan], [rollout("a\nb")])


def test_a_function_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "my_rewards.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Weight:\n    value: float = 2.0\n"
        "def length(rollouts):\n    return [Weight().value * len(one.completion) for one in rollouts]\n"
    )
    assert load_function(f"{path}:length")(THREE[:2]) == [6.0, 6.0]
    for spec, message in (
        (f"{path}:width", f"{path}: has no function 'width'"),
        (f"{tmp_path}/none.py:f", f"{tmp_path}/none.py: no such file"),
        (str(path), "name the function behind the file"),
        (f"{path}:", "name the function behind the file"),
    ):
        with pytest.raises(UserError) as raised:
            load_function(spec)
        assert message in str(raised.value)
    path.write_text("import there_is_no_such_module\n")
    with pytest.raises(UserError, match=r"cannot be run: ModuleNotFoundError: .*there_is_no_such_module"):
        load_function(f"{path}:length")


# Reward models.


def model_of(tokenizer: Tokenizer, context: int = 64) -> RewardModel:
    torch.manual_seed(0)
    config = ModelConfig("qwen3", tokenizer.vocab_size, 16, 24, 1, 2, 2, 8, context)
    model = CausalLM(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return RewardModel(model, torch.Generator().manual_seed(0))


def test_with_the_same_tokenizer_the_sampled_ids_are_read() -> None:
    """Whatever text they are: the ids need not be those that the tokenizer would make of it."""
    tokenizer = train_bpe(["one one one two two two"], SMALLEST_VOCAB_SIZE + 5)
    judge = Judge(model_of(tokenizer), tokenizer, 0.25)
    reward = reward_of(judge, tokenizer, False, "rm")
    rows = [rollout("one", 1, (9, 8, 7)), rollout("one", 2, (9, 8, 6, 5))]
    assert reward(rows) == judge.score_ids([[9, 8, 7], [9, 8, 6, 5]])
    assert reward(rows)[0] != reward(rows)[1]


def test_with_another_tokenizer_it_reads_text_if_asked_to() -> None:
    """The conversation in its own template: the same as if it had been asked about the text."""
    tokenizer, other = (
        train_bpe(["one two"], SMALLEST_VOCAB_SIZE),
        train_bpe(["aaa bbb aaa"], SMALLEST_VOCAB_SIZE + 2),
    )
    judge = Judge(model_of(tokenizer), tokenizer, 0.25)
    with pytest.raises(
        UserError, match=r"rm: its tokenizer or chat template is not the policy's.*--reward-as-text"
    ):
        reward_of(judge, other, False, "rm")
    found = reward_of(judge, other, True, "rm")([rollout("one", 1, (9, 8)), rollout("two", 2, (9, 8))])
    messages: list[list[Message]] = [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": said}] for said in ("one", "two")
    ]
    assert found == judge.score(messages)
    end = tokenizer.end_of_turn_id
    ids = [encode_chat(tokenizer, turns).ids for turns in messages]
    assert found == judge.score_ids([row[: len(row) - row[::-1].index(end)] for row in ids])


def test_a_reward_model_must_have_room(tmp_path: Path) -> None:
    tokenizer = train_bpe([], SMALLEST_VOCAB_SIZE)
    save_reward_model(
        tmp_path, 0, model=model_of(tokenizer, 32), tokenizer=tokenizer, origin={}, base=tmp_path, offset=0.5
    )
    kinds = (tokenizer, False, torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match="reads 32 tokens, and a prompt with its completion may have 33"):
        reward_from(str(tmp_path), *kinds, 33)
    judge = Judge(model_of(tokenizer, 32), tokenizer, 0.5)
    assert reward_from(str(tmp_path), *kinds, 32)(THREE[:1]) == pytest.approx(judge.score_ids([[1, 2, 3]]))
    assert [file.name for file in files_of(str(tmp_path))] == ["model.safetensors"]
    with pytest.raises(UserError, match="no such model directory"):
        reward_from(str(tmp_path / "none"), *kinds, 3)
