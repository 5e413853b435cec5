"""Answers fit the `openai` package's own models with strict types; what they lack of ours is listed."""

from __future__ import annotations

from pathlib import Path

import pytest

from .live import Server, results

# vLLM's names, and only where a request asks for them.
ASKED_FOR = {
    "/chat/completions extras": {
        "prompt_logprobs", "prompt_token_ids", "choices.token_ids",
    },
    "/chat/completions extras, streamed": {
        "prompt_logprobs", "prompt_token_ids", "choices.token_ids",
    },
    "/completions extras": {
        "choices.prompt_logprobs", "choices.prompt_token_ids", "choices.token_ids",
    },
    "/completions extras, streamed": {
        "choices.prompt_logprobs", "choices.prompt_token_ids", "choices.token_ids",
    },
    "models": {"kind", "max_model_len"},
}  # fmt: skip


@pytest.mark.slow
def test_answers_have_the_form_that_the_client_expects(server: Server, tmp_path: Path) -> None:
    found = results("openai", "strictly.py", tmp_path, server.v1)
    assert len(found) > 30
    for name, (wrong, extras) in found.items():
        assert wrong == [], name
        assert set(extras) == ASKED_FOR.get(name, set()), name
