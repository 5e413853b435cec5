"""lm-evaluation-harness on a model, by itself and through a server: `with_lm_eval.py BASE_URL MODEL TASKS`.

JSON on the last line: by run and task the figures, and of every sample the log-likelihoods and texts.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

BASE_URL, MODEL, TASKS = sys.argv[1:]
NAMES = ["fledge_choices", "fledge_perplexity", "fledge_text"]
WINDOW = 200
# Its windows of a long text are two tokens shorter than `max_length`: one is made, one stands before.
API = {"model": "assistant", "base_url": f"{BASE_URL}/completions", "max_length": WINDOW + 2}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "itself": ("hf", {"pretrained": MODEL, "device": "cpu", "dtype": "float32", "max_length": WINDOW}),
    # By default it takes the server's own tokenizer.
    "remote": ("local-completions", {**API, "num_concurrent": 4}),
    "local": ("local-completions", {**API, "tokenizer": MODEL, "tokenizer_backend": "huggingface",
                                    "batch_size": 4}),
}  # fmt: skip


def measure(kind: str, arguments: dict[str, Any]) -> dict[str, Any]:
    tasks = TaskManager(include_path=TASKS, include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=kind, model_args=arguments, tasks=NAMES, task_manager=tasks, log_samples=True, bootstrap_iters=0
    )
    return {
        name: {
            "figures": {
                key.partition(",")[0]: value
                for key, value in found["results"][name].items()
                if isinstance(value, float)
            },
            "samples": [[list(one) if isinstance(one, tuple) else one for one in sample["filtered_resps"]]
                        for sample in sorted(found["samples"][name], key=lambda sample: sample["doc_id"])],
        }
        for name in NAMES
    }  # fmt: skip


print(json.dumps({run: measure(*settings) for run, settings in RUNS.items()}))
