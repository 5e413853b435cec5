"""Against transformers: greedy answers, token for token."""

from __future__ import annotations

from pathlib import Path

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


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_greedy_is_theirs_token_for_token(family: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = CausalLM(ModelConfig(family, tokenizer.vocab_size, 32, 48, 2, 4, 2, 8, 128, rope_theta=1e5))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.25, generator=generator)
    texts = ["The cats", "Hello", "A café 漢字 sells books; the cats ate.", "🙂"]
    prompts = tokenizer.encode_batch(texts)
    params = SamplingParams(temperature=0.0, max_tokens=40)
    free = Engine(model, []).generate(prompts, params)
    eos_ids = [free[0].ids[17], free[2].ids[9]]  # so that some rows end early
    save_model(tmp_path, model, tokenizer, {"stage": "sft"}, eos_ids)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    engine, loaded = load_engine(tmp_path)
    assert loaded.encode_batch(texts) == prompts
    made = engine.generate(prompts, params)
    assert {completion.finish_reason for completion in made} == {"stop", "length"}
    for prompt, completion in zip(prompts, made, strict=True):
        ids = torch.tensor([prompt])
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False,
                              pad_token_id=0)[0, len(prompt) :].tolist()  # fmt: skip
        ended = completion.finish_reason == "stop"
        assert completion.ids == (out[:-1] if ended else out)
        assert (out[-1] in eos_ids) == ended
