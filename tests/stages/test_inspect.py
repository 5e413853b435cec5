"""`fledge inspect`: table, page and figures, the same as transformers', and mistakes in one line."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fledge import cli
from fledge.model.checkpoint import save_model
from fledge.model.config import ModelConfig
from fledge.model.transformer import CausalLM
from fledge.tokenizer.bpe import Tokenizer

from .conftest import REFUSAL

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def deep_model(tokenizer_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers of weights large enough that each part of them shows."""
    directory = tmp_path_factory.mktemp("deep")
    tokenizer = Tokenizer.load(tokenizer_directory)
    model = CausalLM(ModelConfig("qwen3", tokenizer.vocab_size, 32, 48, 3, 4, 2, 8, 64))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.25, generator=generator)
    save_model(directory, model, tokenizer, {"stage": "pretrain"}, [tokenizer.eos_id])
    return directory


def inspect(model: Path, out: Path, *flags: str) -> dict[str, Any]:
    file = out / "figures.json"
    more = ["--json", str(file), "--overwrite", "--device", "cpu"]
    assert cli.main(["inspect", "--model", str(model), *flags, *more]) == 0
    value: dict[str, Any] = json.loads(file.read_text())
    return value


def test_a_learned_answer_is_expected(
    chat_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = chat_run / "model"
    flags = ["--chat", "--prompt", "What is fox?"]
    found = inspect(model, tmp_path, *flags, "--answer", REFUSAL, "--top", "3")
    tokenizer = Tokenizer.load(model)
    tokens = found["tokens"]
    answer = [
        token for token in tokens if token["position"] >= len(tokens) - len(tokenizer.encode(REFUSAL)) - 2
    ]
    assert math.exp(answer[2]["logp"]) > 0.9
    assert answer[2]["rank"] == 1
    assert tokens[0]["logp"] is None
    assert all(len(token["top"]) == 3 for token in tokens[1:])
    assert tokenizer.decode([token["id"] for token in tokens]).count(REFUSAL) == 1
    assert "most probable in its place" in capsys.readouterr().out

    made = inspect(model, tmp_path, *flags, "--continue", "40")
    new = [token for token in made["tokens"] if token["made"]]
    assert all(token["rank"] == 1 for token in new), "greedy"
    assert new[-1]["id"] == tokenizer.end_of_turn_id
    capsys.readouterr()
    generate = ["generate", "--model", str(model), *flags, "--temperature", "0", "--max-tokens", "40"]
    assert cli.main(generate) == 0
    written = capsys.readouterr().out.removesuffix("\n")
    assert tokenizer.decode([token["id"] for token in new[:-1]]) == written


def test_the_beginning_of_a_document(base_run: Path, tmp_path: Path) -> None:
    plain = inspect(base_run / "model", tmp_path, "--prompt", "the quick")["tokens"]
    whole = inspect(base_run / "model", tmp_path, "--prompt", "the quick", "--document")["tokens"]
    assert [token["id"] for token in whole[1:]] == [token["id"] for token in plain]
    assert whole[0]["text"] == "<|endoftext|>"
    assert (plain[0]["logp"], whole[1]["logp"] < 0) == (None, True)


def test_hostile_text_neither_steers_the_terminal_nor_the_page(
    base_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "<script>alert(1)</script>\x1b]0;x\x07\r[bold]\u202e<|im_end|>"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    page = tmp_path / "page.html"
    capsys.readouterr()
    found = inspect(base_run / "model", tmp_path, "--prompt", "-", "--html", str(page), "--lens")
    tokenizer = Tokenizer.load(base_run / "model")
    assert tokenizer.decode([token["id"] for token in found["tokens"]]) == text
    assert not any(token["special"] for token in found["tokens"])
    for shown in (capsys.readouterr().out, page.read_text(encoding="utf-8")):
        assert not set(shown) & {"\x1b", "\x07", "\r", "\u202e"}
    assert "<script" not in page.read_text(encoding="utf-8")
    assert "bold" not in "".join(token["text"] for token in found["tokens"] if token["special"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give one text: --prompt TEXT"),
        (["--prompt", "a", "--prompt-file", "b"], "give one text: --prompt TEXT"),
        (["--prompt", "a", "--answer", "b"], "--answer goes with --chat"),
        (["--prompt", "a", "--chat", "--answer", "b", "--continue", "3"], "--answer and --continue"),
        (["--prompt", "a", "--chat", "--document"], "--document and --chat"),
        (["--prompt", "a", "--lens"], "--lens goes with --html"),
        (["--prompt", "a", "--top", "0"], "--top 0: must be at least 1"),
        (["--prompt", "a", "--continue", "-1"], "--continue -1: must be at least 0"),
        (["--prompt", "a", "--html", "{tmp}/old", "--lens"], "{tmp}/old: exists already"),
        (["--prompt", "a", "--html", "{tmp}/x", "--json", "{tmp}/x"], "--html and --json name the same file"),
        (["--prompt", "fox " * 200], "the text has "),
        (["--prompt-file", "{tmp}/bytes"], "{tmp}/bytes:1: not valid UTF-8"),
    ],
)
def test_a_mistake_is_one_line(
    flags: list[str], message: str, base_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old").write_text("mine")
    (tmp_path / "bytes").write_bytes(b"\xff")
    flags = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    capsys.readouterr()
    assert cli.main(["inspect", "--model", str(base_run / "model"), "--device", "cpu", *flags]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("fledge inspect: error: " + message.replace("{tmp}", str(tmp_path)))
    assert printed.count("\n") == 1
    assert (tmp_path / "old").read_text() == "mine"


@pytest.mark.peers
def test_transformers_gives_the_same_figures_for_every_layer(deep_model: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    found = inspect(deep_model, tmp_path, "--prompt", "the quick brown fox 123", "--lens", "--top", "20")
    model = transformers.AutoModelForCausalLM.from_pretrained(deep_model, dtype=torch.float32).eval()
    ids = [token["id"] for token in found["tokens"]]
    with torch.no_grad():
        out = model(torch.tensor([ids]), output_hidden_states=True)
        states = [state[0] for state in out.hidden_states]
        # Theirs is normed already in the last place, and only there.
        layers = [*(model.lm_head(model.model.norm(state)) for state in states[:-1]), out.logits[0]]
    expected = [scores_TV.double().log_softmax(-1) for scores_TV in layers]
    assert len(found["lens"]) == len(expected) == 4
    for row, logps_TV in zip(found["lens"], expected, strict=True):
        for i, place in enumerate(row["after"]):
            compare(place, logps_TV[i], ids[i + 1] if i + 1 < len(ids) else None)
    for i, token in enumerate(found["tokens"][1:]):
        compare(token, expected[-1][i], ids[i + 1])
    compare({**found["next"], "logp": None}, expected[-1][-1], None)


def compare(place: dict[str, Any], logps_V: torch.Tensor, actual: int | None) -> None:
    top = logps_V.topk(20)
    assert [candidate["logp"] for candidate in place["top"]] == pytest.approx(top.values.tolist(), abs=1e-4)
    for candidate in place["top"]:
        assert candidate["logp"] == pytest.approx(float(logps_V[candidate["id"]]), abs=1e-4)
    entropy = float(-(logps_V.exp() * logps_V).sum()) / math.log(2)
    assert place["entropy_bits"] == pytest.approx(entropy, abs=1e-4)
    if actual is not None:
        assert place["logp"] == pytest.approx(float(logps_V[actual]), abs=1e-4)
        assert place["rank"] == 1 + int((logps_V > logps_V[actual]).sum())
