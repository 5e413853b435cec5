"""`fledge generate` with a search: its texts on stdout, what is known of them on stderr."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fledge.cli import main
from fledge.model.checkpoint import save_model
from fledge.model.config import ModelConfig
from fledge.model.transformer import CausalLM
from fledge.tokenizer.bpe import train_bpe

from ..models import save_chain_model

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("search") / "model"
    tokenizer = train_bpe(["aa"], 265)
    network = CausalLM(ModelConfig("qwen3", tokenizer.vocab_size, 16, 16, 1, 2, 1, 8, 64))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    directory.mkdir()
    save_model(directory, network, tokenizer, {"stage": "pretrain"}, [tokenizer.eos_id])
    return directory


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("search") / "chain"
    save_chain_model(directory, train_bpe(["aa"], 265), "Ok, yes:é!", context=64)
    return directory


def run(model: Path, *flags: str) -> int:
    return main(["generate", "--model", str(model), "--prompt", "a", *flags])


def test_beams_print_the_best_texts_and_their_scores(random_model: Path, capsys: Capture) -> None:
    flags = ["--beams", "3", "--n", "2", "--choices", "cat", "dog", "bird"]
    assert run(random_model, *flags, "--length-penalty", "0", "--early-stopping", "never") == 0
    printed = capsys.readouterr()
    texts = printed.out.splitlines()
    assert len(set(texts)) == 2 and set(texts) <= {"cat", "dog", "bird"}
    scores = [float(score) for score in re.findall(r"score (-[\d.]+)", printed.err)]
    logps = [float(logp) for logp in re.findall(r"log-probability (-[\d.]+)", printed.err)]
    assert scores == logps == sorted(logps, reverse=True)
    # The exact answer is the wide beam's, and has a certificate.
    assert run(random_model, *flags[4:], "--strategy", "exact") == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == texts[:1]
    assert f"log-probability {logps[0]:.3f}" in printed.err and "certified, no whole text" in printed.err


def test_stochastic_beams_change_with_the_seed(random_model: Path, capsys: Capture) -> None:
    seen = set()
    for seed in ("1", "1", "2"):
        flags = ["--beams", "2", "--n", "2", "--stochastic", "--seed", seed, "--max-tokens", "5"]
        assert run(random_model, *flags) == 0
        seen.add(capsys.readouterr().out)
    assert len(seen) == 2


def test_a_chat_answer_is_searched_for(chain: Path, capsys: Capture) -> None:
    for flags in (["--beams", "2"], ["--strategy", "exact"]):
        assert run(chain, "--chat", *flags) == 0
        assert capsys.readouterr().out == "Ok, yes:é!\n"


def test_what_is_not_certified_has_a_gap(random_model: Path, capsys: Capture) -> None:
    flags = ["--strategy", "exact", "--max-expansions", "1", "--regex", "[a-z]{3,6}"]
    assert run(random_model, *flags) == 0
    assert re.search(r"1 expansions: not certified, .* up to [\d.]+ nats", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--stochastic", "--stochastic goes with --beams"),
        ("--length-penalty 1", "--length-penalty goes with --beams"),
        ("--early-stopping never", "--early-stopping goes with --beams"),
        ("--max-expansions 5", "--max-expansions goes with --strategy exact"),
        ("--beams 2 --max-seconds 5", "--max-seconds goes with --strategy exact"),
        ("--beams 2 --n 3", "more than the 2 beams"),
        ("--beams 2 --temperature 0", "greedy"),
        ("--beams 2 --top-p 0.5", "top_p is for sampling"),
        ("--beams 2 --stop x", "stop strings"),
        ("--beams 2 --show-logprobs 3", "--show-logprobs 0"),
        ("--beams 2 --best-of 2", "--best-of"),
        ("--beams 2 --batch x.jsonl --out y.jsonl", "--batch"),
        ("--beams 2 --stochastic --length-penalty 2", "length_penalty"),
        ("--strategy exact --length-penalty 1", "a prefix's bounds nothing"),
        ("--strategy exact --beams 2", "--strategy exact goes without --beams"),
        ("--strategy exact --temperature 0.5", "temperature does not go with exact search"),
        ("--strategy exact --repetition-penalty 1.5", "repetition_penalty does not go with exact search"),
        ("--strategy exact --n 2", "n does not go with exact search"),
        ("--strategy exact --max-expansions 0", "max_expansions 0 is below 1"),
    ],
)
def test_flags_that_do_not_go_together(flags: str, says: str, random_model: Path, capsys: Capture) -> None:
    assert run(random_model, *flags.split()) == 2
    assert says in capsys.readouterr().err
