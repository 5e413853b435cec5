"""`fledge label` as a command: prepare, simulate, export, import, serve, and its mistakes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from fledge import cli
from fledge.feedback.store import Store, edit_project, list_items, list_projects
from fledge.model.checkpoint import save_model
from fledge.model.config import ModelConfig
from fledge.model.transformer import CausalLM
from fledge.tokenizer.bpe import Tokenizer


@pytest.fixture(scope="module")
def model(tokenizer_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model that says something else each time: it has learned nothing."""
    directory = tmp_path_factory.mktemp("random") / "model"
    directory.mkdir()
    tokenizer = Tokenizer.load(tokenizer_directory)
    torch.manual_seed(0)
    config = ModelConfig("llama", tokenizer.vocab_size, 16, 32, 1, 2, 2, 8, 128, tie_word_embeddings=False)
    save_model(
        directory, CausalLM(config).eval(), tokenizer, {"stage": "sft"}, [tokenizer.end_of_turn_id or 0]
    )
    return directory


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"the quick {i}", "gold": "the quick fox"} for i in range(3)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def fledge(*flags: object) -> int:
    return cli.main([str(flag) for flag in flags])


def mistake(capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    assert fledge(*flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_from_prompts_to_training_data(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "labels.db"
    flags = ["label", "--prompts", prompts, "--model", model, "--store", store, "--max-tokens", 8]
    assert fledge(*flags, "--simulate", "gold-first", "--noise", 0.2) == 0
    printed = capsys.readouterr()
    assert "9 simulated answers by 3 labelers" in printed.out
    assert "outputs: 3 of 3 prompts" in printed.err
    assert fledge(*flags, "--simulate", "gold-first") == 0  # nothing twice
    assert "0 simulated answers" in capsys.readouterr().out
    opened = Store(str(store))
    (project,) = list_projects(opened)
    assert project.settings.name == "prompts"
    assert [len(item.outputs) for item in list_items(opened, project.id)] == [4, 4, 4]
    opened.close()

    out = tmp_path / "ranked.jsonl"
    assert fledge("label", "export", "--store", store, "--form", "ranked", "--out", out) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 9
    assert all(row["simulated"] and len(row["completions"]) == len(row["ranks"]) == 4 for row in rows)
    assert "exists already" in mistake(
        capsys, "label", "export", "--store", store, "--form", "ranked", "--out", out
    )

    split = tmp_path / "split"
    shares = ("--shares", "train=0.5", "test=0.5")
    assert fledge("label", "export", "--store", store, "--form", "preference", "--out", split, *shares) == 0
    parts = {name: (split / f"{name}.jsonl").read_text().splitlines() for name in ("train", "test")}
    seen = {name: {json.dumps(json.loads(row)["prompt"]) for row in part} for name, part in parts.items()}
    assert not seen["train"] & seen["test"]

    assert fledge("label", "import", out, "--store", tmp_path / "other.db") == 0
    other = Store(str(tmp_path / "other.db"))
    assert [project.settings.kinds for project in list_projects(other)] == [("ranking",)]
    other.close()
    again = tmp_path / "again.jsonl"
    export = ("label", "export", "--store", tmp_path / "other.db", "--form", "ranked", "--out", again)
    assert fledge(*export) == 0
    copied = [json.loads(line) for line in again.read_text().splitlines()]
    assert sorted(str(row["ranks"]) for row in copied) == sorted(str(row["ranks"]) for row in rows)


def test_the_same_command_again_keeps_what_admins_edited(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "p", "completions": ["a", "bb"]}]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "instructions.md").write_text("Be kind.")
    flags = ["label", "--prompts", prompts, "--store", tmp_path / "l.db", "--simulate", "shorter"]
    flags += ["--instructions", tmp_path / "instructions.md"]
    assert fledge(*flags) == 0
    store = Store(str(tmp_path / "l.db"))
    (project,) = list_projects(store)
    assert project.settings.instructions == "Be kind."
    edit_project(store, project.id, instructions="Be strict.")
    assert fledge(*flags) == 0
    assert "--instructions is left as project prompts has it" in capsys.readouterr().err
    assert list_projects(store)[0].settings.instructions == "Be strict."
    store.close()


def test_mistakes_are_one_line(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "labels.db"
    flags = ["label", "--prompts", prompts, "--store", store, "--port", 0]
    assert "name models" in mistake(capsys, *flags)
    assert "unknown task kind" in mistake(capsys, *flags, "--project", "x", "--task", "guessing")
    assert "outputs_per_prompt is 10" in mistake(capsys, *flags, "--project", "x", "--outputs", 10)
    assert "unknown rule 'best'" in mistake(capsys, *flags, "--simulate", "best")
    assert "no rule" in mistake(capsys, *flags, "--prefill", "best")
    assert "no such file" in mistake(
        capsys, "label", "--prompts", tmp_path / "none.jsonl", "--store", store, "--port", 0
    )
    assert "--prompts FILE is needed" in mistake(capsys, "label", "--store", tmp_path / "new.db", "--port", 0)
    assert "nowhere" in mistake(capsys, *flags, "--model", tmp_path / "nowhere")
    assert "--endpoint" in mistake(capsys, *flags, "--model", "m", "--endpoint", "nowhere")
    assert "FLEDGE_NO_KEY" in mistake(
        capsys, *flags, "--model", "m", "--endpoint", "http://x/v1", "--endpoint-key", "FLEDGE_NO_KEY"
    )
    export = ["label", "export", "--form", "ranked", "--out", tmp_path / "out.jsonl"]
    assert "no such file" in mistake(capsys, *export, "--store", tmp_path / "none.db")
    opened = Store(str(store))
    assert list_projects(opened) == []  # a mistake leaves nothing behind
    opened.close()
    prompts.write_text('{"prompt": "p", "completions": ["a", "bb"]}')
    assert fledge("label", "--prompts", prompts, "--store", store, "--simulate", "shorter") == 0
    capsys.readouterr()
    assert "--task: project prompts has ranking already" in mistake(capsys, *flags, "--task", "rating")
    assert "the store has prompts" in mistake(capsys, *export, "--store", store, "--project", "other")
    assert "--shares" in mistake(capsys, *export, "--store", store, "--shares", "half")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"nothing": 1}\n')
    assert f"{bad}:2" in mistake(capsys, "label", "--prompts", bad, "--store", store, "--port", 0)
    assert "label import" in mistake(capsys, "label", "import", bad, "--store", store)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "cannot listen" in mistake(capsys, *flags[:-1], port, "--model", model)


@contextmanager
def started(*flags: object) -> Iterator[tuple[subprocess.Popen[str], str, httpx2.Client]]:
    """The command as a process, the admin's link that it prints, and a browser that came with it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "fledge", "label", *map(str, flags), "--port", "0"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            link = process.stdout.readline().split()[-1]
            with httpx2.Client(
                base_url=link.rpartition("/s/")[0], follow_redirects=True, timeout=30
            ) as client:
                assert client.get(link).status_code == 200  # the socket listens before the link is printed
                yield process, link, client
        finally:
            process.kill()


def task_of(client: httpx2.Client) -> dict[str, Any] | None:
    found = re.search(r'id="task">(.*?)</script>', client.get("/next").text)
    return json.loads(found[1]) if found else None


@pytest.mark.slow
def test_it_prepares_while_people_label(model: Path, prompts: Path, tmp_path: Path) -> None:
    flags = ["--prompts", prompts, "--model", model, "--store", tmp_path / "l.db", "--max-tokens", 8]
    with started(*flags, "--prefill", "shorter", "--labelers", "Ann") as (process, link, client):
        deadline = time.monotonic() + 60
        while (task := task_of(client)) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert task is not None
        assert "filled in by a judge" in client.get("/next").text
        status = client.get("/admin/status").json()
        assert status["error"] is None
        assert sum(status["items"].values()) == 3
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    # The next start goes on; the earlier admin's link has ended.
    with started("--store", tmp_path / "l.db", "--model", model) as (_, _, client):
        again = task_of(client)
        assert again is not None
        assert again["id"] == task["id"]
        assert client.get("/s/" + link.rpartition("/s/")[2]).status_code == 401


@pytest.mark.slow
def test_a_killed_server_keeps_every_answer_it_took(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "completions": ["a", "b"]} for i in range(400)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    taken: set[int] = set()
    for death in range(4):
        flags = ("--prompts", tmp_path / "p.jsonl", "--task", "pairwise", "--store", tmp_path / "l.db")
        with started(*flags) as (process, _, client), suppress(httpx2.TransportError):
            end = threading.Timer(0.2 + 0.13 * death, process.kill)
            end.start()
            while True:
                task = task_of(client)
                assert task is not None
                body = {
                    "answer": {"choice": "tie"},
                    "order": task["order"],
                    "seconds": 1,
                    "key": str(task["id"]),
                }
                answer = client.post(f"/task/{task['id']}/answer", json=body)
                assert answer.status_code == 200
                taken.add(task["id"])
    out = tmp_path / "answers.jsonl"
    assert fledge("label", "export", "--store", tmp_path / "l.db", "--form", "answers", "--out", out) == 0
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert taken
    # An answer whose taking was cut off may be there; one that was taken must be.
    assert len(taken) <= len(kept) <= len(taken) + 4
    store = Store(str(tmp_path / "l.db"))
    try:
        assert store.rebuild() > 0
    finally:
        store.close()
