"""Data sets of the Hugging Face Hub, here of folders: rows, splits, and what is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fledge.data.hub import local_version, parse_path
from fledge.data.sources import Source, has_conversations, list_files, read_documents, read_records
from fledge.errors import UserError


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("hf:name", ("name", None, None)),
        ("hf:owner/name", ("owner/name", None, None)),
        ("hf:owner/name:test", ("owner/name", None, "test")),
        ("hf:owner/name/20231101.en", ("owner/name", "20231101.en", None)),
        ("hf:owner/name/part:validation", ("owner/name", "part", "validation")),
        ("hf:a/b/c/d", ("a/b/c/d", None, None)),
        ("hf:a/b/c/d:test", ("a/b/c/d", None, "test")),
    ],
)
def test_what_a_path_names(
    path: str, parts: tuple[str, str | None, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four parts only as a folder that is there."""
    monkeypatch.chdir(tmp_path)
    Path("a/b/c/d").mkdir(parents=True)
    assert parse_path(path) == parts


def hub(folder: Path, rows: list[object], name: str = "train.jsonl") -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_link_to_nothing_is_no_part_of_a_folder(tmp_path: Path) -> None:
    folder = hub(tmp_path / "d", [{"text": "a"}])
    before = local_version(f"hf:{folder}")
    (folder / "dangling").symlink_to(tmp_path / "nothing")
    assert local_version(f"hf:{folder}") == before
    hub(tmp_path, [{"text": "a"}], "nothing")
    assert local_version(f"hf:{folder}") != before


def hub_texts(path: str, field: str = "text") -> list[str]:
    return list(read_documents(Source("a", path, None, field=field)))


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")  # of the packages that read data sets
def test_a_data_set_in_a_folder_is_read(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the `hub` extra")
    hub(tmp_path / "d", [{"text": f"train {n}", "n": n} for n in range(3)])
    assert hub_texts(f"hf:{tmp_path / 'd'}") == ["train 0", "train 1", "train 2"]
    hub(tmp_path / "d", [{"text": "test 0", "n": 1}], "test.jsonl")
    assert hub_texts(f"hf:{tmp_path / 'd'}") == ["train 0", "train 1", "train 2"]
    assert hub_texts(f"hf:{tmp_path / 'd'}:test") == ["test 0"]
    source = Source("a", f"hf:{tmp_path / 'd'}", None)
    assert list(read_records(source))[1] == {"text": "train 1", "n": 1}
    assert list_files(source) == []


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_what_is_wrong_with_a_data_set_is_said_in_a_line(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the `hub` extra")
    folder = hub(tmp_path / "d", [{"text": "a", "n": 1}])
    (tmp_path / "empty").mkdir()
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "code.py").write_text("raise SystemExit")
    hub(tmp_path / "broken", [{"text": "a"}])
    (tmp_path / "broken" / "train.jsonl").write_text('{"text": "a"}\n{"text": ')
    for path, field, message in (
        (f"hf:{folder}:val", "text", 'has no split "val" but "train"; name one: hf:'),
        (f"hf:{folder}", "body", 'has no column "body"; it has "text", "n"'),
        (f"hf:{tmp_path / 'empty'}", "text", "cannot be opened: "),
        (f"hf:{tmp_path / 'code'}", "text", "cannot be opened: "),
        (f"hf:{tmp_path / 'broken'}", "text", "cannot be "),
    ):
        with pytest.raises(UserError) as error:
            hub_texts(path, field)
        assert str(error.value).startswith(f"{path}: {message}")
        assert "\n" not in str(error.value)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_a_saved_data_set_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the `hub` extra")
    made = datasets.Dataset.from_dict({"text": ["a", "b"]})
    made.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": made, "test": made.select([1])}).save_to_disk(str(tmp_path / "two"))
    assert hub_texts(f"hf:{tmp_path / 'one'}") == ["a", "b"]
    assert hub_texts(f"hf:{tmp_path / 'two'}:test") == ["b"]


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_conversations_of_a_data_set(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the `hub` extra")
    messages = [{"role": "user", "content": "a"}]
    hub(tmp_path / "d", [{"messages": messages}, {"messages": messages}])
    source = Source("a", f"hf:{tmp_path / 'd'}", None)
    assert has_conversations(source)
    assert list(read_records(source)) == [{"messages": messages}] * 2
