"""`fledge data`: the table of a mixture, and cleaning, through the command line."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import zstandard

from fledge import cli

MIXTURE = """\
[sources.words]
path = "words.txt"
weight = 3
max_epochs = 2

[sources.numbers]
path = "numbers.jsonl"
weight = 1
rules = ["none"]
"""


@pytest.fixture
def mixture(corpus: Path, tmp_path: Path) -> Path:
    for name in ("words.txt", "numbers.jsonl"):
        (tmp_path / name).write_bytes((corpus / name).read_bytes())
    path = tmp_path / "mixture.toml"
    path.write_text(MIXTURE)
    return path


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    printed = capsys.readouterr().err
    assert printed.count("error:") == 1
    assert "Traceback" not in printed
    return printed.splitlines()[-1]


def row_of(printed: str, name: str) -> list[str]:
    (line,) = [line for line in printed.splitlines() if line.split()[:1] == [name]]
    return line.split()[1:]


# inspect


def test_without_a_tokenizer_documents_and_bytes_are_counted(
    mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    assert cli.main(["data", "inspect", str(mixture)]) == 0
    printed = capsys.readouterr().out
    assert row_of(printed, "words")[0] == "200"
    texts = (tmp_path / "words.txt").read_text().split("\n<|endoftext|>\n")
    assert row_of(printed, "words")[1:3] == [f"{sum(map(len, texts)) / 1000:.1f}", "kB"]
    assert row_of(printed, "numbers")[0] == "100"
    assert sorted(tmp_path.iterdir()) == before


def test_the_table_says_what_a_run_would_read(
    mixture: Path, tokenizer_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Share times tokens of the run by training tokens, as a run's summary has it."""
    shards = ["--shards", str(tmp_path / "shards")]
    command = ["data", "inspect", str(mixture), "--tokenizer", str(tokenizer_directory), *shards]
    assert cli.main([*command, "--tokens", "10240"]) == 0
    table = capsys.readouterr().out
    out = tmp_path / "run"
    flags = ["--data", str(mixture), "--tokenizer", str(tokenizer_directory), "--out", str(out), *shards]
    assert cli.main([
        "pretrain", *flags, "--params", "100k", "--hidden-size", "64", "--layers", "1", "--row-tokens", "64",
        "--batch-tokens", "512", "--compute", "fp32", "--compile", "no", "--tokens", "10240",
        "--evaluations", "1",
    ]) == 0  # fmt: skip
    epochs = json.loads((out / "summary.json").read_text())["epochs"]
    words, numbers = row_of(table, "words"), row_of(table, "numbers")
    assert words[-4:] == ["75.0%", words[-3], "of", "2"]
    assert float(words[-3]) == pytest.approx(epochs["words"], abs=0.006)
    assert numbers[-2] == "25.0%"
    assert float(numbers[-1]) == pytest.approx(epochs["numbers"], abs=0.006)
    assert cli.main(command) == 0
    assert "allow a run of at most" in capsys.readouterr().out


def test_a_plan_beyond_a_maximum_is_refused(
    mixture: Path, tokenizer_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "inspect", str(mixture), "--tokenizer", str(tokenizer_directory)]
    assert cli.main([*command, "--shards", str(tmp_path / "shards"), "--tokens", "1M"]) == 2
    assert "more than its max_epochs 2" in error_of(capsys)


def test_documents_can_be_looked_at(mixture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "inspect", str(mixture), "--examples", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("--- words, document ") == 2
    assert "0 1 2 3 4" in printed


def test_a_broken_line_is_named_or_counted(
    mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "numbers.jsonl").open("a") as file:
        file.write("\n{]\n")
    assert cli.main(["data", "inspect", str(mixture)]) == 2
    assert f"{tmp_path / 'numbers.jsonl'}:101: not valid JSON" in error_of(capsys)
    assert cli.main(["data", "inspect", str(mixture), "--skip-bad-lines"]) == 0
    assert "1 lines could not be read and were skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["data"], "one of data inspect, data prepare"),
        (["data", "inspect", "nothing.toml"], "nothing.toml: no such file"),
        (["data", "inspect", "nothing.txt"], "no such file or folder: nothing.txt"),
        (["data", "inspect", "{mixture}", "--tokens", "1M"], "--tokens needs a --tokenizer"),
        (["data", "inspect", "{mixture}", "--validation-share", "1"], "must be between 0 and 1"),
        (["data", "inspect", "{mixture}", "--weights", "word=1"], "the nearest is 'words'"),
        (["data", "inspect", "{mixture}", "--examples", "-1"], "--examples -1: must be at least 0"),
        (["data", "prepare", "{mixture}", "--rules", "goper"], "gopher"),
        (["data", "prepare", "{mixture}", "--mask", "name"], "--mask"),
        (["data", "prepare", "{mixture}", "--jaccard", "2"], "--jaccard"),
        (["data", "prepare", "{mixture}", "--out", "{tmp}", "--overwrite"], "holds no cleaned sources"),
        (["data", "prepare", "{mixture}", "--out", "{tmp}"], "exists already"),
    ],
)
def test_a_mistake_is_one_line_and_touches_nothing(
    flags: list[str], message: str, mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    out = [] if "--out" in flags or flags[1:2] != ["prepare"] else ["--out", str(tmp_path / "clean")]
    filled = [flag.replace("{mixture}", str(mixture)).replace("{tmp}", str(tmp_path)) for flag in flags]
    assert cli.main([*filled, *out]) == 2
    error = error_of(capsys)
    assert message in error
    assert error.startswith("fledge")
    assert sorted(tmp_path.rglob("*")) == before


def test_help_of_a_verb_with_two_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "fledge data inspect" in printed
    assert "fledge data prepare" in printed


# prepare


def texts_of(path: Path) -> list[str]:
    with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
        return [json.loads(line)["text"] for line in io.TextIOWrapper(stream, encoding="utf-8")]


def test_from_sources_to_clean_ones(
    mixture: Path, tokenizer_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two copies, an address and a question of an evaluation, among documents that are fine."""
    question = "Which of the small birds that sing in green trees near blue rivers is the quickest of all?"
    more = ["write to fox@example.org about the dog " * 3, question + " The wren."]
    words = (tmp_path / "words.txt").read_text().split("\n<|endoftext|>\n")
    (tmp_path / "words.txt").write_text("\n<|endoftext|>\n".join([*words, words[0], words[7], *more]))
    (tmp_path / "questions.jsonl").write_text(json.dumps({"question": question}))
    out = tmp_path / "clean"
    command = [
        "data", "prepare", str(mixture), "--out", str(out), "--mask", "email",
        "--decontaminate", str(tmp_path / "questions.jsonl"),
    ]  # fmt: skip
    assert cli.main(command) == 0
    kept = texts_of(out / "words.jsonl.zst")
    assert kept[:200] == words
    assert len(kept) == 201
    assert "fox@example.org" not in kept[200]
    assert kept[200].count("write to <email> about") == 3
    summary = json.loads((out / "summary.json").read_text())["sources"]["words"]
    assert (summary["documents_in"], summary["documents_out"]) == (204, 201)
    assert summary["removed"]["exact-duplicate"]["documents"] == 2
    assert summary["removed"]["evaluation"]["documents"] == 1
    report = (out / "report.html").read_text()
    assert "exact duplicates" in report
    assert "://" not in report
    printed = capsys.readouterr()
    assert row_of(printed.out, "words")[:2] == ["201", "204"]
    assert str(out / "mixture.toml") in printed.err
    assert cli.main([*command, "--overwrite", "--no-exact-duplicates", "--no-near-duplicates"]) == 0
    assert len(texts_of(out / "words.jsonl.zst")) == 203
    capsys.readouterr()
    flags = ["--tokenizer", str(tokenizer_directory), "--shards", str(tmp_path / "shards")]
    assert cli.main(["data", "inspect", str(out / "mixture.toml"), *flags, "--tokens", "10k"]) == 0
    table = capsys.readouterr().out
    assert row_of(table, "words")[-4] == "75.0%"
    assert row_of(table, "words")[-2:] == ["of", "2"]
