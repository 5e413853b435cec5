"""`fledge generate`: the text and nothing else on stdout, from any kind of prompt."""

from __future__ import annotations

import io
import itertools
import sys
from pathlib import Path

import pytest
import torch

from fledge.cli import main
from fledge.model.checkpoint import save_model
from fledge.model.config import ModelConfig
from fledge.model.transformer import CausalLM
from fledge.tokenizer.bpe import Tokenizer, train_bpe

Capture = pytest.CaptureFixture[str]


def save_chain_model(directory: Path, tokenizer: Tokenizer, text: str) -> None:
    """A model that writes `text` (all characters different) after a line break; else it ends its turn."""
    size, ids = tokenizer.vocab_size, tokenizer.encode("\n" + text)
    assert len(set(ids)) == len(ids)
    model = CausalLM(ModelConfig("llama", size, size, 4, 1, 1, 1, 4, 64, tie_word_embeddings=False))
    assert tokenizer.end_of_turn_id is not None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0 if parameter.ndim == 1 else 0.0)
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight[tokenizer.end_of_turn_id] = 10.0
        for before, after in itertools.pairwise(ids):
            model.lm_head.weight[after, before] = 20.0
    directory.mkdir()
    save_model(directory, model, tokenizer, {"stage": "sft"}, [tokenizer.end_of_turn_id, tokenizer.eos_id])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("generate") / "model"
    save_chain_model(directory, train_bpe(["aa"], 265), "Ok, yes:é🙂!")
    return directory


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("generate") / "model"
    tokenizer = train_bpe(["aa"], 265)
    network = CausalLM(ModelConfig("qwen3", tokenizer.vocab_size, 16, 16, 1, 2, 1, 8, 64))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(0))
    directory.mkdir()
    save_model(directory, network, tokenizer, {"stage": "pretrain"}, [tokenizer.eos_id])
    return directory


def run(model: Path, *flags: str) -> int:
    return main(["generate", "--model", str(model), *flags])


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)


@pytest.mark.parametrize("tty", [False, True])
def test_only_the_text_is_on_stdout(
    model: Path, tty: bool, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tty:
        terminal(monkeypatch)
    assert run(model, "--prompt", "Well?\n", "--temperature", "0") == 0
    printed = capsys.readouterr()
    assert printed.out == "Ok, yes:é🙂!\n"
    assert "tokens/s" in printed.err and "1 at their end" in printed.err


def test_a_prompt_becomes_a_users_turn(model: Path, capsys: Capture) -> None:
    # Without --chat the model sees a question mark last, and ends.
    assert run(model, "--prompt", "Well?", "--temperature", "0") == 0
    assert capsys.readouterr().out == "\n"
    assert run(model, "--prompt", "Well?", "--temperature", "0", "--chat") == 0
    assert capsys.readouterr().out == "Ok, yes:é🙂!\n"


def test_prompts_from_stdin_and_file(
    model: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"a file\r\n\r\n")  # its last line break is the editor's, the other one is the prompt's
    stdin(monkeypatch, b"from a pipe\n\n")
    flags = ["--prompt", "-", "x", "--prompt-file", str(file)]
    assert run(model, *flags, "--temperature", "0") == 0
    printed = capsys.readouterr()
    assert printed.out == "Ok, yes:é🙂!\n\nOk, yes:é🙂!\n"
    assert "--- 1 of 3: from a pipe" in printed.err and "--- 3 of 3: a file" in printed.err


@pytest.mark.parametrize("tty", [False, True])
def test_stop_strings_and_length(
    model: Path, tty: bool, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tty:
        terminal(monkeypatch)
    assert run(model, "--prompt", "\n", "--stop", "s:", ":é", "--temperature", "0") == 0
    assert capsys.readouterr().out == "Ok, ye\n"
    assert run(model, "--prompt", "\n", "--max-tokens", "3", "--temperature", "0") == 0
    printed = capsys.readouterr()
    assert printed.out == "Ok,\n"
    assert "3 tokens" in printed.err and "1 at --max-tokens" in printed.err


def test_seeds(random_model: Path, capsys: Capture) -> None:
    def made(*flags: str) -> str:
        assert run(random_model, "--prompt", "a", "--max-tokens", "8", *flags) == 0
        return capsys.readouterr().out

    assert made() == made("--seed", "0") != made("--seed", "1")
    assert made("--top-k", "1") == made("--temperature", "0") == made("--top-p", "0.001", "--seed", "3")
    assert len(made("--n", "3")) > len(made())
    assert made("--n", "3").startswith(made())


def test_n_texts_are_different(random_model: Path, capsys: Capture) -> None:
    assert run(random_model, "--prompt", "a", "--n", "6", "--max-tokens", "4", "--stop", "\n") == 0
    assert "--- 6 of 6: a" in capsys.readouterr().err


def test_an_empty_prompt_starts_a_document(random_model: Path, capsys: Capture) -> None:
    assert run(random_model, "--prompt", "", "--max-tokens", "3", "--temperature", "0") == 0
    assert "3 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("tty", [False, True])
def test_a_model_does_not_control_the_terminal(
    tty: bool, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_chain_model(tmp_path / "model", train_bpe(["aa"], 265), "a\x1b]0;p\x07\x9b2J\tb")
    if tty:
        terminal(monkeypatch)
    for more in ([], ["--n", "2"]):  # streamed on a terminal, and not
        assert run(tmp_path / "model", "--prompt", "\x1b[2J\n", "--temperature", "0", *more) == 0
        printed = capsys.readouterr()
        clean = "a]0;p2J\tb\n" if tty else "a\x1b]0;p\x07\x9b2J\tb\n"
        assert printed.out == clean * (2 if more else 1)
        assert "\x1b" not in printed.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to continue"),
        (["--prompt", "-", "-"], "given twice"),
        (["--prompt-file", "FOLDER/nothing.txt"], "nothing.txt: cannot read the prompt"),
        (["--prompt-file", "FOLDER"], "cannot read the prompt: Is a directory"),
        (["--prompt-file", "FOLDER/latin.txt"], "latin.txt:2: not valid UTF-8"),
        (["--prompt", "caf\udce9"], "surrogate"),
        (["--prompt", "a" * 65], "text 1 of 1 has 65 tokens, the model's context holds 64"),
        (["--prompt", "a", "--temperature", "-1"], "temperature"),
        (["--prompt", "a", "--top-p", "0"], "top_p"),
        (["--prompt", "a", "--top-k", "0"], "top_k"),
        (["--prompt", "a", "--max-tokens", "0"], "max_tokens"),
        (["--prompt", "a", "--stop", ""], "stop string is empty"),
        (["--prompt", "a", "--n", "0"], "--n 0"),
        (["--prompt", "a", "--model", "FOLDER/none"], "no such model directory"),
        (["--prompt", "a", "--device", "abacus"], "abacus"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], message: str, model: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "latin.txt").write_bytes("fine\ncafé\n".encode("latin-1"))
    flags = [flag.replace("FOLDER", str(tmp_path)) for flag in flags]
    model_flags = [] if "--model" in flags else ["--model", str(model)]
    assert main(["generate", *model_flags, *flags]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("fledge generate: error: ") and message in printed.err
    assert printed.err.count("\n") == 1


def test_invalid_stdin(model: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, b"one\ntwo\n\xff\n")
    assert run(model, "--prompt=-") == 2
    assert "stdin:3: not valid UTF-8" in capsys.readouterr().err


def test_a_tokenizer_without_a_template(model: Path, tmp_path: Path, capsys: Capture) -> None:
    tokenizer = train_bpe(["aa"], 265)
    save_chain_model(tmp_path / "model", tokenizer, "Ok!")
    tokenizer.chat_template = None
    tokenizer.save(tmp_path / "model")
    assert run(tmp_path / "model", "--prompt", "\n", "--temperature", "0") == 0
    assert capsys.readouterr().out == "Ok!\n"
    assert run(tmp_path / "model", "--prompt", "\n", "--chat") == 2
    assert "no chat template" in capsys.readouterr().err
