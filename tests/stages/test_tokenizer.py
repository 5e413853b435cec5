from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fledge.cli import main
from fledge.data.sources import parse_sources
from fledge.stages.tokenizer import SourceText, training_text
from fledge.tokenizer.bpe import Tokenizer, train_bpe

TEXT = "The quick brown fox jumps over the lazy dog.\n\nGrüße aus Köln!\n" * 40


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


def run(*flags: object) -> int:
    return main(["tokenizer", *map(str, flags)])


def test_from_text_to_a_tokenizer(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "tokenizer"
    assert run("--data", text_file, "--vocab-size", 300, "--out", out) == 0
    tokenizer = Tokenizer.load(out)
    assert tokenizer.vocab_size == 300
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert sorted(path.name for path in out.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert [path.name for path in out.parent.iterdir()] == ["tokenizer"]
    printed = capsys.readouterr().out
    assert "300" in printed and str(out) in printed
    stripped = TEXT.strip("\n")
    expected = len(stripped.encode()) / len(tokenizer.encode(stripped))
    (ratio,) = re.findall(r"text\W+1\W+[\d,]+\W+([\d.]+)", printed)
    assert float(ratio) == pytest.approx(expected, abs=0.006)


def test_files_of_all_kinds(text_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.md").write_text("zzz zzz")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "qqq qqq"}) + "\n")
    out = tmp_path / "out"
    assert run("--data", f"a={text_file}", folder, rows, "--vocab-size", 400, "--out", out) == 0
    expected = train_bpe([TEXT.strip("\n"), "zzz zzz", "qqq qqq"], 400)
    assert Tokenizer.load(out).fingerprint() == expected.fingerprint()


def write_rows(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_weights_are_shares_of_the_text(tmp_path: Path) -> None:
    """By hand: 8 documents of 4 bytes; three quarters are 6 from `a`, with two twice, and 2 from `b`."""
    a = write_rows(tmp_path / "a.jsonl", ["aaab", "aaac", "aaad", "aaae"])
    b = write_rows(tmp_path / "b.jsonl", ["xxxy", "xxxz", "xxxv", "xxxw"])
    out = tmp_path / "out"
    assert run("--data", f"{a}:3", f"{b}:1", "--vocab-size", 400, "--out", out) == 0
    by_hand = ["aaab", "aaac", "aaac", "aaad", "aaae", "aaae", "xxxz", "xxxw"]
    assert Tokenizer.load(out).fingerprint() == train_bpe(by_hand, 400).fingerprint()
    texts = [SourceText.measure(source) for source in parse_sources((f"{a}:3", f"{b}:1"))]
    assert list(training_text(texts)) == by_hand


def test_a_weighty_source_compresses_better(text_file: Path, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other.jsonl", [f"number {n} times {n * n} is {n**3}" for n in range(400)])
    lengths = []
    for weights in ("9 1", "1 9"):
        out = tmp_path / weights.replace(" ", "_")
        x, y = weights.split()
        assert run("--data", f"{text_file}:{x}", f"{other}:{y}", "--vocab-size", 290, "--out", out) == 0
        lengths.append(len(Tokenizer.load(out).encode(TEXT)))
    assert lengths[0] < lengths[1]


def test_a_vocabulary_smaller_than_asked_for_is_said(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("--data", text_file, "--out", out) == 0
    size = Tokenizer.load(out).vocab_size
    assert 265 < size < 8192
    assert f"{size} (8,192 asked for" in capsys.readouterr().out


def test_nothing_is_overwritten_unasked(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("--data", text_file, "--vocab-size", 270, "--out", out) == 0
    assert run("--data", text_file, "--vocab-size", 280, "--out", out) == 2
    assert f"{out}: exists" in capsys.readouterr().err
    assert Tokenizer.load(out).vocab_size == 270
    assert run("--data", text_file, "--vocab-size", 280, "--out", out, "--overwrite") == 0
    assert Tokenizer.load(out).vocab_size == 280


def test_overwriting_takes_nothing_but_a_tokenizer(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    assert run("--data", text_file, "--out", tmp_path, "--overwrite") == 2
    assert f"{tmp_path}: holds more than a tokenizer (text.txt)" in capsys.readouterr().err
    assert run("--data", text_file, "--out", text_file, "--overwrite") == 2
    assert f"{text_file}: is a file" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
    assert text_file.read_text() == TEXT


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("missing.txt", None, "no such file"),
        ("empty.txt", b"", "no text"),
        ("latin.txt", b"ok\nGr\xfc\xdfe", "latin.txt:2: not valid UTF-8"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": \n', "rows.jsonl:2: not valid JSON"),
        ("rows.jsonl", b'{"content": "a"}\n', 'rows.jsonl:1: the line has no field "text"'),
        (
            "rows.jsonl",
            b'{"text": "a\\ud800"}\n',
            "rows.jsonl:1: '\\ud800' is half of a surrogate",
        ),
    ],
)
def test_bad_text_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None, complaint: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    out = tmp_path / "out"
    assert run("--data", path, "--vocab-size", 300, "--out", out) == 2
    error = capsys.readouterr().err
    assert error.startswith("fledge tokenizer: error: ") and error.count("\n") == 1
    assert complaint in error
    assert {p.name for p in tmp_path.iterdir()} <= {name}


def test_the_size_has_a_smallest(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--data", text_file, "--vocab-size", 264, "--out", tmp_path / "out") == 2
    assert "at least 265" in capsys.readouterr().err
