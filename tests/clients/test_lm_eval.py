"""lm-evaluation-harness: through the server it measures what it measures on the model itself."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from .assistant import HELLO, NUMBERS
from .live import Server, results

pytestmark = pytest.mark.slow
TASK = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
num_fewshot: 0
metadata:
  version: 1
"""
CHOICES = """
task: fledge_choices
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""
PERPLEXITY = """
task: fledge_perplexity
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
"""
TEXT = """
task: fledge_text
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["\\n\\n", "twelve"]
  max_gen_toks: 20
  do_sample: false
metric_list:
  - metric: exact_match
"""


def chat(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def write_tasks(folder: Path) -> None:
    random_ = random.Random(0)
    words = f"{NUMBERS} weather hello JSON Paris Rome degrees café 漢字".split()
    # After a right answer the most probable token is one that ends the text.
    questions = [
        *(
            {"question": chat(asked) + begun, "choices": [wrong, right.removeprefix(begun)], "answer": 1}
            for asked, begun, right, wrong in (
                ("Say hello.", "Hello", HELLO, " there"),
                ("Count to twelve.", "one", NUMBERS, " two four"),
            )
        ),
        {"question": "one two three", "choices": [" four", " five six", " Paris", " twelve"], "answer": 0},
        *(
            {
                "question": " ".join(random_.choices(words, k=random_.randint(1, 20))),
                "choices": [
                    " " + " ".join(random_.choices(words, k=random_.randint(1, 6))) for _ in range(4)
                ],
                "answer": random_.randrange(4),
            }
            for _ in range(8)
        ),
    ]
    pages = [{"page": " ".join(random_.choices(words, k=k)) + "\n"} for k in (1, 30, 420)]
    asked = [
        {"question": chat("Say hello."), "answer": HELLO},
        {"question": chat("Count to twelve."), "answer": NUMBERS.removesuffix("twelve")},
        {"question": "one two", "answer": "three"},
    ]
    for name, rows, form in (
        ("choices", questions, CHOICES), ("perplexity", pages, PERPLEXITY), ("text", asked, TEXT),
    ):  # fmt: skip
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)) + "\n")
        (folder / f"{name}.yaml").write_text(form + TASK.format(data=data))


@pytest.fixture(scope="module")
def found(server: Server, assistant: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("home")
    tasks = home / "tasks"
    tasks.mkdir()
    write_tasks(tasks)
    return results("lm_eval", "with_lm_eval.py", home, server.v1, assistant, tasks)


@pytest.mark.parametrize("run", ["remote", "local"])
def test_the_same_numbers_as_on_the_model_itself(found: dict[str, Any], run: str) -> None:
    for name, wanted in found["itself"].items():
        made = found[run][name]
        for one, other in zip(made["samples"], wanted["samples"], strict=True):
            assert_alike(one, other)
        assert made["figures"] == pytest.approx(wanted["figures"], rel=1e-5)


def test_the_tasks_tell_models_apart(found: dict[str, Any]) -> None:
    itself = found["itself"]
    assert 0 < itself["fledge_choices"]["figures"]["acc"] < 1
    assert [choice[1] for choice in itself["fledge_choices"]["samples"][0]] == [True, True]
    assert itself["fledge_text"]["samples"][0] == [HELLO]


def assert_alike(made: list[Any], wanted: list[Any]) -> None:
    """Texts, or log-likelihoods with whether they are the most probable."""
    for one, other in zip(made, wanted, strict=True):
        if isinstance(other, list):
            assert one[0] == pytest.approx(other[0], rel=1e-6, abs=1e-4) and one[1] == other[1]
        elif isinstance(other, float):
            assert one == pytest.approx(other, rel=1e-6, abs=1e-4)
        else:
            assert one == other
