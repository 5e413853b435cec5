"""`fledge grpo --game`: what is written, that it learns, and mistakes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fledge import cli
from fledge.model.checkpoint import save_model
from fledge.stages import grpo
from fledge.tasks.tictactoe import moves, positions
from fledge.tokenizer.bpe import train_bpe

from ..models import chain_model
from .commands import metrics, summary, weights

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def guesser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers every board with any of 1 to 9, or, for one in ten, with the letter x."""
    directory = tmp_path_factory.mktemp("guesser") / "model"
    tokenizer = train_bpe(["aa"], 265)
    assert tokenizer.end_of_turn_id is not None
    line_break = tokenizer.encode("\n")[0]
    model = chain_model(tokenizer, {})
    with torch.no_grad():
        for cell in "123456789x":
            model.lm_head.weight[tokenizer.encode(cell)[0], line_break] = 20.0
    directory.mkdir()
    save_model(directory, model, tokenizer, {"stage": "sft"}, [tokenizer.end_of_turn_id, tokenizer.eos_id])
    return directory


@pytest.fixture
def flags(guesser: Path, tmp_path: Path) -> list[str]:
    return [
        "grpo", "--game", "tictactoe", "--model", str(guesser), "--out", str(tmp_path / "run"), "--rollouts",
        "6", "--batch-prompts", "8", "--samples", "8", "--max-tokens", "3", "--adam-lr", "0.003",
        "--warmup-steps", "1", "--evaluations", "1", "--decode-rows", "512", "--epochs", "1", "--minibatches",
        "1", "--compute", "fp32",
    ]  # fmt: skip


@pytest.mark.slow
def test_it_plays_itself(flags: list[str], tmp_path: Path) -> None:
    """The fixed opponents measure it before and after; the same seed plays the same games."""
    run = tmp_path / "run"
    assert cli.main(flags) == 0
    rows = metrics(run)
    evaluations = [row for row in rows if "validation" in row]
    assert [row["step"] for row in evaluations] == [0, 6]
    for row in evaluations:
        for name in ("random", "weak", "depth-2", "minimax"):
            assert 0 <= row[f"validation_p_won:{name}"] + row[f"validation_p_lost:{name}"] <= 1 + 1e-9
            assert row[f"validation_illegal:{name}"] <= row[f"validation_lost:{name}"]
        assert 0 < row["validation"] <= 1
    steps = [row for row in rows if "loss" in row]
    assert all(-1 <= row["score"] <= 1 and math.isfinite(row["loss"]) for row in steps)
    assert steps[0]["kl_k3"] == 0.0 < steps[-1]["kl_k3"]
    found = summary(run)
    assert found["prompts"] == 4520 and found["held_out"] == 0
    assert found["validation"] == evaluations[-1]["validation"]
    flags[flags.index("--out") + 1] = str(tmp_path / "again")
    assert cli.main(flags) == 0
    assert weights(tmp_path / "again") == weights(run)


def test_a_game_has_defaults_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given counts in both; Muon learns in a game alone, and can be left out."""
    asked: list[grpo.Config] = []
    monkeypatch.setattr(grpo, "_train", lambda config, _ranks: asked.append(config))
    flags = ["grpo", "--model", "m", "--beta", "0.1"]
    assert cli.main([*flags, "--prompts", "p.jsonl", "--reward", "exact"]) == 0
    assert cli.main([*flags, "--game", "tictactoe"]) == 0
    assert cli.main([*flags, "--game", "tictactoe", "--matrix-lr", "0", "--batch-prompts", "64"]) == 0
    prompts, game, other = asked
    assert (prompts.batch_prompts, prompts.samples, prompts.matrix_lr) == (32, 8, 0)
    assert game.batch_prompts == sum(bool(moves(board)) for board in positions())
    assert (other.batch_prompts, other.samples, other.matrix_lr) == (64, game.samples, 0)
    assert game.matrix_lr and {one.beta for one in asked} == {0.1}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--reward", "exact"], "--game tictactoe has its own prompts and reward"),
        (["--prompts", "x.jsonl"], "--game tictactoe has its own prompts and reward"),
        (["--game", "chess"], "chess"),
        (["--max-tokens", "100"], "leaves no room for a move"),
    ],
)
def test_mistakes(
    more: list[str], message: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if more[0] in flags:
        at = flags.index(more[0])
        del flags[at : at + 2]
    assert cli.main([*flags, *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_without_a_game_prompts_and_a_reward_are_needed(
    guesser: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["grpo", "--model", str(guesser), "--out", str(tmp_path / "run")]
    assert cli.main([*command, "--reward", "exact"]) == 2
    assert "--prompts: name at least one file" in capsys.readouterr().err
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}')
    assert cli.main([*command, "--prompts", str(tmp_path / "p.jsonl"), "--max-tokens", "9"]) == 2
    assert "--reward: name at least one reward" in capsys.readouterr().err
