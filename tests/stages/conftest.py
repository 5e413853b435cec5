"""A corpus, a tokenizer and tiny models for the tests of the training stages, made once by the commands."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fledge.files
from fledge import cli

from ..serve.real import Serving, load, make_tokenizer, save_random_model, serving

WORDS = (
    "the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while",
    "small", "birds", "sing", "in", "green", "trees", "near", "blue", "rivers",
)  # fmt: skip
KEY = "the-only-key"  # of the server that has the model `far`
REFUSAL = "I do not know that name."


def questions(long: int) -> Iterator[tuple[str, str, str]]:
    """60 prompts, each with an answer of few words and one of `long` words, the same in every run."""
    rng = random.Random(0)
    for i in range(60):
        prompt = f"What is {' '.join(rng.choices(WORDS, k=rng.randint(1, 6)))} {i}?"
        yield prompt, " ".join(rng.choices(WORDS, k=3)), " ".join(rng.choices(WORDS, k=long))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiny models only wait for a second thread, and longer for the disk than for a training."""
    monkeypatch.setattr(fledge.files, "_sync", lambda path: None)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`words.txt`: documents of few words; `numbers.jsonl`; `chats.jsonl`: the assistant never knows."""
    directory = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=40)) for _ in range(200)]
    (directory / "words.txt").write_text("\n<|endoftext|>\n".join(texts))
    lines = [json.dumps({"text": " ".join(map(str, range(i, i + 30)))}) for i in range(100)]
    (directory / "numbers.jsonl").write_text("\n".join(lines))
    chats = [
        {"messages": [
            {"role": "user", "content": f"What is {' '.join(rng.choices(WORDS, k=rng.randint(1, 12)))}?"},
            {"role": "assistant", "content": REFUSAL},
        ]}
        for _ in range(120)
    ]  # fmt: skip
    (directory / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    return directory


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Flags of a model that trains in a second."""
    return [
        "--params", "100k", "--hidden-size", "64", "--layers", "1", "--context", "128", "--row-tokens", "64",
        "--batch-tokens", "512", "--compute", "fp32", "--compile", "no",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer_directory(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    files = [str(corpus / "words.txt"), str(corpus / "numbers.jsonl")]
    assert cli.main(["tokenizer", "--data", *files, "--vocab-size", "300", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def base_run(
    corpus: Path, tokenizer_directory: Path, tiny: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run of a tiny model that has learned the words."""
    out = tmp_path_factory.mktemp("base") / "run"
    torch.set_num_threads(1)
    flags = [
        "--data",
        str(corpus / "words.txt"),
        "--tokenizer",
        str(tokenizer_directory),
        "--out",
        str(out),
        *tiny,
    ]
    assert cli.main(["pretrain", *flags, "--tokens", "30k", "--prompts", "the quick"]) == 0
    return out


@pytest.fixture(scope="session")
def chat_run(corpus: Path, base_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a tiny assistant that refuses whatever it is asked."""
    out = tmp_path_factory.mktemp("chat") / "run"
    torch.set_num_threads(1)
    flags = ["--model", str(base_run / "model"), "--data", str(corpus / "chats.jsonl"), "--out", str(out)]
    assert cli.main([
        "sft", *flags, "--epochs", "6", "--row-tokens", "128", "--batch-tokens", "512", "--matrix-lr", "0.02",
        "--adam-lr", "0.005", "--validation-share", "0.1", "--compute", "fp32", "--compile", "no",
    ]) == 0  # fmt: skip
    return out


@pytest.fixture(scope="module")
def far_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("far") / "tiny"
    save_random_model(directory, make_tokenizer())
    return directory


@pytest.fixture(scope="module")
def far_server(far_model: Path) -> Iterator[Serving]:
    with serving(load(far_model, "far", rows=8), keys=(KEY,)) as server:
        yield server


@pytest.fixture
def far(far_server: Serving, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags of the model behind the server."""
    monkeypatch.setenv("FLEDGE_TEST_KEY", KEY)
    return ["--model", "far", "--endpoint", f"{far_server.url}/v1", "--endpoint-key", "FLEDGE_TEST_KEY"]
