"""`fledge reward`: what is learned, what stands beside it, and that an interruption changes nothing."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fledge import cli
from fledge.data.comparisons import compare
from fledge.data.preferences import read_rankings
from fledge.model.checkpoint import load_model, load_reward_model
from fledge.rewards.reward_model import load_judge, score_rows
from fledge.run import LOCK
from fledge.tokenizer.bpe import Tokenizer

from .commands import (
    changed,
    kill_and_interrupt,
    metrics,
    start,
    summary,
    wait_for_step,
    weights,
    write_jsonl,
)
from .conftest import REFUSAL, WORDS, questions

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs and rankings: a refusal beats words, and few words beat many; two labelers now and then."""
    rows: list[dict[str, Any]] = []
    for i, (prompt, few, many) in enumerate(questions(12)):
        ranked = {
            "prompt": prompt,
            "completions": [few, REFUSAL, many, few + " dog"],
            "ranks": [2, 1, 4, 2],
            "kinds": ["short", "refusal", "padded", "short"],
            "labeler": "rule",
            "simulated": True,
        }
        pair = {"prompt": prompt, "chosen": REFUSAL, "rejected": few, "kinds": ["refusal", "short"]}
        rows += [ranked, {**pair, "labeler": "ann"}] if i % 4 == 0 else [ranked if i % 2 else pair]
    return write_jsonl(tmp_path_factory.mktemp("preferences") / "preferences.jsonl", rows)


@pytest.fixture
def flags(preferences: Path, chat_run: Path, tmp_path: Path) -> list[str]:
    return [
        "reward", "--model", str(chat_run / "model"), "--data", str(preferences),
        "--out", str(tmp_path / "run"), "--epochs", "3", "--batch-prompts", "8", "--adam-lr", "0.002",
        "--validation-share", "0.25", "--compute", "fp32",
    ]  # fmt: skip


ASKED = {"role": "user", "content": "What is fox?"}


def test_a_reward_model_and_its_examination(flags: list[str], preferences: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cli.main(flags) == 0
    assert {path.name for path in run.iterdir()} == {
        LOCK, "config.toml", "environment.json", "metrics.jsonl", "checkpoints", "model", "summary.json",
        "pairs.jsonl", "controls", "report.html",
    }  # fmt: skip
    found = summary(run)
    assert found["prompts"] + found["held_out"] == 60
    assert found["pairs"] == 15 * (5 + 1) + 30 * 5 + 15
    assert found["accuracy"]["rate"] > 0.9
    assert found["accuracy"]["n"] == len((run / "pairs.jsonl").read_text().splitlines())
    assert found["blind"]["rate"] > 0.9, "this rule needs no prompt"
    assert found["by_kinds"]["refusal against short"]["beats_blind"] is False
    assert found["labelers_agree"]["rate"] == 1.0
    assert found["shuffled"]["high"] < found["accuracy"]["low"], "labels that say nothing teach nothing"
    lineage = json.loads((run / "model" / "lineage.json").read_text())
    assert (lineage["stage"], lineage["tokens"]) == ("reward", found["tokens"])
    assert lineage["reward_offset"] == found["offset"]


def test_the_best_completions_have_mean_reward_0(flags: list[str], preferences: Path, tmp_path: Path) -> None:
    """With the offset; the scores of the directory itself are raw."""
    assert cli.main([*changed(flags, "--validation-share", "0"), "--no-controls"]) == 0
    directory = tmp_path / "run" / "model"
    judge = load_judge(directory)
    prompts = compare(read_rankings(preferences), judge.tokenizer, 128).prompts
    best = [
        prompt.ids[prompt.completions.index([{"role": "assistant", "content": REFUSAL}])]
        for prompt in prompts
    ]
    rewards = judge.score_ids(best)
    assert sum(rewards) / len(rewards) == pytest.approx(0.0, abs=1e-4)
    raw = score_rows(load_reward_model(directory), best)
    assert [r + judge.offset for r in raw] == pytest.approx(rewards)
    chat = [ASKED, {"role": "assistant", "content": REFUSAL}]
    worse = [chat[0], {"role": "assistant", "content": " ".join(WORDS)}]
    assert judge.score([chat])[0] > judge.score([worse])[0]
    assert not (tmp_path / "run" / "report.html").exists(), (
        "nothing was held out, so there is nothing to show"
    )
    assert not (tmp_path / "run" / "controls").exists()


def test_reference_answers_have_mean_reward_0(flags: list[str], corpus: Path, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text("\n".join((corpus / "chats.jsonl").read_text().splitlines()[:9]))
    assert cli.main([*flags, "--reference", str(chats), "--no-controls"]) == 0
    conversations = [json.loads(line)["messages"] for line in chats.read_text().splitlines()]
    rewards = load_judge(tmp_path / "run" / "model").score(conversations)
    assert sum(rewards) / len(rewards) == pytest.approx(0.0, abs=1e-4)


def test_the_trunk_is_the_assistants(flags: list[str], chat_run: Path, tmp_path: Path) -> None:
    """With a rate of nothing it is still the one it began with, and has no head over the vocabulary."""
    assert cli.main([*changed(flags, "--adam-lr", "1e-12", "--epochs", "0.2"), "--no-controls"]) == 0
    before = load_model(chat_run / "model").model.state_dict()
    after = load_reward_model(tmp_path / "run" / "model").model.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(before[name], after[name], atol=1e-9, rtol=0)


def test_killed_and_interrupted_the_result_is_the_same(flags: list[str], tmp_path: Path) -> None:
    out, reference = tmp_path / "run", tmp_path / "reference"
    flags = changed(flags, "--epochs", "8", "--evaluations", "12")
    kill_and_interrupt(flags, out, (signal.SIGKILL, 6), (signal.SIGINT, 15))
    assert cli.main(flags) == 0
    assert cli.main(changed(flags, "--out", str(reference))) == 0
    assert metrics(out) == metrics(reference)
    assert weights(out) == weights(reference)
    assert (out / "pairs.jsonl").read_bytes() == (reference / "pairs.jsonl").read_bytes()


def test_finished_controls_are_not_trained_again(flags: list[str], tmp_path: Path) -> None:
    assert cli.main(flags) == 0
    run = tmp_path / "run"
    before = (run / "pairs.jsonl").read_bytes()
    times = [path.stat().st_mtime_ns for path in sorted((run / "controls").glob("*/metrics.jsonl"))]
    for name in ("summary.json", "pairs.jsonl"):  # as if it had ended while it was examined
        (run / name).unlink()
    assert cli.main(flags) == 0
    assert (run / "pairs.jsonl").read_bytes() == before
    assert [path.stat().st_mtime_ns for path in sorted((run / "controls").glob("*/metrics.jsonl"))] == times


def test_a_seed_decides_and_a_finished_run_does_nothing(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*changed(flags, "--epochs", "1"), "--no-controls"]
    for name, seed in (("run", "0"), ("b", "0"), ("c", "1")):
        assert cli.main(changed(flags, "--seed", seed, "--out", str(tmp_path / name))) == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "b") != weights(tmp_path / "c")
    capsys.readouterr()
    assert cli.main(flags) == 0
    assert "finished already" in capsys.readouterr().err
    assert cli.main(changed(flags, "--epochs", "2")) == 2
    assert "another configuration (epochs is 1.0 there, 2.0 here)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "{tmp}/nothing.jsonl"], "{tmp}/nothing.jsonl: no such file"),
        (["--data", "{tmp}/empty.jsonl"], "{tmp}/empty.jsonl: holds no preferences"),
        (
            ["--data", "{tmp}/tied.jsonl"],
            "{tmp}/tied.jsonl: nothing to learn from: 2 prompts whose completions",
        ),
        (["--data", "{tmp}/broken.jsonl"], "{tmp}/broken.jsonl:2: ranks is [1]; it must be 2 whole numbers"),
        (["--data", "{tmp}/role.jsonl"], "{tmp}/role.jsonl:1: messages[0]: role is 'human'"),
        (["--data", "{tmp}/label.jsonl"], "{tmp}/label.jsonl:1: another kind of preference"),
        (["--max-tokens", "5"], "nothing to learn from: 60 prompts whose completions are all tied"),
        (["--model", "{tmp}/mixed"], "{tmp}/mixed: its tokenizer has ids that the model lacks"),
        (["--model", "{tmp}/plain"], "the tokenizer has no chat template"),
        (["--epochs", "0"], "--epochs 0.0: must be a number above 0"),
        (["--batch-prompts", "0"], "--batch-prompts 0: must be at least 1"),
        (["--centring", "-1"], "--centring -1.0: must be at least 0"),
        (["--validation-share", "1"], "--validation-share 1.0: must be at least 0 and below 1"),
        (["--adam-lr", "0"], "--adam-lr 0.0: must be a number above 0"),
        (["--reference", "{tmp}/nothing.jsonl"], "{tmp}/nothing.jsonl: no such file"),
        (["--out", "{tmp}"], "{tmp}: exists and is not a run directory"),
    ],
)
def test_a_mistake_is_one_line_and_touches_nothing(
    more: list[str],
    message: str,
    flags: list[str],
    chat_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = {"prompt": "a", "completions": ["b", "c"], "ranks": [1, 2]}
    write_jsonl(tmp_path / "empty.jsonl", [])
    write_jsonl(
        tmp_path / "tied.jsonl", [{**good, "ranks": [1, 1]}, {"prompt": "b", "chosen": "c", "rejected": "c"}]
    )
    write_jsonl(tmp_path / "broken.jsonl", [good, {**good, "ranks": [1]}])
    write_jsonl(tmp_path / "role.jsonl", [{**good, "prompt": [{"role": "human", "content": "a"}, ASKED]}])
    write_jsonl(tmp_path / "label.jsonl", [{"prompt": "a", "completion": "b", "label": True}])
    for name in ("mixed", "plain"):
        shutil.copytree(chat_run / "model", tmp_path / name)
    tokens = json.loads((tmp_path / "mixed" / "tokenizer.json").read_text())
    extra = {**tokens["added_tokens"][-1], "id": 300, "content": "<|more|>"}
    (tmp_path / "mixed" / "tokenizer.json").write_text(
        json.dumps({**tokens, "added_tokens": [*tokens["added_tokens"], extra]})
    )
    config = json.loads((tmp_path / "plain" / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "plain" / "tokenizer_config.json").write_text(json.dumps(config))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert cli.main(changed(flags, *(text.replace("{tmp}", str(tmp_path)) for text in more))) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("fledge reward: error: ")
    assert printed.count("\n") == 1
    assert message.replace("{tmp}", str(tmp_path)) in printed
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_tokenizer_may_not_change(
    flags: list[str], chat_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(chat_run / "model", model)
    flags = [*changed(flags, "--model", str(model), "--epochs", "0.3"), "--no-controls"]
    assert cli.main(flags) == 0
    (tmp_path / "run" / "summary.json").unlink()
    template = Tokenizer.load(model).chat_template
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": f"{template} "}))
    assert cli.main(flags) == 2
    assert "the tokenizer has changed since this run began" in capsys.readouterr().err


# Adapters.


def test_an_adapter_is_trained_merged_and_scores_the_same(
    flags: list[str], chat_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted too; the trunk's own weights stay, and the offset goes on with the merged model."""
    flags = [*changed(flags, "--lora-rank", "4", "--adam-lr", "0.02", "--epochs", "6"), "--no-controls"]
    process = start(flags)
    wait_for_step(process, tmp_path / "run", 7)
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 130
    assert cli.main(flags) == 0
    assert cli.main(changed(flags, "--out", str(tmp_path / "reference"))) == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "reference")
    assert summary(tmp_path / "run")["accuracy"]["rate"] > 0.8
    adapter, out = tmp_path / "run" / "model", tmp_path / "merged"
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {
        path.name for path in adapter.iterdir()
    }
    assert not (adapter / "model.safetensors").exists()
    merge = ["merge", "--model", str(adapter), "--out", str(out)]
    assert cli.main(merge) == 0
    judge = load_judge(out)
    assert judge.offset == summary(tmp_path / "run")["offset"] != 0
    pairs = [json.loads(line) for line in (tmp_path / "run" / "pairs.jsonl").read_text().splitlines()]
    for pair in pairs[:5]:
        conversation = [
            {"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair["better"]},
        ]  # fmt: skip
        reward = judge.score([conversation])[0]
        assert reward - judge.offset == pytest.approx(pair["reward_better"], abs=1e-3)
    before = load_model(chat_run / "model").model.state_dict()
    after = load_reward_model(out).model.state_dict()
    assert torch.equal(before["embed_tokens.weight"], after["embed_tokens.weight"])
    capsys.readouterr()
    assert cli.main(merge) == 2
    assert "exists already" in capsys.readouterr().err


def test_new_layers_learn_above_an_assistant_that_stays(
    flags: list[str], chat_run: Path, tmp_path: Path
) -> None:
    flags[flags.index("--adam-lr") + 1] = "0.01"
    assert cli.main([*flags, "--new-layers", "1", "--no-controls"]) == 0
    found = summary(tmp_path / "run")
    assert found["accuracy"]["rate"] > 0.9
    before = load_model(chat_run / "model")
    after = load_reward_model(tmp_path / "run" / "model")
    assert after.config.num_hidden_layers == before.config.num_hidden_layers + 1
    for name, weight in before.model.named_parameters():
        if name != "norm.weight":
            torch.testing.assert_close(after.model.get_parameter(name), weight, rtol=0, atol=0)


def test_held_out_files_are_what_is_examined(flags: list[str], preferences: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in preferences.read_text().splitlines()]
    names = sorted({row["prompt"] for row in rows})
    held = set(names[::4])
    train = write_jsonl(tmp_path / "train.jsonl", [row for row in rows if row["prompt"] not in held])
    other = write_jsonl(tmp_path / "other.jsonl", [row for row in rows if row["prompt"] in held])
    flags[flags.index("--data") + 1] = str(train)
    assert cli.main([*flags, "--held-out", str(other), "--no-controls"]) == 0
    found = summary(tmp_path / "run")
    assert (found["prompts"], found["held_out"]) == (len(names) - len(held), len(held))
    assert {
        json.loads(line)["prompt"] for line in (tmp_path / "run/pairs.jsonl").read_text().splitlines()
    } <= held


def test_held_out_prompts_are_not_learned(
    flags: list[str], preferences: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*flags, "--held-out", str(preferences)]) == 2
    assert "60 of its prompts are in --data too" in capsys.readouterr().err
