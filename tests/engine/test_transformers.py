"""Against transformers: the same tokens and scores, for greedy decoding and for each processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fledge.engine.engine import Engine
from fledge.engine.text import load_engine
from fledge.model.checkpoint import save_model
from fledge.model.config import ModelConfig
from fledge.model.transformer import CausalLM
from fledge.tokenizer.bpe import Tokenizer
from fledge.types import SamplingParams

pytestmark = pytest.mark.peers
transformers = pytest.importorskip("transformers")

TEXTS = ["The cats", "Hello", "A café 漢字 sells books; the cats ate.", "🙂"]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def random_weights(family: str, tokenizer: Tokenizer) -> CausalLM:
    model = CausalLM(ModelConfig(family, tokenizer.vocab_size, 32, 48, 2, 4, 2, 8, 128, rope_theta=1e5))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.25, generator=generator)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_theirs_token_for_token(family: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = random_weights(family, tokenizer)
    prompts = tokenizer.encode_batch(TEXTS)
    params = SamplingParams(temperature=0.0, max_tokens=40)
    free = Engine(model, []).generate(prompts, params)
    made_ids = [set(completion.ids) for completion in free]
    # One that ends some rows early and not others.
    some = next(i for row in free for i in row.ids[3:] if not all(i in ids for ids in made_ids))
    eos_ids = [some, next(i for i in range(256) if i not in set.union(*made_ids))]
    save_model(tmp_path, model, tokenizer, {"stage": "sft"}, eos_ids)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    engine, loaded = load_engine(tmp_path)
    assert loaded.encode_batch(TEXTS) == prompts
    made = engine.generate(prompts, params)
    assert {completion.finish_reason for completion in made} == {"stop", "length"}
    for prompt, completion in zip(prompts, made, strict=True):
        ids = torch.tensor([prompt])
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False,
                              pad_token_id=0)[0, len(prompt) :].tolist()  # fmt: skip
        ended = completion.finish_reason == "stop"
        assert completion.ids == (out[:-1] if ended else out)
        assert (out[-1] in eos_ids) == ended


def settings(free: list[int]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Our settings and theirs; `free` is what the model says without any."""
    a, b, _, c = list(dict.fromkeys(free))[:4]
    return [
        ({}, {}),
        ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
        ({"repetition_penalty": 0.6}, {"repetition_penalty": 0.6}),
        ({"logit_bias": {a: -3.0, b: 2.5}}, {"sequence_bias": [[[a], -3.0], [[b], 2.5]]}),
        ({"logit_bias": {a: -100.0}}, {"sequence_bias": [[[a], float("-inf")]]}),
        ({"banned": ((a,), (free[2], b), tuple(free[4:7]))},
         {"bad_words_ids": [[a], [free[2], b], free[4:7]]}),
        ({"stop_ids": (c,), "min_tokens": 12}, {"eos_token_id": c, "min_new_tokens": 12}),
        (
            {"logit_bias": {b: 2.0}, "repetition_penalty": 1.2, "banned": ((free[1], free[2]),),
             "stop_ids": (c,), "min_tokens": 5},
            {"sequence_bias": [[[b], 2.0]], "repetition_penalty": 1.2, "bad_words_ids": [[free[1], free[2]]],
             "eos_token_id": c, "min_new_tokens": 5},
        ),
    ]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_each_processor_gives_their_tokens_and_scores(
    family: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = random_weights(family, tokenizer)
    save_model(tmp_path, model, tokenizer, {"stage": "sft"}, [tokenizer.eos_id])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    prompts = tokenizer.encode_batch(TEXTS)
    engine = Engine(model, [])
    free = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=20))[2].ids
    changed = 0
    for ours, other in settings(free):
        made = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=20, **ours))
        for prompt, completion in zip(prompts, made, strict=True):
            ids = torch.tensor([prompt])
            flags = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 20, "do_sample": False}
            flags |= {"return_dict_in_generate": True, "output_scores": True}
            out = theirs.generate(ids, attention_mask=torch.ones_like(ids), **{**flags, **other})
            expected = out.sequences[0, len(prompt) :].tolist()
            tokens = completion.ids + ([completion.stop_token.id] if completion.stop_token else [])
            assert tokens == expected
            scores = [float(s[0].log_softmax(-1)[i]) for s, i in zip(out.scores, expected, strict=True)]
            sampled = completion.sampled_logps
            sampled = sampled + ([completion.stop_token.sampled_logp] if completion.stop_token else [])
            assert sampled == pytest.approx(scores, abs=1e-4)
        changed += made[2].ids != free
    assert changed >= 6
