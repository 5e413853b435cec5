"""The sources of a run: shares, what is held out, and fingerprints."""

from __future__ import annotations

from pathlib import Path

import pytest

from fledge.data.mixture import VALIDATION_BYTES, SourceTexts, read_sources
from fledge.data.sources import parse_sources, split_documents
from fledge.errors import UserError
from fledge.tokenizer.bpe import Tokenizer, train_bpe


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["one two three"], 265)


def write(path: Path, documents: list[str]) -> str:
    path.write_text("\n<|endoftext|>\n".join(documents))
    return str(path)


def read(data: list[str], tokenizer: Tokenizer) -> list[SourceTexts]:
    return read_sources(parse_sources(tuple(data)), tokenizer, 0.1, 0)


def documents(prefix: str, count: int) -> list[str]:
    return [f"{prefix} number {i} é" for i in range(count)]


def test_shares_are_the_weights_or_the_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    small, large = (
        write(tmp_path / "small.txt", documents("a", 20)),
        write(tmp_path / "large.txt", documents("b", 90)),
    )
    weighted = read([f"{small}:3", f"{large}:1"], tokenizer)
    assert [text.share for text in weighted] == [0.75, 0.25]
    natural = read([small, large], tokenizer)
    sizes = [len(text.training) for text in natural]
    assert [text.share for text in natural] == [size / sum(sizes) for size in sizes]


def test_training_and_held_out_documents_are_all_there_are(tmp_path: Path, tokenizer: Tokenizer) -> None:
    made = documents("a", 200)
    (text,) = read([write(tmp_path / "a.txt", made)], tokenizer)
    training, held_out = split_documents(made, 0.1)
    assert text.held_out == [tokenizer.encode(document) for document in held_out]
    assert text.held_out_bytes == sum(len(document.encode()) for document in held_out)
    assert (text.documents, text.text_bytes) == (
        len(training),
        sum(len(document.encode()) for document in training),
    )
    ids = text.training.tokens.tolist()
    assert ids == [
        token for document in training for token in (tokenizer.eos_id, *tokenizer.encode(document))
    ]


def test_the_validation_part_is_bounded(tmp_path: Path, tokenizer: Tokenizer) -> None:
    made = [f"{i} " + "x" * 1000 for i in range(500)]
    (text,) = read([write(tmp_path / "a.txt", made)], tokenizer)
    assert 0.9 * VALIDATION_BYTES < text.held_out_bytes <= VALIDATION_BYTES


def test_a_fingerprint_is_of_the_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    made = documents("a", 20)
    changed = [*made[:-1], made[-1] + "."]
    prints = [
        read([write(tmp_path / name, texts)], tokenizer)[0].fingerprint
        for name, texts in {"a.txt": made, "b.txt": made, "c.txt": changed}.items()
    ]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("texts", "message"),
    [([], "no text in it"), (["a"], "too few different documents"), (["a", "a"], "too few")],
)
def test_too_little_text_is_named(
    texts: list[str], message: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = write(tmp_path / "a.txt", texts)
    with pytest.raises(UserError, match=message) as error:
        read([path], tokenizer)
    assert str(error.value).startswith(f"{path}: ")
