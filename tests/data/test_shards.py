"""Shards: the tokens of every document, however the work was cut, interrupted, or shared."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import fledge.data.encoding
import fledge.data.shards
from fledge.data.accounts import accounts
from fledge.data.conversations import read_texts
from fledge.data.encoding import in_order
from fledge.data.mixture import MixtureSource, mix
from fledge.data.shards import Shards, tokenise
from fledge.data.sources import BadLines, Source, document_hash
from fledge.data.tables import plan_table
from fledge.errors import UserError
from fledge.tokenizer.bpe import Tokenizer, train_bpe
from fledge.tokenizer.chat import encode_chat

TEXTS = [
    f"Document {i}: the quick brown fox jumps over {i} lazy dogs. Grüße!\n" * (1 + i % 4) for i in range(60)
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, 400)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return jsonl(tmp_path / "texts.jsonl", TEXTS)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fledge.data.encoding, "CHUNK_CHARACTERS", 500)


def jsonl(path: Path, texts: list[str]) -> Source:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Source(path.stem, str(path), None)


def of(path: Path) -> Source:
    return Source(path.stem, str(path), None)


def documents(shards: Shards) -> list[list[int]]:
    return [shards.read(d, 0, int(shards.lengths[d])).tolist() for d in range(len(shards))]


def expected(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [[tokenizer.eos_id, *tokenizer.encode(text)] for text in texts]


def check(shards: Shards, tokenizer: Tokenizer, texts: list[str]) -> None:
    """All that Shards promises about the documents of a source."""
    assert documents(shards) == expected(tokenizer, texts)
    assert shards.lengths.tolist() == [len(ids) for ids in expected(tokenizer, texts)]
    assert shards.tokens == sum(shards.lengths)
    assert shards.text_bytes.tolist() == [len(text.encode()) for text in texts]
    assert shards.hashes.tolist() == [document_hash(text) for text in texts]


def files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the texts that are encoded into shards."""
    texts: list[str] = []
    pick = fledge.data.shards.pick_encoder

    def watching(tokenizer: Tokenizer, sample: list[str]) -> Callable[[list[str]], object]:
        encode = pick(tokenizer, sample)

        def watched(some: list[str]) -> object:
            texts.extend(some)
            return encode(some)

        return watched

    monkeypatch.setattr(fledge.data.shards, "pick_encoder", watching)
    return texts


# What they hold.


@given(
    texts=st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=20),
    shard_tokens=st.integers(1, 100),
    workers=st.integers(1, 3),
)
def test_they_hold_the_tokens_of_every_document(
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    shard_tokens: int,
    workers: int,
) -> None:
    tmp_path = tmp_path_factory.mktemp("shards")
    source = jsonl(tmp_path / "texts.jsonl", texts)
    shards = tokenise(source, tokenizer, tmp_path / "out", workers=workers, shard_tokens=shard_tokens)
    check(shards, tokenizer, texts)
    assert (shards.name, shards.skipped_lines) == ("texts", 0)
    check(tokenise(source, tokenizer, tmp_path / "out"), tokenizer, texts)


@given(document=st.integers(0, 59), start=st.integers(0, 300), length=st.integers(0, 300))
def test_reading_is_slicing(
    tokenizer: Tokenizer, opened: Shards, document: int, start: int, length: int
) -> None:
    ids = [tokenizer.eos_id, *tokenizer.encode(TEXTS[document])]
    assert opened.read(document, start, length).tolist() == ids[start : start + length]


@pytest.fixture(scope="module")
def opened(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    tmp_path = tmp_path_factory.mktemp("opened")
    return tokenise(jsonl(tmp_path / "texts.jsonl", TEXTS), tokenizer, tmp_path, shard_tokens=300)


def test_the_fingerprint_depends_on_documents_alone(
    tokenizer: Tokenizer, source: Source, tmp_path: Path
) -> None:
    one = tokenise(source, tokenizer, tmp_path / "one")
    many = tokenise(source, tokenizer, tmp_path / "many", shard_tokens=100, workers=3)
    assert len(files(many.directory)) > len(files(one.directory)) == 4
    assert one.fingerprint == many.fingerprint
    others = [TEXTS[1:], [*TEXTS[:-1], TEXTS[-1] + "!"], [*TEXTS[1:], TEXTS[0]]]
    prints = {
        tokenise(jsonl(tmp_path / "others.jsonl", texts), tokenizer, tmp_path).fingerprint for texts in others
    }
    assert len(prints | {one.fingerprint}) == 4


def test_tokens_take_two_bytes_where_the_vocabulary_allows(
    tokenizer: Tokenizer, source: Source, tmp_path: Path
) -> None:
    data = json.loads(tokenizer._backend.to_str())
    data["model"]["vocab"]["far"] = 2**16  # an id that no merges lead to
    large = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(data)), {}, None)
    small_shards, large_shards = (tokenise(source, t, tmp_path / "out") for t in (tokenizer, large))
    assert small_shards.read(0, 0, 9).dtype == np.uint16
    assert large_shards.read(0, 0, 9).dtype == np.uint32
    for small, far in zip(documents(small_shards), documents(large_shards), strict=True):
        assert small[1:] == far[1:]  # the separator has another id


def test_an_encoder_that_disagrees_is_not_used(
    tokenizer: Tokenizer, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(_: Tokenizer) -> object:
        return lambda texts: [np.zeros(len(text), dtype=np.uint32) for text in texts]

    monkeypatch.setattr(fledge.data.encoding, "fast_encoder", wrong)
    check(tokenise(source, tokenizer, tmp_path / "out"), tokenizer, TEXTS)


def test_tokenizers_without_a_fast_encoder(source: Source, tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = json.loads(tokenizer._backend.to_str())
    data["normalizer"] = {"type": "Lowercase"}
    other = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(data)), {}, None)
    check(tokenise(source, other, tmp_path / "out", workers=2), other, TEXTS)


def test_conversations_are_as_the_template_writes_them(tokenizer: Tokenizer, tmp_path: Path) -> None:
    chats = [
        [
            {"role": "user", "content": f"Say {i}, <|im_end|>!"},
            {"role": "assistant", "content": "é" * i + "."},
        ]
        for i in range(20)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    source = Source("chats", str(path), None)
    shards = tokenise(source, tokenizer, tmp_path / "out", shard_tokens=200)
    ids = [encode_chat(tokenizer, chat).ids for chat in chats]
    assert documents(shards) == [[tokenizer.eos_id, *chat] for chat in ids]
    texts = [tokenizer.decode(chat, skip_special=True) for chat in ids]
    assert "user\nSay 3, <|im_end|>!\nassistant\nééé.\n" in texts
    assert shards.text_bytes.tolist() == [len(text.encode()) for text in texts]
    assert shards.hashes.tolist() == [document_hash(text) for text in texts]


def test_a_broken_conversation_is_named_or_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "Hi"}]}
    rows = [good, {"messages": [{"role": "nobody", "content": "Hi"}]}, {"messages": "Hi"}, good]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source("chats", str(path), None)
    with pytest.raises(UserError, match=r"chats\.jsonl:2: messages\[0\]: role is 'nobody'"):
        tokenise(source, tokenizer, tmp_path / "out")
    shards = tokenise(source, tokenizer, tmp_path / "out", bad=(bad := BadLines(skip=True)))
    assert (len(shards), shards.skipped_lines, bad.count, len(bad.examples)) == (2, 2, 2, 2)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"min_characters": 21}, [2, 3]),
        ({"max_characters": 20}, [0, 1]),
        ({"contains": "user\nx{2}"}, [1, 2, 3]),
        ({"lacks": "xxx"}, [0, 1]),
        ({"lacks": "<[|]"}, [0, 1, 2, 3]),
    ],
    ids=str,
)
def test_settings_choose_conversations(
    tokenizer: Tokenizer, tmp_path: Path, settings: dict[str, object], kept: list[int]
) -> None:
    """By the text the template writes: 19 letters with one `x`, up to 22 with four; no special tokens."""
    chats = [
        [{"role": "user", "content": "x" * n}, {"role": "assistant", "content": "y"}] for n in range(1, 5)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    source = Source("chats", str(path), None, **settings)  # type: ignore[arg-type]
    ids = [encode_chat(tokenizer, chats[n]).ids for n in kept]
    assert documents(tokenise(source, tokenizer, tmp_path / "out")) == [[tokenizer.eos_id, *i] for i in ids]
    texts, encode = read_texts(source, tokenizer)
    assert encode(texts) == ids
    assert [len(text) for text in texts] == [19 + n for n in kept]


# When they are made.


def test_what_is_complete_is_opened_without_reading_or_writing(
    tokenizer: Tokenizer, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tokenise(source, tokenizer, tmp_path / "out", shard_tokens=300)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("reads the source or writes to the directory")

    for name in ("read_documents", "has_conversations", "pick_encoder", "ShardWriter", "locked"):
        monkeypatch.setattr(fledge.data.shards, name, fail)
    again = tokenise(source, tokenizer, tmp_path / "out")
    assert (again.directory, again.fingerprint) == (made.directory, made.fingerprint)
    check(again, tokenizer, TEXTS)


@pytest.mark.parametrize(
    ("changes", "anew"),
    [
        ({"weight": 0.5, "max_epochs": 3.0}, False),
        ({"min_characters": 100}, True),
        ({"max_characters": 100}, True),
        ({"contains": "[0-9]5"}, True),
        ({"lacks": "[0-9]5"}, True),
        ({"field": "other"}, True),
        ({"name": "another"}, True),
    ],
    ids=str,
)
def test_settings_that_matter_make_another_directory(
    tokenizer: Tokenizer, tmp_path: Path, changes: dict[str, object], anew: bool
) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text, "other": "o"}) + "\n" for text in TEXTS))
    first = tokenise(Source("texts", str(path), None), tokenizer, tmp_path / "out")
    settings = {"name": "texts", "path": str(path), "weight": None, **changes}
    second = tokenise(Source(**settings), tokenizer, tmp_path / "out")  # type: ignore[arg-type]
    assert (first.directory != second.directory) == anew


def test_another_tokenizer_or_a_changed_file_makes_another_directory(
    tokenizer: Tokenizer, source: Source, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = tokenise(source, tokenizer, out)
    other = train_bpe(TEXTS, 300)
    check(tokenise(source, other, out), other, TEXTS)
    check(tokenise(jsonl(Path(source.path), TEXTS[:9]), tokenizer, out), tokenizer, TEXTS[:9])
    check(first, tokenizer, TEXTS)  # what was open stays good
    assert len(list(out.iterdir())) == 3


def test_a_folder_that_moves_keeps_its_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    (folder / "inner").mkdir(parents=True)
    for name in ("a.txt", "inner/b.txt"):
        (folder / name).write_text(name)
    first = tokenise(Source("s", str(folder), None), tokenizer, tmp_path / "out")
    folder.rename(tmp_path / "there")
    second = tokenise(Source("s", str(tmp_path / "there"), None), tokenizer, tmp_path / "out")
    assert first.directory == second.directory


@pytest.mark.parametrize("place", [0, 65_535, 134_464, 199_999])
def test_files_of_one_name_size_and_time_are_told_apart(
    tokenizer: Tokenizer, tmp_path: Path, place: int
) -> None:
    """By a single letter among the first or the last 65,536 of 200,000."""
    shards = []
    for folder, letter in (("one", "b"), ("two", "c")):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "same.txt"
        path.write_text("a" * place + letter + "a" * (199_999 - place))
        os.utime(path, ns=(1, 1))
        shards.append(tokenise(Source("s", str(path), None), tokenizer, tmp_path / "out"))
    assert shards[0].directory != shards[1].directory
    assert shards[0].fingerprint != shards[1].fingerprint


def test_a_source_that_moves_away_keeps_its_account(
    tokenizer: Tokenizer, source: Source, tmp_path: Path
) -> None:
    """As during a training: what is on disk is told by what was tokenised."""
    size = Path(source.path).stat().st_size
    assert tokenise(source, tokenizer, tmp_path / "out").disk_bytes == size
    shards = tokenise(source, tokenizer, tmp_path / "out")
    Path(source.path).rename(tmp_path / "away")
    half = np.arange(len(shards)) < 30
    item = MixtureSource(source, shards, 1.0, np.flatnonzero(half), np.flatnonzero(~half))
    mixture = mix([item], "stream", 32, tokenizer.eos_id, 0, isolate=False)
    assert accounts([item], mixture, 5)["texts"].disk_bytes == size
    console = Console(width=200, file=io.StringIO())
    console.print(plan_table([item], None))
    assert f"{size / 1000:.1f} kB" in console.file.getvalue()  # type: ignore[attr-defined]


def test_odd_names_stay_inside_the_directory(tokenizer: Tokenizer, source: Source, tmp_path: Path) -> None:
    for name in ("../up", "a/b c", "é" * 500, ".."):
        shards = tokenise(Source(name, source.path, None), tokenizer, tmp_path / "out")
        assert shards.directory.parent == tmp_path / "out"
        assert shards.name == name


def test_a_source_without_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n\n ")
    for _ in range(2):
        with pytest.raises(UserError, match=r"empty\.txt: no text in it$"):
            tokenise(Source("e", str(tmp_path / "empty.txt"), None), tokenizer, tmp_path / "out")


def test_a_source_of_bad_lines_alone_says_so(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "a"}\n' * 12)
    with pytest.raises(
        UserError, match=r'no text in it \(12 lines were skipped, as .*a\.jsonl:1: .*"body"\)$'
    ):
        tokenise(of(tmp_path / "a.jsonl"), tokenizer, tmp_path / "out", bad=BadLines(skip=True))


def test_progress_ends_at_the_totals(tokenizer: Tokenizer, source: Source, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    shards = tokenise(
        source, tokenizer, tmp_path / "out", workers=2, progress=lambda *counts: seen.append(counts)
    )
    assert len(seen) > 5
    assert seen == sorted(seen)
    assert seen[-1] == (len(shards), shards.tokens)


def with_bad_lines(path: Path) -> Source:
    lines = [json.dumps({"text": text}) for text in TEXTS]
    lines[5], lines[50] = "{", '{"no": "text"}'
    path.write_text("\n".join(lines))
    return Source("texts", str(path), None)


def test_bad_lines_are_an_error_unless_they_are_skipped(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = with_bad_lines(tmp_path / "texts.jsonl")
    good = [text for i, text in enumerate(TEXTS) if i not in (5, 50)]

    def make(bad: BadLines | None = None) -> Shards:
        return tokenise(source, tokenizer, tmp_path / "out", bad=bad, shard_tokens=300)

    with pytest.raises(UserError, match=r"texts\.jsonl:6: "):
        make()
    bad = BadLines(skip=True)
    shards = make(bad)
    check(shards, tokenizer, good)
    assert (bad.count, shards.skipped_lines, make(BadLines(skip=True)).skipped_lines) == (2, 2, 2)
    with pytest.raises(UserError, match=r"texts\.jsonl:6: "):  # not opened as if nothing was left out
        make()
    assert make(BadLines(skip=True)).fingerprint == shards.fingerprint


def test_lines_skipped_earlier_are_reported_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Whoever opens the shards hears what whoever made them heard; with other sources' lines, five in all."""
    source = with_bad_lines(tmp_path / "texts.jsonl")
    made, opened = BadLines(skip=True), BadLines(skip=True)
    tokenise(source, tokenizer, tmp_path / "out", bad=made)
    shards = tokenise(source, tokenizer, tmp_path / "out", bad=opened)
    assert (opened.count, opened.examples) == (made.count, made.examples)
    assert [example.partition(": ")[0] for example in opened.examples] == [
        f"{source.path}:{n}" for n in (6, 51)
    ]
    assert shards.skipped_examples == made.examples
    many = BadLines(skip=True, count=4, examples=list("abcd"))
    tokenise(source, tokenizer, tmp_path / "out", bad=many)
    assert (many.count, many.examples) == (6, [*"abcd", made.examples[0]])


# Interruptions.


class Stop(Exception):
    pass


def stop_after(tokens: int) -> Callable[[int, int], None]:
    def progress(_: int, done: int) -> None:
        if done >= tokens:
            raise Stop

    return progress


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("stop", [1, 700, 1500, 2700])
def test_an_interrupted_run_goes_on(
    tokenizer: Tokenizer, source: Source, tmp_path: Path, encoded: list[str], workers: int, stop: int
) -> None:
    whole = tokenise(source, tokenizer, tmp_path / "whole")
    assert whole.tokens > 2800
    out = tmp_path / "out"
    with pytest.raises(Stop):
        tokenise(source, tokenizer, out, workers=workers, shard_tokens=300, progress=stop_after(stop))
    left = files(out)
    assert [Path(name).suffix for name in left if "shard" in name] == [".npy", ".tokens"] * (
        (len(left) - 1) // 2
    )
    assert (len(left) > 1) == (stop > 300)
    done = sum(len(np.load(path)) for path in out.rglob("*.npy"))
    encoded.clear()
    shards = tokenise(source, tokenizer, out, workers=workers, shard_tokens=300)
    assert sorted(encoded) == sorted(TEXTS[done:])  # no document of a complete shard is encoded again
    check(shards, tokenizer, TEXTS)
    assert shards.fingerprint == whole.fingerprint


def test_a_killed_run_goes_on(tokenizer: Tokenizer, source: Source, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    code = """
import os, signal, sys
from pathlib import Path
import fledge.data.encoding
from fledge.data.shards import tokenise
from fledge.data.sources import Source
from fledge.tokenizer.bpe import Tokenizer
def kill(documents, tokens):
    if tokens > 2000:
        os.kill(os.getpid(), signal.SIGKILL)
fledge.data.encoding.CHUNK_CHARACTERS = 500
folder, text = map(Path, sys.argv[1:])
source = Source("texts", str(text), None)
tokenise(source, Tokenizer.load(folder), folder / "out", shard_tokens=300, progress=kill)
"""
    killed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), source.path], check=False, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    left = files(tmp_path / "out")
    assert any("tmp-" in name for name in left)
    assert not any("index" in name for name in left)
    shards = tokenise(source, tokenizer, tmp_path / "out", shard_tokens=300)
    check(shards, tokenizer, TEXTS)
    assert not any("tmp-" in name for name in files(tmp_path / "out"))


def test_a_full_disk_is_said_and_what_was_complete_stays(
    tokenizer: Tokenizer, source: Source, tmp_path: Path, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 5
    fsync = os.fsync

    def full(handle: int) -> None:
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="cannot be written: No space left on device"):
            tokenise(source, tokenizer, tmp_path / "out", shard_tokens=300)
    assert len(list((tmp_path / "out").rglob("*.npy"))) == 2
    encoded.clear()
    check(tokenise(source, tokenizer, tmp_path / "out", shard_tokens=300), tokenizer, TEXTS)
    assert 0 < len(encoded) < len(TEXTS)


def test_a_place_that_cannot_be_written(tokenizer: Tokenizer, source: Source, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/texts-.*: cannot be written: Not a directory"):
        tokenise(source, tokenizer, tmp_path / "file")


def truncate(directory: Path) -> None:
    path = sorted(directory.glob("*.tokens"))[2]
    os.truncate(path, path.stat().st_size - 2)


def lose(directory: Path) -> None:
    sorted(directory.glob("*.npy"))[2].unlink()


def garble(directory: Path) -> None:
    sorted(directory.glob("*.npy"))[2].write_bytes(b"garbled")


def break_index(directory: Path) -> None:
    (directory / "index.json").write_text("{")


def change_index(directory: Path) -> None:
    index = json.loads((directory / "index.json").read_text())
    index["shards"][2][0] += 1
    (directory / "index.json").write_text(json.dumps(index))


def change_type(directory: Path) -> None:
    index = json.loads((directory / "index.json").read_text())
    (directory / "index.json").write_text(json.dumps({**index, "dtype": "O"}))


@pytest.mark.parametrize("damage", [truncate, lose, garble, break_index, change_index, change_type])
def test_what_is_damaged_is_made_anew_or_named(
    tokenizer: Tokenizer,
    source: Source,
    tmp_path: Path,
    damage: Callable[[Path], None],
    encoded: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = tokenise(source, tokenizer, tmp_path / "out", shard_tokens=300)
    damage(made.directory)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)  # as in a directory that may only be read
        with pytest.raises(UserError, match=r"texts-[0-9a-f]{16}.*(damaged|not valid JSON)"):
            tokenise(source, tokenizer, tmp_path / "out")
    encoded.clear()
    again = tokenise(source, tokenizer, tmp_path / "out", shard_tokens=300)
    assert again.fingerprint == made.fingerprint
    check(again, tokenizer, TEXTS)
    assert len(encoded) < len(TEXTS)  # the first two shards were fine


def test_a_source_that_changed_unseen_is_begun_anew(
    tokenizer: Tokenizer, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same size, same time, same ends: only the text shows that complete shards are of another text."""
    monkeypatch.setattr(fledge.data.shards, "END_BYTES", 50)
    path = Path(source.path)
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    with pytest.raises(Stop):
        tokenise(source, tokenizer, tmp_path / "out", shard_tokens=300, progress=stop_after(1000))
    texts = [text.replace("fox", "cat") for text in TEXTS]
    texts[0], texts[-1] = TEXTS[0], TEXTS[-1]
    jsonl(path, texts)
    os.utime(path, ns=times)
    check(tokenise(source, tokenizer, tmp_path / "out", shard_tokens=300), tokenizer, texts)
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_a_source_that_changes_while_it_is_read(tokenizer: Tokenizer, source: Source, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"texts\.jsonl: changed while it was read"):
        tokenise(source, tokenizer, tmp_path / "out", progress=lambda *_: os.utime(source.path, (1, 1)))
    assert not any("index" in name for name in files(tmp_path / "out"))


# Several at a time.


def test_two_runs_share_the_work_of_one(
    tokenizer: Tokenizer, source: Source, tmp_path: Path, encoded: list[str]
) -> None:
    made: list[Shards] = []

    def run() -> None:
        made.append(tokenise(source, tokenizer, tmp_path / "out", shard_tokens=300))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({shards.fingerprint for shards in made}) == 1
    assert len(made) == 4
    assert sorted(encoded) == sorted(TEXTS)


def test_who_holds_the_directory_is_said(
    tokenizer: Tokenizer, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tokenise(source, tokenizer, tmp_path / "out").directory
    (directory / "index.json").unlink()
    thread = threading.Thread(target=tokenise, args=(source, tokenizer, tmp_path / "out"))
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    with fledge.data.shards.locked(directory):
        thread.start()
        while "waiting" not in said.getvalue() and thread.is_alive():
            time.sleep(0.01)
        thread.join(0.1)
        assert thread.is_alive()
        assert not (directory / "index.json").exists()
    thread.join()
    assert f"{directory}: process {os.getpid()} on " in said.getvalue()
    assert (directory / "index.json").exists()


@given(st.lists(st.integers(), max_size=30), st.integers(1, 4))
def test_threads_keep_the_order_and_few_items(numbers: list[int], workers: int) -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for number in numbers:
            taken += 1
            yield number

    given_back = []
    for number in in_order(lambda number: number + 1, items(), workers):
        given_back.append(number - 1)
        assert taken <= len(given_back) + workers
    assert given_back == numbers


def test_an_error_in_a_thread_arrives() -> None:
    def fail(number: int) -> int:
        if number == 3:
            raise UserError("three")
        return number

    got = []
    with pytest.raises(UserError, match="three"):
        for number in in_order(fail, iter(range(100)), 2):
            got.append(number)
    assert got == [0, 1, 2]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_source(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """60 MB of text, and at its peak the process has grown by less than half of that (all of it as Python
    strings would be as much, its ids as lists eight times as much)."""
    tokenizer.save(tmp_path)
    line = json.dumps({"text": TEXTS[3] * 20}) + "\n"
    count = 60_000_000 // len(line)
    (tmp_path / "texts.jsonl").write_text(line * count)
    (tmp_path / "small.jsonl").write_text(line * 10)
    code = """
import resource, sys
from pathlib import Path
from fledge.data.shards import tokenise
from fledge.data.sources import Source
from fledge.tokenizer.bpe import Tokenizer
folder = Path(sys.argv[1])
tokenizer = Tokenizer.load(folder)
def run(name):
    source = Source(name, str(folder / f"{name}.jsonl"), None)
    shards = tokenise(source, tokenizer, folder / "out", workers=2, shard_tokens=2**20)
    return len(shards), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = run("small")[1]
documents, after = run("texts")
print(documents, after - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True
    )
    documents, grown = map(int, done.stdout.split())
    assert documents == count
    assert grown < 30_000_000
