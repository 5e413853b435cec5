"""Several answers to each problem of a task, and what they are worth by `fledge/evals/samples.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fledge.data.prompts import Prompt, read_prompts
from fledge.engine.remote import num_tokens
from fledge.engine.text import TextCompletion
from fledge.errors import UserError
from fledge.evals.facts import Share
from fledge.evals.samples import Sampled, accuracy_curves
from fledge.files import read_json
from fledge.rewards.best_of import reply_rewards
from fledge.rewards.reward_model import Judge
from fledge.rewards.verifiers import Reward, highest, read_rewards, weighted_sum
from fledge.rewards.votes import ballot
from fledge.types import Rollout, SamplingParams

# Completions of prompts, `params.n` for each, one prompt after the other.
Ask = Callable[[Sequence[Prompt], SamplingParams], Sequence[TextCompletion]]


@dataclass(frozen=True)
class CheckedTask:
    """Problems, and the rewards by which an answer is right: those of at least `right_from`."""

    name: str
    specs: tuple[str, ...]
    rewards: list[Reward]
    right_from: float
    problems: list[Prompt]


def name_of(path: Path) -> str:
    """What the results of a file or directory are called."""
    return path.name if path.is_dir() else path.stem


def read_task(path: Path, specs: Sequence[str], right_from: float | None, limit: int | None) -> CheckedTask:
    """The test problems of a directory that `fledge task` wrote, with its reward, or those of a file; `specs`
    are rewards in place of the task's. Raises UserError if it is not known what is right."""
    name, file = name_of(path), path
    if path.is_dir():
        file = path / "test.jsonl"
        manifest = read_json(path / "manifest.json") if (path / "manifest.json").is_file() else {}
        specs = specs or tuple(filter(None, [manifest.get("reward")]))
    if not specs:
        raise UserError(
            f"{path}: by what is an answer right? name it with --reward, as in exact or countdown"
        )
    rewards = read_rewards(specs)
    return CheckedTask(
        name, tuple(specs), rewards, least_right(rewards, right_from), read_prompts(file)[:limit]
    )


def least_right(rewards: Sequence[Reward], asked: float | None) -> float:
    """The reward from which an answer is right: by default the most that verifiers give. Raises UserError
    where there is a function, whose highest reward nobody knows."""
    most = highest(rewards) if asked is None else asked
    if most is None:
        names = ", ".join(one.name for one in rewards)
        raise UserError(f"--reward {names}: say with --right-from from which reward on an answer is right")
    return most - 1e-9


def sample_task(
    task: CheckedTask, ask: Ask, params: SamplingParams, judge: Judge | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ask each problem once greedily and `params.n` times with `params`; the figures, and a row for each
    problem. A completion that was cut off is wrong, votes for nothing and is chosen by no reward model."""
    greedy = ask(task.problems, replace(params, temperature=0.0, n=1))
    greedily_right = _right(task, greedy, 1)
    made = ask(task.problems, params)
    right, vote = _right(task, made, params.n), ballot(task.specs)
    asked = [problem.messages for problem in task.problems]
    rewards = None if judge is None else reply_rewards(judge, asked, made, params.n, finished_only=True)
    sampled, rows = [], []
    for i, problem in enumerate(task.problems):
        span = slice(i * params.n, (i + 1) * params.n)
        one = Sampled(
            tuple(right[span]),
            tuple(vote(reply.text) if _ended(reply) else None for reply in made[span]),
            tuple(map(_tokens, made[span])),
            None if rewards is None else tuple(rewards[span]),
        )
        sampled.append(one)
        rows.append(
            _row(task, problem, one, [reply.text for reply in made[span]], greedy[i], greedily_right[i])
        )
    summary = {
        "reward": list(task.specs),
        "problems": len(task.problems),
        "samples": params.n,
        "temperature": params.temperature,
        "greedy": {
            **Share(sum(greedily_right), len(greedy)).as_dict(),
            "tokens": sum(map(_tokens, greedy)) / len(greedy),
        },
        "first": Share(sum(one.right[0] for one in sampled), len(sampled)).as_dict(),
        "curves": accuracy_curves(sampled, params.seed),
        "cut_off": sum(not _ended(reply) for reply in made),
    }
    return summary, rows


def _ended(reply: TextCompletion) -> bool:
    return reply.finish_reason == "stop"


def _tokens(reply: TextCompletion) -> int:
    """What was made, with the token that ended it. Raises UserError where an endpoint does not count."""
    tokens = num_tokens(reply)
    if tokens is None:
        raise UserError(
            "the endpoint does not say how many tokens its answers have (usage.completion_tokens): problems "
            "can be asked of another one, or of a model directory"
        )
    return tokens + _ended(reply)


def _right(task: CheckedTask, made: Sequence[TextCompletion], n: int) -> list[bool]:
    rollouts = [
        Rollout(
            [], [], [], task.problems[i // n].row, list(task.problems[i // n].messages), reply.text,
            _ended(reply), task.problems[i // n].where,
        )
        for i, reply in enumerate(made)
    ]  # fmt: skip
    rewards = weighted_sum(task.rewards)(rollouts)
    return [one.ended and reward >= task.right_from for one, reward in zip(rollouts, rewards, strict=True)]


def _row(
    task: CheckedTask,
    problem: Prompt,
    one: Sampled,
    texts: Sequence[str],
    greedy: TextCompletion,
    greedily_right: bool,
) -> dict[str, Any]:
    """A line of `samples.jsonl`."""
    rewards = one.rewards or [None] * len(texts)
    return {
        "task": task.name,
        "where": problem.where,
        "prompt": problem.messages[-1].get("content"),
        "greedy": {"text": greedy.text, "right": greedily_right, "tokens": _tokens(greedy)},
        "samples": [
            {
                "text": text,
                "vote": vote,
                "right": right,
                "tokens": tokens,
                **({} if judge is None else {"reward": judge if judge > -math.inf else None}),
            }
            for text, vote, right, tokens, judge in zip(
                texts, one.votes, one.right, one.tokens, rewards, strict=True
            )
        ],
    }
