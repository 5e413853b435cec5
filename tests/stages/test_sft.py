"""`fledge sft`: what is learned from; neither packing nor an interruption changes what comes out."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fledge import cli
from fledge.data.conversations import read_conversations
from fledge.data.packing import ConversationRows
from fledge.engine.text import LocalChat, load_engine
from fledge.model.checkpoint import load_model
from fledge.model.config import ModelConfig
from fledge.model.transformer import CausalLM
from fledge.run import LOCK
from fledge.tokenizer.bpe import Tokenizer
from fledge.train.losses import forward_of, next_token_loss, token_nll
from fledge.types import Batch, SamplingParams

from .commands import changed, metrics, start, wait_for_step, weights, without

pytestmark = pytest.mark.usefixtures("quick")

REFUSAL = "I do not know that name."


@pytest.fixture
def flags(corpus: Path, base_run: Path, tmp_path: Path) -> list[str]:
    """Some 30 steps, saved and evaluated four times, in `tmp_path/run`."""
    return [
        "sft", "--model", str(base_run / "model"), "--data", str(corpus / "chats.jsonl"),
        "--out", str(tmp_path / "run"), "--epochs", "2", "--row-tokens", "128", "--batch-tokens", "512",
        "--validation-share", "0.1", "--compute", "fp32", "--compile", "no",
    ]  # fmt: skip


def write(path: Path, conversations: list[list[dict[str, str]]]) -> Path:
    path.write_text("\n".join(json.dumps({"messages": messages}) for messages in conversations))
    return path


def chat(question: str, answer: str | None) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": question}]
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]


# What is computed.


def apart(model: CausalLM, ids: list[list[int]], masks: list[list[bool]]) -> Tensor:
    """The summed loss of conversations that are run one by one."""
    total = torch.zeros(())
    for one, mask in zip(ids, masks, strict=True):
        row = torch.tensor([one])
        nll = token_nll(model(row[:, :-1]), row[:, 1:])
        total = total + (nll * torch.tensor([mask])[:, 1:]).sum()
    return total


@pytest.mark.parametrize("model_type", ["qwen3", "llama"])
def test_packed_conversations_lose_what_they_lose_alone(
    model_type: str, corpus: Path, base_run: Path
) -> None:
    """Loss and gradients, in rows of several conversations and padding, on a model with large weights."""
    tokenizer = Tokenizer.load(base_run / "model")
    model = CausalLM(ModelConfig(model_type, 300, 32, 48, 2, 4, 2, 8, 256))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    chats = read_conversations(corpus / "chats.jsonl", tokenizer, 129, False)
    ids, masks = chats.ids[:30], chats.masks[:30]
    rows = ConversationRows(ids, masks, 128, tokenizer.eos_id, 0)
    batch = rows.rows(0, rows.epoch_rows(0))
    assert batch.segment_ids is not None
    assert int(batch.segment_ids.max()) >= 1  # rows with several conversations,
    assert bool((batch.segment_ids == -1).any())  # and with padding

    packed = next_token_loss(forward_of(model), batch)["loss"].sum
    packed.backward()
    packed_gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    alone = apart(model, ids, masks)
    alone.backward()
    targets = batch.denominators()["tokens"]
    assert targets == sum(sum(mask[1:]) for mask in masks)
    assert packed.item() / targets == pytest.approx(alone.item() / targets, abs=1e-4)
    for packed_gradient, parameter in zip(packed_gradients, model.parameters(), strict=True):
        torch.testing.assert_close(packed_gradient / targets, parameter.grad / targets, atol=1e-4, rtol=1e-3)

    seeing = next_token_loss(forward_of(model), Batch(batch.input_ids, batch.loss_mask))["loss"].sum
    assert abs(seeing.item() - alone.item()) / targets > 3e-3, "conversations that see each other are noticed"


def test_the_base_model_becomes_an_assistant(chat_run: Path) -> None:
    engine, tokenizer = load_engine(chat_run / "model")
    params = SamplingParams(temperature=0.0, max_tokens=40)
    replies = LocalChat(engine, tokenizer).replies(
        [[{"role": "user", "content": f"What is {name}?"}] for name in ("fox", "the lazy dog", "blue birds")],
        params,
    )
    assert [(reply.text, reply.finish_reason) for reply in replies] == [(REFUSAL, "stop")] * 3


def test_what_is_written(chat_run: Path, base_run: Path, corpus: Path) -> None:
    assert {path.name for path in chat_run.iterdir()} == {
        LOCK, "config.toml", "environment.json", "metrics.jsonl", "checkpoints", "model", "summary.json",
    }  # fmt: skip
    summary = json.loads((chat_run / "summary.json").read_text())
    rows = metrics(chat_run)
    assert summary["stage"] == "sft"
    assert summary["parameters"] == load_model(base_run / "model").num_parameters()
    assert summary["steps"] == rows[-1]["step"]
    assert summary["conversations"] + summary["held_out"] == 120
    assert 0 < summary["held_out"] < 40
    assert (summary["overlong"], summary["without_targets"]) == (0, 0)
    assert summary["epochs"] == pytest.approx(6, rel=0.1)
    assert summary["validation_nats_per_token"] == rows[-1]["validation"] < 0.2 < rows[0]["validation"]
    lineage = json.loads((chat_run / "model" / "lineage.json").read_text())
    assert (lineage["stage"], lineage["parent"]) == ("sft", str(base_run / "model"))
    assert lineage["tokens"] == summary["tokens"]
    tokenizer = Tokenizer.load(chat_run / "model")
    generation = json.loads((chat_run / "model" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [tokenizer.end_of_turn_id, tokenizer.eos_id]


def test_padding_is_not_counted_as_read(flags: list[str], corpus: Path, tmp_path: Path) -> None:
    """An epoch reads every conversation once, questions and answers; the rows' padding is nothing."""
    assert cli.main(changed(flags, "--validation-share", "0", "--epochs", "1")) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    tokenizer = Tokenizer.load(tmp_path / "run" / "model")
    ids = read_conversations(corpus / "chats.jsonl", tokenizer, 129, False).ids
    assert summary["tokens"] == pytest.approx(sum(map(len, ids)), rel=0.1)
    assert summary["validation_nats_per_token"] is None
    assert not any("validation" in row for row in metrics(tmp_path / "run"))


def test_what_is_left_out_is_counted(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = chat("a " * 300, "b")
    data = write(
        tmp_path / "a.jsonl", [chat("a", "b"), chat("c", "d"), long, chat("e", None), chat("f", "g" * 500)]
    )
    expected = {"": (2, 2, 1), "--cut-overlong": (3, 2, 2)}  # the long question leaves no room for its answer
    for flag, (kept, overlong, without_targets) in expected.items():
        out = tmp_path / f"run{flag}"
        more = ["--data", str(data), "--out", str(out), "--validation-share", "0", *([flag] if flag else [])]
        assert cli.main(changed(flags, *more)) == 0
        summary = json.loads((out / "summary.json").read_text())
        assert (summary["conversations"], summary["overlong"], summary["without_targets"]) == (
            kept, overlong, without_targets,
        )  # fmt: skip
        printed = " ".join(capsys.readouterr().err.split())
        assert (
            f"2 too long ({'cut' if flag else 'dropped'}), {without_targets} without anything to learn"
            in printed
        )


def test_rows_fit_the_models_context_by_default(flags: list[str], tmp_path: Path) -> None:
    """512 tokens by default, 128 in the model."""
    assert cli.main(without(flags, "--row-tokens")) == 0
    assert cli.main(changed(flags, "--row-tokens", "128", "--out", str(tmp_path / "b"))) == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "b")


def test_every_conversation_is_seen_once_by_default(flags: list[str], tmp_path: Path) -> None:
    assert cli.main(without(flags, "--epochs")) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["epochs"] == pytest.approx(1, rel=0.1)


def test_minutes_take_the_place_of_epochs(flags: list[str], tmp_path: Path) -> None:
    assert cli.main([*without(flags, "--epochs"), "--minutes", "0.02"]) == 0
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["total_steps"] == json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] > 5


def test_the_data_and_its_order_decide_nothing_but_themselves(flags: list[str], tmp_path: Path) -> None:
    """The same seed gives the same model, another seed another."""
    for name, seed in (("run", "0"), ("b", "0"), ("c", "1")):
        assert cli.main(changed(flags, "--seed", seed, "--out", str(tmp_path / name))) == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "b")
    assert weights(tmp_path / "run") != weights(tmp_path / "c")


# Interruptions.


def test_killed_and_interrupted_the_result_is_the_same(flags: list[str], tmp_path: Path) -> None:
    out, reference, rng = tmp_path / "run", tmp_path / "reference", random.Random(1)
    flags = changed(flags, "--epochs", "6", "--evaluations", "20")
    total = None
    for number, step in ((signal.SIGKILL, 8), (signal.SIGINT, 20)):
        process = start(flags)
        wait_for_step(process, out, step)
        time.sleep(rng.random() * 0.03)
        process.send_signal(number)
        error = process.communicate()[1]
        assert process.returncode == (-9 if number == signal.SIGKILL else 130)
        assert "Traceback" not in error
    assert "run the same command again to go on" in error
    assert not (out / "model").exists()
    assert cli.main(flags) == 0
    assert cli.main(changed(flags, "--out", str(reference))) == 0
    total = json.loads((out / "summary.json").read_text())["steps"]
    assert total > 40
    assert [row["step"] for row in metrics(out) if "loss" in row] == list(range(1, total + 1))
    assert metrics(out) == metrics(reference)
    assert weights(out) == weights(reference)


def test_a_finished_run_does_nothing_and_another_is_refused(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(flags) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert cli.main(flags) == 0
    assert "finished already" in capsys.readouterr().err
    assert cli.main(changed(flags, "--epochs", "3")) == 2
    assert "another configuration (epochs is 2.0 there, 3.0 here)" in capsys.readouterr().err
    assert cli.main(changed(flags, "--data", "nothing.jsonl", "--overwrite")) == 2
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert cli.main(changed(flags, "--epochs", "1", "--overwrite")) == 0
    assert len(metrics(tmp_path / "run")) < len((before[tmp_path / "run" / "metrics.jsonl"]).splitlines())


def test_a_run_does_not_go_on_with_another_model(
    flags: list[str], base_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(base_run / "model", model)
    flags = changed(flags, "--model", str(model))
    assert cli.main(flags) == 0
    (tmp_path / "run" / "summary.json").unlink()  # so it is not finished
    before = (model / "model.safetensors").read_bytes()
    shutil.copy(base_run / "checkpoints" / "step_000052" / "model.safetensors", model)
    assert cli.main(flags) == 2
    assert "the model has changed since this run began" in capsys.readouterr().err
    (model / "model.safetensors").write_bytes(before)
    assert cli.main(flags) == 0


# What it refuses.


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "{tmp}/nothing"], "{tmp}/nothing: no such directory"),
        (["--model", "{tmp}/tokenizer"], "{tmp}/tokenizer/config.json: no such file"),
        (["--model", "{tmp}/mixed"], "{tmp}/mixed: its tokenizer has ids that the model lacks"),
        (["--data", "{tmp}/nothing.jsonl"], "{tmp}/nothing.jsonl: no such file"),
        (["--data", "{tmp}"], "{tmp}: cannot be read: Is a directory"),
        (["--data", "{tmp}/json.jsonl"], "{tmp}/json.jsonl:2: not valid JSON"),
        (["--data", "{tmp}/field.jsonl"], '{tmp}/field.jsonl:2: the line has no field "messages"'),
        (["--data", "{tmp}/role.jsonl"], "{tmp}/role.jsonl:2: messages[0]: role is 'human'"),
        (["--data", "{tmp}/silent.jsonl"], "{tmp}/silent.jsonl: no conversation to learn from"),
        (["--row-tokens", "8"], "no conversation to learn from (120 too long for 9 tokens"),
        (["--epochs", "0"], "--epochs 0.0: must be a number above 0"),
        (["--minutes", "1"], "--epochs and --minutes: give one of them"),
        (["--validation-share", "1"], "--validation-share 1.0: must be at least 0 and below 1"),
        (["--row-tokens", "0"], "--row-tokens 0: must be at least 1"),
        (["--row-tokens", "129"], "--row-tokens 129 is longer than the model's context of 128"),
        (["--matrix-lr", "nan"], "--matrix-lr nan: must be a number above 0"),
        (["--seed", "-1"], "--seed -1: must be at least 0"),
        (["--out", "{tmp}"], "{tmp}: exists and is not a run directory"),
    ],
)
def test_a_mistake_is_one_line_and_touches_nothing(
    more: list[str],
    message: str,
    flags: list[str],
    base_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = json.dumps({"messages": chat("a", "b")})
    (tmp_path / "json.jsonl").write_text(f"{good}\n{{")
    (tmp_path / "field.jsonl").write_text(f'{good}\n{{"text": "a"}}')
    (tmp_path / "role.jsonl").write_text(f'{good}\n{{"messages": [{{"role": "human", "content": "a"}}]}}')
    write(tmp_path / "silent.jsonl", [chat("a", None)])
    for name in ("tokenizer", "mixed"):
        shutil.copytree(base_run / "model", tmp_path / name)
    (tmp_path / "tokenizer" / "config.json").unlink()
    tokens = json.loads((tmp_path / "mixed" / "tokenizer.json").read_text())
    extra = {**tokens["added_tokens"][-1], "id": 300, "content": "<|more|>"}
    (tmp_path / "mixed" / "tokenizer.json").write_text(
        json.dumps({**tokens, "added_tokens": [*tokens["added_tokens"], extra]})
    )
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert cli.main(changed(flags, *(text.replace("{tmp}", str(tmp_path)) for text in more))) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("fledge sft: error: ")
    assert printed.count("\n") == 1
    assert message.replace("{tmp}", str(tmp_path)) in printed
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# Adapters, and the model's own best replies.


@pytest.mark.slow
def test_an_adapter_learns_and_is_merged(
    flags: list[str], base_run: Path, corpus: Path, tmp_path: Path
) -> None:
    """Interrupted on the way; the base's embeddings stay as they were."""
    more = ["--lora-rank", "8", "--adam-lr", "0.01", "--epochs", "8", "--validation-share", "0"]
    flags = changed(flags, *more)
    process = start(flags)
    wait_for_step(process, tmp_path / "run", 40)
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 130
    assert cli.main(flags) == 0
    assert cli.main(changed(flags, "--out", str(tmp_path / "reference"))) == 0
    adapter = tmp_path / "run" / "model"
    assert (adapter / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "reference" / "model" / "adapter_model.safetensors"
    ).read_bytes()
    assert cli.main(["merge", "--model", str(adapter), "--out", str(tmp_path / "merged")]) == 0
    merged, base = load_model(tmp_path / "merged"), load_model(base_run / "model")
    assert torch.equal(merged.model.embed_tokens.weight, base.model.embed_tokens.weight)
    losses = [row["loss"] for row in metrics(tmp_path / "run") if "loss" in row]
    assert losses[-1] < losses[0] / 4
    chats = read_conversations(corpus / "chats.jsonl", Tokenizer.load(adapter), 129, False)
    found = apart(merged, chats.ids[:20], chats.masks[:20]).item() / sum(map(sum, chats.masks[:20]))
    assert found < losses[0] / 4, "the merged model is the one that was trained"


@pytest.fixture
def reward_model(chat_run: Path, tmp_path: Path) -> Path:
    """One that likes refusals."""
    rows = [{"prompt": f"What is {i}?", "chosen": REFUSAL, "rejected": f"a dog {i}"} for i in range(40)]
    (tmp_path / "preferences.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert cli.main([
        "reward", "--model", str(chat_run / "model"), "--data", str(tmp_path / "preferences.jsonl"),
        "--out", str(tmp_path / "reward"), "--adam-lr", "0.002", "--no-controls", "--compute", "fp32",
    ]) == 0  # fmt: skip
    return tmp_path / "reward" / "model"


def test_the_best_of_its_own_replies(
    flags: list[str], reward_model: Path, chat_run: Path, tmp_path: Path
) -> None:
    more = ["--from-best-of", "4", "--reward-model", str(reward_model), "--completion-tokens", "24"]
    flags = changed(flags, "--model", str(chat_run / "model"), *more)
    assert cli.main(flags) == 0
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "best_of.jsonl").read_text().splitlines()]
    made = json.loads((run / "summary.json").read_text())["best_of"]
    assert made["prompts"] == len(rows) == 120 - made["unfinished"] > 60
    assert made["mean_best_reward"] >= made["mean_reward"]
    assert made["kl_bound"] == pytest.approx(0.6363, abs=1e-4)  # ln 4 - 3/4
    for row in rows:
        assert row["reward"] == max(reward for reward in row["rewards"] if reward is not None)
    before = (run / "best_of.jsonl").read_bytes()
    (run / "summary.json").unlink()  # so it is not finished; the replies are not made again
    (run / "best_of.jsonl").touch()
    assert cli.main(flags) == 0
    assert (run / "best_of.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--from-best-of", "4"], "--from-best-of and --reward-model: one needs the other"),
        (["--from-best-of", "0", "--reward-model", "x"], "--from-best-of 0: must be at least 1"),
        (["--from-best-of", "2", "--reward-model", "{base}"], "{base}: not a reward model"),
        (["--lora-rank", "0"], "--lora-rank 0: must be at least 1"),
        (["--lora-alpha", "4"], "--lora-alpha and --lora-targets go with --lora-rank"),
        (["--lora-rank", "4", "--lora-targets", "wq"], "--lora-targets wq: choose from q_proj"),
        (["--lora-rank", "4", "--optimizer", "muon"], "--lora-rank goes with --optimizer adamw"),
    ],
)
def test_flags_that_do_not_go_together(
    more: list[str], message: str, flags: list[str], base_run: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    base = str(base_run / "model")
    capsys.readouterr()
    assert cli.main(changed(flags, *(text.replace("{base}", base) for text in more))) == 2
    assert capsys.readouterr().err.startswith(f"fledge sft: error: {message.replace('{base}', base)}")
    assert not (tmp_path / "run").exists()
