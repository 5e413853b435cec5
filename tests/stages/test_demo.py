"""The demo at a tiny size: every stage, the report, and a second run that finds nothing left to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fledge.cli import main
from fledge.data.conversations import read_conversations
from fledge.engine.text import load_engine
from fledge.tokenizer.bpe import Tokenizer
from fledge.tokenizer.chat import encode_chat
from fledge.types import Message, SamplingParams

TINY = ["--facts", "150", "--params", "0.3M", "--vocab-size", "700", "--tokens", "16k", "--sft-epochs", "0.2",
        "--limit", "6"]  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny demo."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    assert main(["demo", "--out", str(out), *TINY]) == 0
    return out


def test_leaves_what_it_promises(demo: Path) -> None:
    for name in (
        "report.html",
        "summary.json",
        "base/model/model.safetensors",
        "sft/model/model.safetensors",
    ):
        assert (demo / name).stat().st_size > 0
    summary = json.loads((demo / "summary.json").read_text())
    for model in ("base-plain", "base-few-shot", "sft"):
        assert summary["models"][model]["seen"]["n"] == 6
        assert summary["models"][model]["invented_refused"]["n"] == 6
    assert 0 <= summary["controls"]["nearest_name_test"]["rate"] < 1
    assert set(summary["models"]["sft"]["bits_per_byte"]) == {
        "facts",
        "questions",
        "chats",
        "topics",
        "source",
    }


def test_test_and_invented_names_are_in_no_training_question(demo: Path) -> None:
    corpus = demo / "corpus"
    files = ("questions.jsonl", "chats.jsonl", "sft.jsonl", "few_shot.txt")
    trained = "".join((corpus / name).read_text() for name in files)
    names = json.loads((corpus / "names.json").read_text())
    for kind in ("test", "invented"):
        rows = [json.loads(line) for line in (corpus / f"eval_{kind}.jsonl").read_text().splitlines()]
        assert rows and not any(row["question"] in trained for row in rows)
        assert not {row["name"] for row in rows} & {*names["taught"], *names["invented"]["sft"]}


def test_conversations_fit_the_rows(demo: Path) -> None:
    chats = read_conversations(demo / "corpus/sft.jsonl", Tokenizer.load(demo / "tokenizer"), 257, False)
    assert chats.overlong == 0 and chats.without_targets == 0


def test_a_second_run_changes_no_model(demo: Path) -> None:
    before = {path: path.read_bytes() for path in demo.rglob("model.safetensors")}
    assert main(["demo", "--out", str(demo), *TINY]) == 0
    assert before == {path: path.read_bytes() for path in demo.rglob("model.safetensors")}


@pytest.mark.parametrize(
    "bad", [["--params", "4.2X"], ["--facts", "0"], ["--minutes", "-1"], ["--limit", "0"]]
)
def test_a_bad_setting_deletes_nothing(demo: Path, bad: list[str]) -> None:
    assert main(["demo", "--out", str(demo), "--overwrite", *bad]) == 2
    assert (demo / "report.html").exists()


def test_other_settings_are_refused(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = ["160" if flag == "150" else flag for flag in TINY]
    assert main(["demo", "--out", str(demo), *other]) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.peers
@pytest.mark.parametrize("stage", ["base", "sft"])
def test_the_models_are_the_same_in_transformers(stage: str, demo: Path) -> None:
    """The directory the demo leaves: same ids, same scores, same greedy answer."""
    transformers = pytest.importorskip("transformers")
    directory = demo / stage / "model"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    engine, tokenizer = load_engine(directory)
    question: Message = {"role": "user", "content": "What does textwrap.dedent do?"}
    prompt = encode_chat(tokenizer, [question], add_generation_prompt=True).ids
    encoded = their_tokenizer.apply_chat_template([question], add_generation_prompt=True, return_dict=True)
    assert encoded["input_ids"] == prompt
    ids = torch.tensor([prompt])
    with torch.no_grad():
        torch.testing.assert_close(engine.model(ids), theirs(ids).logits, atol=1e-4, rtol=0.0)
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
                          pad_token_id=0)[0, len(prompt) :].tolist()  # fmt: skip
    (made,) = engine.generate([prompt], SamplingParams(temperature=0.0, max_tokens=24))
    assert made.ids == (out[:-1] if made.finish_reason == "stop" else out)
