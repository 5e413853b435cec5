"""Best-of-n: of several completions of a prompt the one that a reward model likes most."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from rich.console import Console

from fledge.data.prompts import Prompt, read_prompts
from fledge.engine.text import LocalChat, TextCompletion, load_engine
from fledge.errors import UserError
from fledge.files import read_json, sha256, write_json, write_text
from fledge.rewards.reward_model import Judge, load_judge
from fledge.run import Run
from fledge.types import Message, SamplingParams

T = TypeVar("T")


@dataclass(frozen=True)
class Best(Generic[T]):
    """The chosen completion, and the rewards of all, in the order in which they were made."""

    chosen: T
    place: int
    rewards: list[float]

    @property
    def reward(self) -> float:
        """Of the chosen one."""
        return self.rewards[self.place]


def kl_bound(n: int) -> float:
    """ln n - (n - 1)/n nats: what KL(best-of-n || policy) is at most (Beirami et al. 2024; Stiennon et al.
    2020 use it as its value)."""
    return math.log(n) - (n - 1) / n


def bound_line(n: int) -> str:
    """What is printed beside every result of best-of-n."""
    return f"best of {n}: KL to the model's own distribution at most {kl_bound(n):.3f} nats"


def pick_best(completions: Sequence[T], rewards: Sequence[float]) -> Best[T]:
    """The completion with the highest reward; of equal ones the first."""
    place = max(range(len(rewards)), key=lambda i: (rewards[i], -i))
    return Best(completions[place], place, list(rewards))


def reply_rewards(
    judge: Judge,
    conversations: Sequence[Sequence[Message]],
    replies: Sequence[TextCompletion],
    n: int,
    finished_only: bool,
) -> list[float]:
    """The rewards of `n` replies to each conversation; -inf for one that does not fit into the reward model's
    context, and with `finished_only` for one that was cut off."""
    rewards, rows = [-math.inf] * len(replies), {}
    for i, reply in enumerate(replies):
        if finished_only and reply.finish_reason != "stop":
            continue
        ids = judge.encode([*conversations[i // n], {"role": "assistant", "content": reply.text}])
        if len(ids) <= judge.max_tokens:
            rows[i] = ids
    for i, reward in zip(rows, judge.score_ids(list(rows.values())), strict=True):
        rewards[i] = reward
    return rewards


def best_replies(
    chat: LocalChat,
    judge: Judge,
    conversations: Sequence[Sequence[Message]],
    params: SamplingParams,
    n: int,
    finished_only: bool = False,
) -> list[Best[TextCompletion]]:
    """For each conversation the best of `n` sampled turns of the assistant.

    A reply is scored as the text that it is, in the reward model's own chat template; one that was cut off by
    a limit as if it had ended there, or with `finished_only` never chosen. Never chosen are replies that do
    not fit into the reward model's context: their reward is -inf, and the best one's where all are such.
    Raises UserError for `n` below 1.
    """
    if n < 1:
        raise UserError(f"--best-of {n}: must be at least 1")
    replies = chat.replies(conversations, replace(params, n=n))
    rewards = reply_rewards(judge, conversations, replies, n, finished_only)
    spans = (slice(first, first + n) for first in range(0, len(replies), n))
    return [pick_best(replies[span], rewards[span]) for span in spans]


def write_best_of(
    path: Path,
    chat: LocalChat,
    judge: Judge,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    n: int,
) -> dict[str, Any]:
    """Rejection sampling: write a conversation with the best finished reply to each prompt, its `reward` and
    the `rewards` of all, for `fledge sft`; returns what was made.

    Prompts to which no reply came to its end are left out and counted. Raises UserError for a prompt with
    tools, or if nothing is left.
    """
    tooled = next((prompt.where for prompt in prompts if prompt.tools), None)
    if tooled is not None:
        raise UserError(f"{tooled}: best-of-n is for prompts without tools")
    asked = [prompt.messages for prompt in prompts]
    found = best_replies(chat, judge, asked, params, n, finished_only=True)
    kept = [(messages, best) for messages, best in zip(asked, found, strict=True) if best.reward > -math.inf]
    if not kept:
        raise UserError(
            f"no reply of {n} came to its end within {params.max_tokens} tokens; raise --completion-tokens"
        )
    lines = [
        {
            "messages": [*messages, {"role": "assistant", "content": best.chosen.text}],
            "reward": best.reward,
            "rewards": [reward if reward > -math.inf else None for reward in best.rewards],
        }
        for messages, best in kept
    ]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    scored = [reward for _, best in kept for reward in best.rewards if reward > -math.inf]
    return {
        "n": n,
        "prompts": len(kept),
        "unfinished": len(found) - len(kept),
        "mean_reward": sum(scored) / len(scored),
        "mean_best_reward": sum(best.reward for _, best in kept) / len(kept),
        "kl_bound": kl_bound(n),
    }


def sample_best(
    data: Path,
    model: Path,
    reward_model: Path,
    params: SamplingParams,
    run: Run,
    inputs: Callable[[], dict[str, str]],
    device: torch.device,
    console: Console,
) -> tuple[Path, dict[str, Any]]:
    """`write_best_of` for the prompts of a file, into `best_of.jsonl` of a run, which this begins (`inputs`
    gives the fingerprints of the rest); with what is known about it. A run that goes on has both already."""
    prompts, judge = read_prompts(data), load_judge(reward_model, device)
    chat = LocalChat(*load_engine(model, device=device))
    run.begin({**inputs(), "the reward model": sha256(sorted(reward_model.glob("*.safetensors")))})
    path, figures = run.directory / "best_of.jsonl", run.directory / "best_of.json"
    if not figures.exists():
        console.print(f"{len(prompts):,} prompts; {bound_line(params.n)}", highlight=False)
        write_json(figures, write_best_of(path, chat, judge, prompts, params, params.n))
    made: dict[str, Any] = read_json(figures)
    console.print(
        f"{made['prompts']:,} replies chosen, {made['unfinished']:,} prompts left out; "
        f"mean reward {made['mean_reward']:+.3f}, of the chosen {made['mean_best_reward']:+.3f}",
        highlight=False,
    )
    return path, made
