"""Tasks with several answers each: what is right, and what a reward model chooses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import Tensor, nn

from fledge.data.prompts import Prompt
from fledge.engine.text import TextCompletion
from fledge.errors import UserError
from fledge.evals.task_samples import least_right, name_of, read_task, sample_task
from fledge.rewards.reward_model import Judge
from fledge.rewards.verifiers import read_rewards
from fledge.tokenizer.bpe import train_bpe
from fledge.types import SamplingParams

TOKENIZER = train_bpe(["one two three"], 265)


class Counts(nn.Module):
    """A reward model whose reward is how often the letter x is in the row."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(1, 1)
        self.config = type("Config", (), {"max_position_embeddings": 60})

    def forward(self, ids: Tensor, last: Tensor) -> Tensor:
        return (ids == TOKENIZER.encode("x")[0]).sum(1).float()


def answers_by(texts: dict[str, Sequence[str]]) -> object:
    """Gives each prompt's texts in turn; one that ends in ~ was cut off."""

    def ask(problems: Sequence[Prompt], params: SamplingParams) -> list[TextCompletion]:
        made = []
        for problem in problems:
            for text in texts[str(problem.row["prompt"])][: params.n]:
                reason = "length" if text.endswith("~") else "stop"
                made.append(TextCompletion(text.rstrip("~"), [1] * len(text), [], reason))  # type: ignore[arg-type]
        return made

    return ask


@pytest.fixture
def task(tmp_path: Path) -> Path:
    rows = [{"prompt": "p", "answer": "1"}, {"prompt": "q", "answer": "2"}]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "manifest.json").write_text(json.dumps({"reward": "exact:last_line=true"}))
    return tmp_path


def test_the_reward_model_chooses_and_the_vote_counts_last_lines(task: Path) -> None:
    """p: 2 wins the vote, the longest x is right. q: what was cut off has most x and is not chosen."""
    judge = Judge(Counts(), TOKENIZER, 0.0)  # type: ignore[arg-type]
    texts = {"p": ["x\n2", "y\n2", "xxx\n1"], "q": ["xxxx\n2~", "x\n2", "\n3"]}
    found, rows = sample_task(
        read_task(task, (), None, None), answers_by(texts), SamplingParams(n=3), judge  # type: ignore[arg-type]
    )  # fmt: skip
    ends = {way: points[-1]["mean"] for way, points in found["curves"].items()}
    assert ends == {"verifier": 1.0, "vote": pytest.approx((0 + 1 / 2) / 2), "reward_model": 1.0}
    assert found["cut_off"] == 1 and found["greedy"]["successes"] == 0
    assert [one["vote"] for one in rows[1]["samples"]] == [None, "2", "3"]
    assert [one["reward"] for one in rows[0]["samples"]] == [1.0, 0.0, 3.0]
    assert rows[1]["samples"][0]["reward"] is None


def test_what_is_too_long_for_the_reward_model_is_not_chosen(task: Path) -> None:
    judge = Judge(Counts(), TOKENIZER, 0.0)  # type: ignore[arg-type]
    texts = {"p": ["x" * 99, "1"], "q": ["2", "2"]}
    found, rows = sample_task(
        read_task(task, (), None, None), answers_by(texts), SamplingParams(n=2), judge  # type: ignore[arg-type]
    )  # fmt: skip
    assert found["curves"]["reward_model"][-1]["mean"] == 1.0
    assert rows[0]["samples"][0]["reward"] is None


def test_what_is_right(task: Path) -> None:
    assert least_right(read_rewards(["0.9*exact", "0.2*normalised", "-1*regex:pattern=a"]), None) == (
        pytest.approx(1.1)
    )
    assert least_right(read_rewards(["tictactoe:legal=0.5"]), 0.5) == pytest.approx(0.5)
    found = read_task(task, ["number"], None, 1)
    assert found.specs == ("number",) and len(found.problems) == 1 and found.name == task.name
    (task / "manifest.json").unlink()
    with pytest.raises(UserError, match="name it with --reward"):
        read_task(task, (), None, None)


def test_ties_of_the_reward_model_go_to_the_first(task: Path) -> None:
    judge = Judge(Counts(), TOKENIZER, 0.0)  # type: ignore[arg-type]
    texts = {"p": ["x\n1", "x\n2"], "q": ["x\n1", "x\n2"]}
    found, _ = sample_task(
        read_task(task, (), None, None), answers_by(texts), SamplingParams(n=2), judge  # type: ignore[arg-type]
    )  # fmt: skip
    assert found["curves"]["reward_model"][-1]["mean"] == 0.5


def test_what_was_cut_off_is_never_right(task: Path) -> None:
    """A reward may like it; the answer is not there."""
    texts = {"p": ["x~", "y"], "q": ["x~", "y~"]}
    found, _ = sample_task(
        read_task(task, ["-1*regex:pattern=foo"], 0.0, None), answers_by(texts), SamplingParams(n=2), None  # type: ignore[arg-type]
    )  # fmt: skip
    assert found["curves"]["verifier"][-1]["mean"] == 0.5


def test_results_go_by_the_whole_name_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "v1.0").mkdir()
    (tmp_path / "v1.0.jsonl").touch()
    assert [name_of(tmp_path / name) for name in ("v1.0", "v1.0.jsonl")] == ["v1.0", "v1.0"]
