"""`fledge generate` with guesses ahead and with rounded weights: the same texts, and what is said of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fledge.cli import main
from fledge.model.checkpoint import save_model
from fledge.model.config import ModelConfig
from fledge.model.ngram import NgramConfig, NgramModel
from fledge.model.transformer import CausalLM
from fledge.tokenizer.bpe import Tokenizer, train_bpe

Capture = pytest.CaptureFixture[str]
GREEDY = ("--temperature", "0", "--max-tokens", "30")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["aa"], 265)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return saved(tmp_path_factory.mktemp("model") / "model", tokenizer, 0)


def saved(directory: Path, tokenizer: Tokenizer, seed: int) -> Path:
    network = CausalLM(ModelConfig("qwen3", tokenizer.vocab_size, 32, 48, 1, 2, 1, 16, 256))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3, generator=generator)
    directory.mkdir()
    save_model(directory, network, tokenizer, {"stage": "pretrain"}, [tokenizer.eos_id])
    return directory


def run(model: Path, *flags: str) -> int:
    return main(["generate", "--model", str(model), "--prompt", "abcabcab", "xyz", *flags])


def test_the_texts_are_the_same_and_the_guesses_are_counted(
    model: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: Capture
) -> None:
    other = saved(tmp_path / "other", tokenizer, 1)
    (tmp_path / "counts").mkdir()
    ids = np.array([tokenizer.eos_id, *tokenizer.encode("abcabcabc")])
    counts = NgramModel.count([ids], tokenizer.eos_id, NgramConfig(tokenizer.vocab_size, 3, 256))
    counts.save(tmp_path / "counts", tokenizer, {}, tokenizer.eos_id)
    assert run(model, *GREEDY) == 0
    plain = capsys.readouterr()
    assert "guessed" not in plain.err
    for flags in (
        ["--speculate", "lookup", "--draft-tokens", "3"],
        ["--draft-model", str(model)],
        ["--draft-model", str(other)],
        ["--draft-model", str(tmp_path / "counts")],
    ):
        assert run(model, *GREEDY, *flags) == 0
        printed = capsys.readouterr()
        assert printed.out == plain.out
        found = re.search(
            r"(\d+%) of [\d,]+ guessed tokens kept, ([\d.]+) tokens a pass, [\d.]+ times as fast as without",
            printed.err,
        )
        assert found is not None
        if flags == ["--draft-model", str(model)]:
            assert found[1] == "100%" and float(found[2]) > 3


def test_a_batch_with_guesses(model: Path, tmp_path: Path, capsys: Capture) -> None:
    rows = [{"prompt": "abab"}, {"prompt": "x", "temperature": 0.7}, {"prompt": "", "max_tokens": 3}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = []
    for name, flags in (("plain", []), ("guessed", ["--draft-model", str(model)])):
        flags += ["--batch", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / name), *GREEDY]
        assert main(["generate", "--model", str(model), *flags]) == 0
        lines = (tmp_path / name).read_text().splitlines()
        texts.append([json.loads(line)["completions"][0]["text"] for line in lines])
    assert texts[0][0] == texts[1][0] and texts[0][2] == texts[1][2]
    assert re.search(r"guessed tokens kept, [\d.]+ tokens a pass\n", capsys.readouterr().err)


def test_rounded_weights_write_text(model: Path, capsys: Capture) -> None:
    for name in ("int8", "int4"):
        assert run(model, *GREEDY, "--quantize", name) == 0
        assert "tokens/s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--draft-tokens 3", "--draft-tokens goes with --speculate lookup or --draft-model"),
        ("--speculate lookup --draft-model {model}", "two ways to guess"),
        ("--speculate lookup --draft-tokens 0", "draft_tokens 0 is below 1"),
        ("--speculate lookup --beams 2", "do not go with --beams"),
        ("--draft-model {model} --strategy exact", "do not go with --beams"),
        ("--draft-model {model}/nowhere", "nowhere"),
        ("--quantize int8 --weights bf16", "two ways to round weights"),
        ("--quantize int8 --strategy exact", "--strategy exact goes with --weights fp32"),
    ],
)
def test_flags_that_do_not_go_together(flags: str, says: str, model: Path, capsys: Capture) -> None:
    assert run(model, *flags.format(model=model).split()) == 2
    assert says in capsys.readouterr().err


def test_a_draft_with_another_tokenizer(model: Path, tmp_path: Path, capsys: Capture) -> None:
    other = saved(tmp_path / "other", train_bpe(["ab" * 9], 266), 1)
    assert run(model, "--draft-model", str(other)) == 2
    assert "a draft needs the model's own tokenizer" in capsys.readouterr().err
