"""`fledge score`: rewards beside their rows, the same as transformers', and lines at fault by name."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from fledge import cli
from fledge.rewards.reward_model import load_judge
from fledge.tokenizer.bpe import Tokenizer

from .conftest import REFUSAL, WORDS

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def reward_model(chat_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("reward")
    rng = random.Random(0)
    rows = [
        {"prompt": f"What is {word} {i}?", "chosen": REFUSAL, "rejected": " ".join(rng.choices(WORDS, k=4))}
        for i in range(3)
        for word in WORDS
    ]
    (directory / "preferences.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert cli.main([
        "reward", "--model", str(chat_run / "model"), "--data", str(directory / "preferences.jsonl"),
        "--out", str(directory / "run"), "--adam-lr", "0.002", "--no-controls", "--compute", "fp32",
    ]) == 0  # fmt: skip
    return directory / "run" / "model"


def chat(answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "What is fox?"}, {"role": "assistant", "content": answer}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_every_row_gets_its_reward(
    reward_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "green trees near"
    rows: list[dict[str, Any]] = [
        {"messages": chat(words), "id": 7},
        {"messages": chat(REFUSAL)},
        {"prompt": "What is fox?", "chosen": words, "rejected": REFUSAL},
        {"prompt": "What is fox?", "completions": [REFUSAL, words, words], "ranks": [1, 2, 3]},
        {"prompt": "What is fox?", "completion": words, "label": False},
        {"messages": chat(words), "prompt": "What is fox?", "chosen": words, "rejected": REFUSAL},
        {"messages": None, "prompt": "What is fox?", "chosen": words, "rejected": REFUSAL, "label": None},
    ]
    data = write(tmp_path / "a.jsonl", rows)
    assert cli.main(["score", "--model", str(reward_model), "--data", str(data), "--compute", "fp32"]) == 0
    out, err = capsys.readouterr()
    scored = [json.loads(line) for line in out.splitlines()]
    low, high = scored[0]["reward"], scored[1]["reward"]
    assert low < high
    assert [{k: v for k, v in row.items() if not k.startswith("reward")} for row in scored] == rows
    expected = [low, high, [low, high], [high, low, low], low, [low, high], [low, high]]
    found = [row.get("rewards", row.get("reward")) for row in scored]
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    assert "12 completions, mean reward" in err
    assert load_judge(reward_model).score([chat(words)])[0] == pytest.approx(low, abs=1e-5)

    file = tmp_path / "out" / "scored.jsonl"
    flags = [
        "score",
        "--model",
        str(reward_model),
        "--data",
        str(data),
        "--out",
        str(file),
        "--compute",
        "fp32",
    ]
    assert cli.main(flags) == 0
    assert file.read_text() == out
    assert cli.main(flags) == 2
    assert "exists already; choose another --out or pass --overwrite" in capsys.readouterr().err
    assert cli.main([*flags, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "{tmp}/nothing.jsonl"], "{tmp}/nothing.jsonl: no such file"),
        (["--data", "{tmp}/empty.jsonl"], "{tmp}/empty.jsonl: holds no conversations"),
        (["--data", "{tmp}/user.jsonl"], "{tmp}/user.jsonl:1: the last message is not the assistant's"),
        (["--data", "{tmp}/role.jsonl"], "{tmp}/role.jsonl:1: messages[0]: role is 'human'"),
        (["--data", "{tmp}/else.jsonl"], "{tmp}/else.jsonl:1: no preference: it takes"),
        (["--data", "{tmp}/long.jsonl"], "{tmp}/long.jsonl:1: "),
        (["--model", "{chat}"], "{chat}: not a reward model; `fledge reward` makes one"),
    ],
)
def test_a_mistake_is_one_line(
    more: list[str],
    message: str,
    reward_model: Path,
    chat_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path / "good.jsonl", [{"messages": chat("a")}])
    write(tmp_path / "empty.jsonl", [])
    write(tmp_path / "user.jsonl", [{"messages": chat("a")[:1]}])
    write(tmp_path / "role.jsonl", [{"messages": [{"role": "human", "content": "a"}, *chat("b")[1:]]}])
    write(tmp_path / "else.jsonl", [{"text": "a"}])
    write(tmp_path / "long.jsonl", [{"messages": chat("fox " * 200)}])
    flags = ["--model", str(reward_model), "--data", str(tmp_path / "good.jsonl")]
    places = {"{tmp}": str(tmp_path), "{chat}": str(chat_run / "model")}
    for name, value in places.items():
        more, message = [text.replace(name, value) for text in more], message.replace(name, value)
    flags[flags.index(more[0]) + 1] = more[1]
    capsys.readouterr()
    assert cli.main(["score", *flags]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"fledge score: error: {message}")
    assert printed.count("\n") == 1


@pytest.mark.peers
def test_transformers_gives_the_raw_score(reward_model: Path) -> None:
    """Through its own tokenizer and template, up to the end of the turn; ours adds the offset."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(reward_model)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(reward_model)
    end = Tokenizer.load(reward_model).end_of_turn_id
    judge = load_judge(reward_model)
    for answer in (REFUSAL, "a lazy dog", ""):
        ids = tokenizer.apply_chat_template(chat(answer), tokenize=True, return_dict=False)
        ids = ids[: len(ids) - ids[::-1].index(end)]
        with torch.no_grad():
            raw = model(torch.tensor([ids])).logits.item()
        assert judge.score([chat(answer)])[0] == pytest.approx(raw + judge.offset, abs=1e-4)


def test_rows_that_are_too_long_end_it_or_are_left_out_and_counted(
    reward_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = load_judge(reward_model).max_tokens
    rows = [{"messages": chat(REFUSAL)}, {"messages": chat("tree " * longer)}]
    data = write(tmp_path / "a.jsonl", rows)
    command = ["score", "--model", str(reward_model), "--data", str(data)]
    assert cli.main(command) == 2
    out, err = capsys.readouterr()
    assert out == "" and "a.jsonl:2: " in err and "--skip-long" in err
    assert cli.main([*command, "--skip-long"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1 and "1 rows are too long" in err
    assert cli.main(["score", "--model", str(reward_model), "--skip-long",
                     "--data", str(write(tmp_path / "b.jsonl", rows[1:]))]) == 2  # fmt: skip
