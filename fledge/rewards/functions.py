"""Reward functions for roll-outs: a reward model, or a Python function of the user's own."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fledge.errors import UserError
from fledge.rewards.reward_model import Judge, load_judge
from fledge.tokenizer.bpe import Tokenizer
from fledge.types import Message, RewardFunction, Rollout

SHOWN_CHARACTERS = 200


def is_function(spec: str) -> bool:
    """Whether a reward is named as `file.py:function`; anything else is a directory."""
    return ".py:" in spec or spec.endswith(".py")


def load_function(spec: str) -> RewardFunction:
    """The function of `file.py:function`, which the user wrote: the file is run. It takes a list of `Rollout`
    and returns as many numbers. Raises UserError if it cannot be had."""
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not file.endswith(".py") or not name.isidentifier():
        raise UserError(f"{spec}: name the function behind the file, as in rewards.py:short_answers")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    module_spec = importlib.util.spec_from_file_location(f"fledge_user_{path.stem}", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses look their module up
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path}: cannot be run: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{path}: has no function {name!r}")
    reward: RewardFunction = function
    return reward


def reward_of(judge: Judge, tokenizer: Tokenizer, as_text: bool, where: Path | str) -> RewardFunction:
    """The rewards of a reward model. With the policy's tokenizer it reads the very ids that were sampled;
    `as_text`: the conversation as text, in its own template. Raises UserError for another tokenizer without
    `as_text`."""
    if as_text:
        return lambda rollouts: _score_texts(judge, rollouts)
    if judge.tokenizer.fingerprint() != tokenizer.fingerprint():
        raise UserError(
            f"{where}: its tokenizer or chat template is not the policy's; pass --reward-as-text to let it "
            "read conversations as text, in its own template"
        )
    return lambda rollouts: judge.score_ids([rollout.input_ids for rollout in rollouts])


def reward_from(
    spec: str,
    tokenizer: Tokenizer,
    as_text: bool,
    device: torch.device,
    compute_dtype: torch.dtype,
    longest: int,
) -> RewardFunction:
    """The reward function that `file.py:function` or a reward model's directory names, for rows of at most
    `longest` tokens, `checked`. Raises UserError if it cannot be had or cannot read them."""
    if is_function(spec):
        return checked(load_function(spec), spec)
    judge = load_judge(Path(spec), device, compute_dtype)
    if not as_text and longest > judge.max_tokens:
        raise UserError(
            f"{spec}: reads {judge.max_tokens} tokens, and a prompt with its completion may have {longest}; "
            "lower --max-tokens, or leave long prompts out"
        )
    return checked(reward_of(judge, tokenizer, as_text, spec), spec)


def files_of(spec: str) -> list[Path]:
    """The weights of a reward model; none of a function: it may be mended, and a run go on."""
    return [] if is_function(spec) else sorted(Path(spec).glob("*.safetensors"))


def _score_texts(judge: Judge, rollouts: Sequence[Rollout]) -> list[float]:
    rows = []
    for rollout in rollouts:
        answer: Message = {"role": "assistant", "content": rollout.completion}
        rows.append(judge.encode([*rollout.messages, answer], rollout.row.get("tools")))
    return judge.score_ids(rows)


def checked(reward: RewardFunction, name: str) -> RewardFunction:
    """The same function by way of `scores_of`."""
    return lambda rollouts: scores_of(reward, rollouts, name)


def scores_of(reward: RewardFunction, rollouts: list[Rollout], name: str) -> list[float]:
    """The function's rewards, checked. Raises UserError, which names a prompt and shows its completion, if it
    raises, or returns too few numbers or something that is no finite number."""
    try:
        found = list(reward(rollouts))
    except Exception as error:
        culprit, error = _culprit(reward, rollouts, error)
        said = f"{error}" if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"the reward {name} failed: {said}; {_shown(culprit)}") from error
    if len(found) != len(rollouts):
        raise UserError(
            f"the reward {name} returned {len(found)} numbers for {len(rollouts)} completions; "
            f"{_shown(rollouts[min(len(found), len(rollouts) - 1)])}"
        )
    scores = []
    for value, rollout in zip(found, rollouts, strict=True):
        number = _number(value)
        if number is None:
            raise UserError(f"the reward {name} returned {value!r}, no finite number; {_shown(rollout)}")
        scores.append(number)
    return scores


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _culprit(reward: RewardFunction, rollouts: list[Rollout], error: Exception) -> tuple[Rollout, Exception]:
    """The roll-out that the function alone raises for, with that error; the first, if there is none."""
    for rollout in rollouts:
        try:
            reward([rollout])
        except Exception as own:
            return rollout, own
    return rollouts[0], error


def _shown(rollout: Rollout) -> str:
    """Where a prompt stands and what was made of it, on one line."""
    text = rollout.completion
    cut = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
    return f"the prompt is {rollout.where}, the completion {cut!r}"
