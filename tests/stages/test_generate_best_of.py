"""`fledge generate --best-of`: the answer that a reward model likes most, and the bound of its KL."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fledge import cli

from .conftest import REFUSAL

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def reward_model(chat_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("reward")
    rows = [{"prompt": f"What is {i}?", "chosen": REFUSAL, "rejected": f"a dog {i}"} for i in range(40)]
    (directory / "preferences.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert cli.main([
        "reward", "--model", str(chat_run / "model"), "--data", str(directory / "preferences.jsonl"),
        "--out", str(directory / "run"), "--adam-lr", "0.002", "--no-controls", "--compute", "fp32",
    ]) == 0  # fmt: skip
    return directory / "run" / "model"


def test_the_best_answer_is_printed(
    chat_run: Path, reward_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["generate", "--model", str(chat_run / "model"), "--chat", "--prompt", "What is fox?"]
    more = ["--temperature", "1.5", "--max-tokens", "30", "--reward-model", str(reward_model)]
    rewards = []
    for n in ("1", "12"):
        capsys.readouterr()
        assert cli.main([*flags, *more, "--best-of", n]) == 0
        out, err = capsys.readouterr()
        assert out.strip()
        all_of_them = [float(found) for found in re.findall(r"[+-]\d+\.\d{3}", err)]
        assert len(all_of_them) == int(n)
        assert all_of_them == sorted(all_of_them, reverse=True)
        rewards.append(all_of_them[0])
    assert rewards[1] >= rewards[0]
    assert "best of 12: KL to the model's own distribution at most 1.568 nats" in err  # ln 12 - 11/12


@pytest.mark.parametrize("left_out", ["--best-of", "--reward-model", "--chat"])
def test_flags_that_need_each_other(
    left_out: str, chat_run: Path, reward_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = {"--best-of": ["2"], "--reward-model": [str(reward_model)], "--chat": [], "--prompt": ["a"]}
    flags = [word for name, values in groups.items() if name != left_out for word in (name, *values)]
    assert cli.main(["generate", "--model", str(chat_run / "model"), *flags]) == 2
    assert "--best-of N goes with --reward-model DIR and --chat" in capsys.readouterr().err
