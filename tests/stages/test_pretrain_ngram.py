"""`fledge pretrain --model-type ngram`: the same mixture counted, and the verbs that use such a model."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

import fledge.train.counting
from fledge import cli
from fledge.model.ngram import load_ngram
from fledge.tokenizer.bpe import Tokenizer

from .commands import changed, metrics, snapshot, summary, weights
from .conftest import WORDS

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def flags(corpus: Path, tokenizer_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    data = [f"words={corpus / 'words.txt'}:0.9", f"numbers={corpus / 'numbers.jsonl'}:0.1"]
    out = tmp_path_factory.mktemp("ngram") / "run"
    return [
        "pretrain", "--model-type", "ngram", "--order", "3", "--data", *data, "--tokenizer",
        str(tokenizer_directory), "--out", str(out), "--validation-share", "0.1", "--context", "128",
        "--row-tokens", "64", "--prompts", "the quick",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(flags: list[str]) -> Path:
    assert cli.main(flags) == 0
    return Path(flags[flags.index("--out") + 1])


def test_the_words_are_counted(run: Path) -> None:
    """Every word is one of 19 at random: no model can do better than their entropy, this one nearly does."""
    model, tokenizer = load_ngram(run / "model"), Tokenizer.load(run / "model")
    (row,) = metrics(run)
    bits = summary(run)["bits_per_byte"]
    assert bits == {name: row[f"validation/{name}"] for name in ("words", "numbers")}
    assert row["validation"] == pytest.approx(0.9 * bits["words"] + 0.1 * bits["numbers"])
    text_bits = math.log2(19) / np.mean([len(f" {word}") for word in WORDS])
    assert text_bits * 0.95 < bits["words"] < text_bits * 1.25
    (start,) = model.probabilities(np.array([[-1, tokenizer.eos_id]]))
    assert 0 < start[tokenizer.encode("the")[0]] < 0.2
    assert summary(run)["parameters"] == model.num_parameters()
    lineage = json.loads((run / "model" / "lineage.json").read_text())
    assert lineage["tokens"] == row["tokens"] == summary(run)["tokens"]
    assert set(lineage["data"]) == {"words", "numbers"}
    sample = json.loads((run / "samples.jsonl").read_text())
    assert sample["prompt"] == "the quick"


def test_a_finished_run_is_left_and_a_broken_one_made_again(
    run: Path, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(run)
    assert cli.main(flags) == 0
    assert "finished already" in capsys.readouterr().err
    assert snapshot(run) == before
    copy = tmp_path / "run"
    shards = ("--shards", str(run.parent / "shards"))
    assert cli.main(changed(flags, "--out", str(copy), *shards)) == 0
    (copy / "summary.json").unlink()
    shutil.rmtree(copy / "model")
    assert cli.main(changed(flags, "--out", str(copy), *shards)) == 0
    assert weights(copy) == weights(run)
    assert metrics(copy) == metrics(run)
    assert (copy / "samples.jsonl").read_text() == (run / "samples.jsonl").read_text()


def test_generate_evaluate_and_inspect_use_it(
    run: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(run / "model")]
    generate = ["generate", *model, "--prompt", "the quick", "--max-tokens", "20"]
    texts = []
    for more in (["--temperature", "0"], ["--seed", "1"], ["--seed", "1"], ["--seed", "2"]):
        capsys.readouterr()
        assert cli.main([*generate, *more]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[1] == texts[2] != texts[3]
    assert {word for text in texts for word in text.split()[:-1]} <= set(WORDS), "what follows a word is one"

    evaluate = ["evaluate", *model, "--data", f"words={corpus / 'words.txt'}", "--held-out", "0.1"]
    flags = ["--window-tokens", "64", "--out", str(tmp_path / "evaluation"), "--compute", "fp32"]
    assert cli.main([*evaluate, *flags]) == 0
    found = summary(tmp_path / "evaluation")["bits_per_byte"]["words"]
    assert found == pytest.approx(summary(run)["bits_per_byte"]["words"], rel=1e-6)

    file = tmp_path / "figures.json"
    assert (
        cli.main(["inspect", *model, "--prompt", "the quick fox", "--json", str(file), "--top", "400"]) == 0
    )
    tokens = json.loads(file.read_text())["tokens"]
    ids = [token["id"] for token in tokens]
    for i, token in enumerate(tokens[1:], start=1):
        context = [-1, *ids][i - 1 : i + 1]
        (p,) = load_ngram(run / "model").probabilities(np.array([context]))
        assert token["logp"] == pytest.approx(math.log(p[token["id"]]), abs=1e-5)
        assert math.fsum(math.exp(candidate["logp"]) for candidate in token["top"]) == pytest.approx(1.0)


def test_a_text_that_memory_cannot_hold_is_refused(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fledge.train.counting, "free_bytes", lambda device: 1000.0)
    assert cli.main(changed(flags, "--out", str(tmp_path / "run"))) == 2
    assert "leave out sources, or train a model instead" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model").exists()


def test_what_has_no_meaning_is_said(
    run: Path, flags: list[str], tokenizer_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, model = str(tmp_path / "run"), ["--model", str(run / "model")]
    shards = ("--shards", str(run.parent / "shards"))
    assert cli.main(changed(flags, "--out", out, "--layers", "4", "--minutes", "1", *shards)) == 0
    printed = capsys.readouterr().err
    assert "without a meaning for an n-gram model: --minutes, --layers\n" in printed
    html = str(tmp_path / "a.html")
    for command, message in (
        (["inspect", *model, "--prompt", "a", "--lens", "--html", html], "--lens has no meaning"),
        (
            ["generate", *model, "--prompt", "a", "--weights", "bf16"],
            "--weights and --quantize have no meaning",
        ),
        (["sft", *model, "--data", "a", "--out", out + "2"], "model_type 'ngram' is not supported"),
        (changed(flags, "--model-type", "qwen3", "--out", out + "2"), "--order goes with --model-type ngram"),
        (changed(flags, "--order", "0", "--out", out + "2"), "--order 0: must be at least 1"),
    ):
        assert cli.main(command) == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.count("\n") == 1
