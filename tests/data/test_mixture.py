"""Mixtures: what a file or flags name, shares, what is held out, limits, and accounts that balance."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fledge.data.accounts import accounts
from fledge.data.mixture import (
    VALIDATION_BYTES,
    MixtureSource,
    Packing,
    check_size,
    load_sources,
    mix,
    read_mixture,
    tokenise_sources,
)
from fledge.data.sources import document_hash, held_out, list_files
from fledge.errors import UserError
from fledge.tokenizer.bpe import Tokenizer, train_bpe


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["one two three"], 265)


def write(path: Path, documents: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return str(path)


def read(data: list[str], tokenizer: Tokenizer, tmp_path: Path) -> list[MixtureSource]:
    return tokenise_sources(load_sources(data), tokenizer, tmp_path / "shards", 0.1)


def documents(prefix: str, count: int) -> list[str]:
    return [f"{prefix} number {i} é" for i in range(count)]


# Mixture files.

MIXTURE = """\
[sources.wiki]
path = "wiki.jsonl"
weight = 3
max_epochs = 2.5
min_characters = 10

[sources.py]
path = "python:topics"
weight = 0.5
"""


def mixture_file(tmp_path: Path, text: str = MIXTURE) -> Path:
    write(tmp_path / "wiki.jsonl", documents("w", 30))
    path = tmp_path / "mixture.toml"
    path.write_text(text)
    return path


def test_a_mixture_file_names_sources(tmp_path: Path) -> None:
    wiki, python = read_mixture(mixture_file(tmp_path))
    assert (wiki.name, wiki.path, wiki.weight) == ("wiki", str(tmp_path / "wiki.jsonl"), 3.0)
    assert (wiki.max_epochs, wiki.min_characters, wiki.field) == (2.5, 10, "text")
    assert (python.name, python.path, python.weight) == ("py", "python:topics", 0.5)


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also below a folder whose name has the marks of a glob, for folders of data sets, and at home."""
    folder = tmp_path / "a[1]"
    (folder / "hub").mkdir(parents=True)
    (folder / "b").mkdir()
    write(folder / "b" / "one.jsonl", ["x"])
    write(folder / "hub" / "train.jsonl", ["x"])
    monkeypatch.setenv("HOME", str(folder))
    paths = {"glob": "b/*.jsonl", "file": "b/one.jsonl", "home": "~/b/one.jsonl", "hub": "hf:hub:train"}
    path = folder / "mixture.toml"
    path.write_text("".join(f'[sources.{name}]\npath = "{p}"\n' for name, p in paths.items()))
    sources = {source.name: source for source in read_mixture(path)}
    for name in ("glob", "file", "home"):
        assert [file.path for file in list_files(sources[name])] == [folder / "b" / "one.jsonl"]
    assert sources["hub"].path == f"hf:{folder / 'hub'}:train"


def test_weights_may_be_given_otherwise(tmp_path: Path) -> None:
    path = str(mixture_file(tmp_path))
    assert [source.weight for source in load_sources([path], ["py=7"])] == [3.0, 7.0]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", 0, "no sources in it"),
        ("[sources]\n", 0, "no sources in it"),
        ("[source.wiki]\n", 1, "unknown table 'source'"),
        ("sources = 3\n", 0, "no sources in it"),
        ("[sources]\nwiki = 3\n", 2, "must be a table"),
        ("[sources.wiki]\nweight = 1\n", 1, "path is missing"),
        ('\n[sources.wiki]\npath = "wiki.jsonl"\nwieght = 1\n', 2, "the nearest is 'weight'"),
        ('[sources.wiki]\npath = "wiki.jsonl"\nweight = "1"\n', 1, "must be a number"),
        ('[sources.wiki]\npath = "wiki.jsonl"\nweight = true\n', 1, "must be a number"),
        ('[sources.wiki]\npath = "wiki.jsonl"\nweight = 0\n', 1, "above 0; to leave the source out"),
        ('[sources.wiki]\npath = "wiki.jsonl"\nweight = -1\n', 1, "must be above 0"),
        ('[sources.wiki]\npath = "wiki.jsonl"\nweight = nan\n', 1, "must be above 0"),
        ('[sources.wiki]\npath = "wiki.jsonl"\nmax_epochs = 0\n', 1, "max_epochs = 0: must be above 0"),
        ('[sources.wiki]\npath = "wiki.jsonl"\ncontains = "("\n', 1, "contains"),
        ('[sources.wiki]\npath = "wiki.jsonl"\nrules = ["goper"]\n', 1, "gopher"),
        ("[sources.wiki\n", 0, "not valid TOML"),
    ],
)
def test_a_mistake_in_a_mixture_file_is_one_line(text: str, line: int, message: str, tmp_path: Path) -> None:
    path = mixture_file(tmp_path, text)
    with pytest.raises(UserError) as error:
        read_mixture(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{path}:{line}:" if line else f"{path}:")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (["wikki=1"], "no source 'wikki'; the nearest is 'wiki'"),
        (["wiki=0"], "above 0; to leave a source out"),
        (["wiki=much"], "must be a number above 0"),
        (["wiki"], "NAME=0.5"),
    ],
)
def test_a_mistake_in_weights_is_one_line(weights: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_sources([str(mixture_file(tmp_path))], weights)


def test_weights_are_for_all_sources_or_none(tmp_path: Path) -> None:
    path = mixture_file(tmp_path, MIXTURE.replace("weight = 0.5\n", ""))
    with pytest.raises(UserError, match="source 'py' has no weight while 'wiki' has one"):
        load_sources([str(path)])
    assert [source.weight for source in load_sources([str(path)], ["py=1"])] == [3.0, 1.0]


def test_a_mixture_file_stands_alone(tmp_path: Path) -> None:
    path = str(mixture_file(tmp_path))
    with pytest.raises(UserError, match="give it alone"):
        load_sources([path, str(tmp_path / "wiki.jsonl")])


# Tokenised sources.


def test_shares_are_the_weights_or_the_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    small = write(tmp_path / "small.jsonl", documents("a", 20))
    large = write(tmp_path / "large.jsonl", documents("b", 90))
    weighted = read([f"{small}:3", f"{large}:1"], tokenizer, tmp_path)
    assert [source.share for source in weighted] == [0.75, 0.25]
    natural = read([small, large], tokenizer, tmp_path)
    sizes = [source.training_tokens for source in natural]
    assert [source.share for source in natural] == pytest.approx([size / sum(sizes) for size in sizes])


def test_what_is_held_out_is_told_by_a_documents_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    made = documents("a", 200)
    (source,) = read([write(tmp_path / "a.jsonl", made)], tokenizer, tmp_path)
    held = sorted((document for document in made if held_out(document, 0.1)), key=document_hash)
    ids, size = source.validation(tokenizer)
    assert ids == [tokenizer.encode(document) for document in held]
    assert size == sum(len(document.encode()) for document in held)
    training = [
        source.shards.read(int(d), 0, int(source.shards.lengths[d])).tolist() for d in source.training
    ]
    assert training == [
        [tokenizer.eos_id, *tokenizer.encode(document)] for document in made if document not in held
    ]


@pytest.mark.parametrize("length", [10, 1000, 10**6])
def test_the_validation_part_is_bounded(length: int, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Documents are cut where they alone would be too much; their bytes are those of what is left."""
    made = [f"{i} é" + "x" * length for i in range(3 * VALIDATION_BYTES // length + 60)]
    (source,) = read([write(tmp_path / "a.jsonl", made)], tokenizer, tmp_path)
    ids, size = source.validation(tokenizer)
    held = sorted((document for document in made if held_out(document, 0.1)), key=document_hash)
    texts = [tokenizer.decode(document) for document in ids]
    assert sum(len(text.encode()) for text in texts) == size
    assert texts[:-1] == held[: len(texts) - 1]
    assert held[len(texts) - 1].startswith(texts[-1])
    whole = sum(len(document.encode()) for document in held)
    assert size == min(whole, VALIDATION_BYTES) or VALIDATION_BYTES - 4 <= size <= VALIDATION_BYTES


def test_a_source_too_small_to_hold_anything_out_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", ["a", "a"])
    with pytest.raises(UserError, match="too few different documents") as error:
        read([path], tokenizer, tmp_path)
    assert str(error.value).startswith(f"{path}: ")


def test_a_small_source_gives_up_one_document(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (source,) = read([write(tmp_path / "a.jsonl", ["a", "b", "b"])], tokenizer, tmp_path)
    assert len(source.training) + len(source.held_out) == 3
    assert 1 <= len(source.held_out) <= 2


def test_what_one_source_holds_out_no_other_trains_on(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Also where the hash alone would not: a small source gives up a document that others have."""
    made = documents("a", 40)
    kept = [document for document in made if not held_out(document, 0.1)][:3]
    big, small = write(tmp_path / "big.jsonl", made), write(tmp_path / "small.jsonl", kept)
    sources = read([big, small], tokenizer, tmp_path)
    assert len(sources[1].held_out) == 1
    trained = {int(source.shards.hashes[d]) for source in sources for d in source.training}
    assert not trained & {int(source.shards.hashes[d]) for source in sources for d in source.held_out}


# Limits.


def limited(tmp_path: Path, tokenizer: Tokenizer, max_epochs: float) -> list[MixtureSource]:
    first = write(tmp_path / "a.jsonl", documents("a", 50))
    second = write(tmp_path / "b.jsonl", documents("b", 50))
    a, b = read([f"{first}:1", f"{second}:3"], tokenizer, tmp_path)
    return [a, dataclasses.replace(b, source=dataclasses.replace(b.source, max_epochs=max_epochs))]


def test_a_plan_that_passes_a_maximum_of_epochs_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    sources = limited(tmp_path, tokenizer, 2.0)
    most = check_size(sources, 1, None)
    assert most == int(2.0 * sources[1].training_tokens / 0.75)
    assert check_size(sources, 1, most) == most
    with pytest.raises(UserError, match=rf"source 'b' would be seen 2\.0.* at most --tokens {most}"):
        check_size(sources, 1, most + 60)
    assert check_size(sources, 100, None) == most // 100 * 100


def test_without_maxima_there_is_no_limit(tmp_path: Path, tokenizer: Tokenizer) -> None:
    sources = read([write(tmp_path / "a.jsonl", documents("a", 50))], tokenizer, tmp_path)
    assert check_size(sources, 1, 10**12) is None


def test_a_mixture_smaller_than_a_batch_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    sources = read([write(tmp_path / "a.jsonl", documents("a", 50))], tokenizer, tmp_path)
    have = sources[0].training_tokens
    check_size(sources, have, None)
    with pytest.raises(UserError, match=f"has {have:,} training tokens, fewer than one batch"):
        check_size(sources, have + 1, None)


# Accounts.


@pytest.mark.parametrize("packing", ["stream", "best-fit"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(
    sizes=st.lists(st.integers(8, 40), min_size=1, max_size=3),
    row_tokens=st.integers(1, 60),
    rows=st.integers(0, 120),
)
def test_accounts_balance(
    packing: Packing, sizes: list[int], row_tokens: int, rows: int, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """Tokenised = trained + dropped + held out + unused, recounted from the shards and from the rows."""
    data = [
        write(tmp_path / f"{name}.jsonl", [f"{name}{i} " * (1 + i % 7) for i in range(size)])
        for name, size in zip("abc", sizes, strict=False)
    ]
    sources = read(data, tokenizer, tmp_path)
    mixture = mix(sources, packing, row_tokens, tokenizer.eos_id, seed=0, isolate=False)
    books = accounts(sources, mixture, rows)
    batch = mixture.rows(0, rows) if rows else None
    seen = 0 if batch is None else int(batch.loss_mask[:, 1:].sum())
    assert sum(account.seen for account in books.values()) == seen
    for source in sources:
        account, shards = books[source.name], source.shards
        tokens = [len(shards.read(d, 0, 10**9)) for d in range(len(shards))]
        held = sum(tokens[d] for d in source.held_out)
        assert account.tokenised == sum(tokens)
        assert account.held_out == held
        assert account.dropped == 0
        assert account.trained == min(account.seen, sum(tokens) - held)
        assert account.tokenised == account.trained + account.dropped + account.held_out + account.unused
        assert account.epochs == pytest.approx(account.seen / (sum(tokens) - held), abs=1e-4)


@pytest.mark.parametrize("packing", ["stream", "best-fit"])
def test_what_is_held_out_is_in_no_row(packing: Packing, tmp_path: Path, tokenizer: Tokenizer) -> None:
    made = [f"document {i} of them" for i in range(100)]
    sources = read([write(tmp_path / "a.jsonl", made)], tokenizer, tmp_path)
    mixture = mix(sources, packing, 60, tokenizer.eos_id, seed=0, isolate=False)
    rows = [tokenizer.decode(row.tolist()) for row in mixture.rows(0, 400).input_ids]
    found = {line for line in made for row in rows if f"<|endoftext|>{line}<|endoftext|>" in row}
    assert found == {document for document in made if not held_out(document, 0.1)}
