"""`fledge evaluate --samples`: figures that can be counted again from the answers, and mistakes named."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from fledge import cli
from fledge.model.checkpoint import load_model, save_model
from fledge.model.heads import RewardModel
from fledge.rewards.reward_model import save_reward_model
from fledge.tokenizer.bpe import Tokenizer, train_bpe

from ..models import chain_model
from .commands import summary, write_jsonl

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def guesser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers 5 (for three in five), 6 or 7 to everything, and after 7 never stops."""
    directory = tmp_path_factory.mktemp("guesser") / "model"
    tokenizer = train_bpe(["aa"], 265)
    new_line, five, six, seven = (tokenizer.encode(text)[0] for text in "\n567")
    model = chain_model(tokenizer, {new_line: five, seven: seven})
    with torch.no_grad():
        for token, share in ((five, 0.6), (six, 0.25), (seven, 0.15)):
            # The norm before the head makes the one of an id as large as the root of the width.
            logit = torch.tensor(share).log() / tokenizer.vocab_size**0.5
            model.lm_head.weight[token, new_line] = 20.0 + logit
    directory.mkdir()
    assert tokenizer.end_of_turn_id is not None
    save_model(directory, model, tokenizer, {"stage": "sft"}, [tokenizer.end_of_turn_id, tokenizer.eos_id])
    return directory


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """Ten problems: 5 is right for six of them, 6 for three, 9 for one."""
    directory = tmp_path / "sums"
    directory.mkdir()
    rows = [{"prompt": f"{i}?", "answer": answer} for i, answer in enumerate("5555556669")]
    write_jsonl(directory / "test.jsonl", rows)
    (directory / "manifest.json").write_text(json.dumps({"task": "sums", "reward": "exact"}))
    return directory


def evaluated(out: Path, model: Path, task: Path, *flags: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    command = [
        "evaluate",
        "--model",
        str(model),
        "--tasks",
        str(task),
        "--out",
        str(out),
        "--compute",
        "fp32",
    ]
    assert cli.main([*command, "--completion-tokens", "6", *flags]) == 0
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    return summary(out)["tasks"][task.stem], rows


def test_the_figures_are_those_of_the_answers(guesser: Path, task: Path, tmp_path: Path) -> None:
    figures, rows = evaluated(tmp_path / "out", guesser, task, "--samples", "6")
    assert figures["greedy"]["successes"] == 6 and figures["problems"] == 10
    assert figures["greedy"]["tokens"] == 2.0, "5 and the end of the turn"
    samples = [row["samples"] for row in rows]
    texts = {one["text"] for one in itertools.chain(*samples)}
    assert texts == {"5", "6", "777777"}, "all three are drawn"
    for row, gold in zip(rows, "5555556669", strict=True):
        for one in row["samples"]:
            ended = one["text"] != "777777"
            assert one["right"] == (one["text"] == gold)
            assert one["vote"] == (one["text"] if ended else None)
            assert one["tokens"] == (2 if ended else 6)
    assert figures["cut_off"] == sum(one["vote"] is None for one in itertools.chain(*samples))
    assert figures["first"]["successes"] == sum(some[0]["right"] for some in samples)
    ends = {way: points[-1] for way, points in figures["curves"].items()}
    assert set(ends) == {"verifier", "vote"} and {end["k"] for end in ends.values()} == {6}
    assert ends["verifier"]["mean"] == pytest.approx(
        sum(any(one["right"] for one in some) for some in samples) / 10
    )
    assert ends["vote"]["tokens"] == pytest.approx(
        sum(one["tokens"] for one in itertools.chain(*samples)) / 10
    )
    votes = [Counter(one["vote"] for one in some if one["vote"]).most_common() for some in samples]
    clear = [not some[1:] or some[0][1] > some[1][1] for some in votes]
    assert any(clear)
    least = sum(
        one and some[0][0] == gold for one, some, gold in zip(clear, votes, "5555556669", strict=True)
    )
    assert least / 10 <= ends["vote"]["mean"] <= (least + clear.count(False)) / 10
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"{ends['vote']['mean']:.1%}" in page and "<svg" in page


def test_the_same_seed_gives_the_same_answers(guesser: Path, task: Path, tmp_path: Path) -> None:
    flags = ["--samples", "3", "--limit", "4"]
    first = evaluated(tmp_path / "a", guesser, task, *flags)
    assert evaluated(tmp_path / "b", guesser, task, *flags, "--batch-size", "2") == first
    assert evaluated(tmp_path / "c", guesser, task, *flags, "--seed", "1")[1] != first[1]
    assert len(first[1]) == 4


def test_a_reward_model_that_likes_all_alike_takes_the_first(
    guesser: Path, task: Path, tmp_path: Path
) -> None:
    """Only answers that ended have a reward."""
    tokenizer = Tokenizer.load(guesser)
    (tmp_path / "judge").mkdir()
    model = RewardModel(load_model(guesser), torch.Generator().manual_seed(0))
    save_reward_model(
        tmp_path / "judge", 0, model=model, tokenizer=tokenizer, origin={"stage": "reward"}, base=guesser
    )
    flags = ["--samples", "4", "--reward-model", str(tmp_path / "judge")]
    figures, rows = evaluated(tmp_path / "out", guesser, task, *flags)
    firsts = [next(iter([one for one in row["samples"] if one["vote"]]), None) for row in rows]
    right = sum(one is not None and one["right"] for one in firsts)
    assert figures["curves"]["reward_model"][-1]["mean"] == pytest.approx(right / 10)
    for one in itertools.chain.from_iterable(row["samples"] for row in rows):
        assert (one["reward"] is None) == (one["vote"] is None)


def test_a_base_model_goes_on_from_the_prompt(tmp_path: Path) -> None:
    """Asked plainly, it reads the problem and nothing else: here it counts on."""
    tokenizer = train_bpe(["aa"], 265)
    ids = tokenizer.encode("0123456")
    model = chain_model(tokenizer, dict(itertools.pairwise([*ids, tokenizer.eos_id])))
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", model, tokenizer, {"stage": "pretrain"}, [tokenizer.eos_id])
    write_jsonl(
        tmp_path / "counting.jsonl", [{"prompt": "x3", "answer": "456"}, {"prompt": "5", "answer": 7}]
    )
    flags = ["--ask", "plain", "--reward", "exact", "--samples", "2"]
    figures, rows = evaluated(tmp_path / "out", tmp_path / "model", tmp_path / "counting.jsonl", *flags)
    assert [row["greedy"]["text"] for row in rows] == ["456", "6"]
    assert [point["mean"] for point in figures["curves"]["vote"]] == [0.5, 0.5]


def test_a_baseline_scores_the_same_texts(guesser: Path, tmp_path: Path) -> None:
    """An n-gram model has counted them, the guesser has not; both are in the table and the report."""
    rows = [{"text": f"the quick brown fox jumps over {i} lazy dogs"} for i in range(300)]
    data = ["--data", f"notes={write_jsonl(tmp_path / 'a.jsonl', rows)}"]
    assert cli.main([
        "pretrain", "--model-type", "ngram", "--order", "3", *data, "--tokenizer", str(guesser),
        "--out", str(tmp_path / "ngram"),
    ]) == 0  # fmt: skip
    command = ["evaluate", "--model", str(guesser), *data, "--compute", "fp32"]
    ngram = str(tmp_path / "ngram" / "model")
    assert cli.main([*command, "--baseline", ngram, "--out", str(tmp_path / "both")]) == 0
    command[2] = ngram
    assert cli.main([*command, "--out", str(tmp_path / "alone")]) == 0
    both, alone = summary(tmp_path / "both"), summary(tmp_path / "alone")
    assert both["baseline"] == {"model": ngram, "bits_per_byte": alone["bits_per_byte"]}
    assert both["baseline"]["bits_per_byte"]["notes"] < both["bits_per_byte"]["notes"]
    assert alone["baseline"] is None
    assert f"{alone['bits_per_byte']['notes']:.3f}" in (tmp_path / "both" / "report.html").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "{tmp}/plain.jsonl"], "name it with --reward"),
        (["--tasks", "{tmp}/plain.jsonl", "--reward", "exat"], "nearest is 'exact'"),
        (["--tasks", "{tmp}/none.jsonl", "--reward", "exact"], "{tmp}/none.jsonl"),
        (
            ["--tasks", "{tmp}/plain.jsonl", "--reward", "exact"],
            'plain.jsonl:1: the row has no field "answer"',
        ),
        (["--tasks", "{tmp}/plain.jsonl", "--reward", "{tmp}/r.py:f"], "with --right-from"),
        (["--tasks", "{tmp}/sums", "{tmp}/other/sums"], "two files are called 'sums'"),
        (["--tasks", "{tmp}/sums", "--samples", "0"], "--samples 0: must be at least 1"),
        (["--tasks", "{tmp}/sums", "--temperature", "0"], "--temperature 0.0: must be above 0"),
        (["--tasks", "{tmp}/sums", "--ask", "plain", "--reward-model", "x"], "leave --ask plain out"),
        (["--tasks", "{tmp}/sums", "--baseline", "x"], "--baseline scores the texts of --data"),
    ],
)
def test_mistakes(
    flags: list[str], message: str, guesser: Path, task: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write_jsonl(tmp_path / "plain.jsonl", [{"prompt": "a"}])
    (tmp_path / "r.py").write_text("def f(rollouts):\n    return [1.0 for _ in rollouts]")
    words = [word.replace("{tmp}", str(tmp_path)) for word in flags]
    assert cli.main(["evaluate", "--model", str(guesser), "--out", str(tmp_path / "out"), *words]) == 2
    assert message.replace("{tmp}", str(tmp_path)) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
