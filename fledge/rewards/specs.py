"""Rewards as stages are told them: `runs/reward/model`, `rewards.py:function`, `0.9*exact:last_line=true`.

A spec is `[WEIGHT*]REWARD`, and a reward is a verifier (see `fledge/rewards/verifiers.py`), a function of the
user's own, or a reward model's directory. A name that could be two of them is the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fledge.errors import UserError
from fledge.rewards.functions import checked, files_of, is_function, reward_from
from fledge.rewards.verifiers import VERIFIERS, Reward, read_reward, split_weight
from fledge.tokenizer.bpe import Tokenizer


def read_specs(
    specs: Sequence[str],
    tokenizer: Tokenizer,
    as_text: bool,
    device: torch.device,
    compute_dtype: torch.dtype,
    longest: int,
) -> list[Reward]:
    """The rewards of specs, each `checked`, for rows of at most `longest` tokens; what a reward model needs
    is as of `reward_from`. Raises UserError for one that cannot be had, and if there are none."""
    if not specs:
        raise UserError("--reward: name at least one reward")
    kinds = (tokenizer, as_text, device, compute_dtype, longest)
    found = [_read(spec, *kinds) for spec in specs]
    names = [reward.name for reward in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"the reward {twice} is there twice; name it once, with a weight")
    return found


def reward_model_of(specs: Sequence[str]) -> Path | None:
    """The directory of the reward model that alone is the reward, as it is; None if the reward is another."""
    weight, bare = split_weight(specs[0]) if len(specs) == 1 else (0.0, "")
    return Path(bare) if weight == 1 and _is_model(bare) else None


def reward_files(specs: Sequence[str]) -> list[Path]:
    """The weights of all reward models among specs: a run that goes on must find the same."""
    return [
        file for spec in specs if _is_model(split_weight(spec)[1]) for file in files_of(split_weight(spec)[1])
    ]


def _read(
    spec: str,
    tokenizer: Tokenizer,
    as_text: bool,
    device: torch.device,
    compute_dtype: torch.dtype,
    longest: int,
) -> Reward:
    weight, bare = split_weight(spec)
    if split_weight(bare)[1] != bare:
        raise UserError(f"--reward {spec}: it has two weights; give their product")
    if (is_function(bare) and not _is_verifier(bare)) or _is_model(bare):
        return Reward(bare, weight, reward_from(bare, tokenizer, as_text, device, compute_dtype, longest))
    found = read_reward(bare)
    return replace(found, weight=weight, function=checked(found.function, bare))


def _is_verifier(bare: str) -> bool:
    return bare.partition(":")[0] in VERIFIERS


def _is_model(bare: str) -> bool:
    """Whether a reward is a directory: it is there, or written as a path is."""
    return not _is_verifier(bare) and not is_function(bare) and ("/" in bare or Path(bare).is_dir())
