"""`fledge sft` on models of others: they get the tokens of a chat, and stay readable elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fledge import cli
from fledge.data.conversations import read_conversations
from fledge.engine.text import load_engine
from fledge.model.checkpoint import load_model, save_model
from fledge.model.config import ModelConfig
from fledge.model.transformer import CausalLM
from fledge.tokenizer.bpe import SPECIAL_TOKENS, Tokenizer
from fledge.tokenizer.chat import encode_chat

from ..foreign import KINDS

pytestmark = pytest.mark.usefixtures("quick")

SHAPE = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 256},
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama3": {"model_type": "llama", "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}},
    "prepend": {"model_type": "mistral", "sliding_window": 9},
    "gpt2": {"model_type": "qwen2", "tie_word_embeddings": True},
}


class Already:
    """The tokenizer's files are there."""

    def save(self, directory: Path) -> None:
        pass


def base(kind: str, directory: Path) -> Path:
    directory.mkdir()
    KINDS[kind](directory)
    size = Tokenizer.load(directory).vocab_size
    model = CausalLM(ModelConfig.from_dict({**SHAPE, **FAMILIES[kind], "vocab_size": size}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
    save_model(directory, model, Already(), {"stage": "pretrain"}, [0])
    return directory


def tune(model: Path, corpus: Path, out: Path) -> None:
    flags = ["--row-tokens", "256", "--batch-tokens", "2048", "--compute", "fp32", "--compile", "no"]
    data = ["--model", str(model), "--data", str(corpus / "chats.jsonl"), "--out", str(out)]
    assert cli.main(["sft", *data, *flags, "--evaluations", "1"]) == 0


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_base_without_chat_tokens_gets_them(
    kind: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = base(kind, tmp_path / "base")
    tune(model, corpus, tmp_path / "run")
    before, after = Tokenizer.load(model), Tokenizer.load(tmp_path / "run" / "model")
    rows = f"embedding rows: {before.vocab_size} -> {before.vocab_size + 8}"
    note = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("tokenizer: "))
    assert rows in note and "8 tokens added (<|im_start|>, <|im_end|>, <tool_call>" in note
    assert set(SPECIAL_TOKENS[1:]) <= after.special_tokens.keys()
    engine, _ = load_engine(tmp_path / "run" / "model")
    assert engine.model.config.vocab_size == after.vocab_size
    assert after.end_of_turn_id in engine.eos_ids and after.eos_id in engine.eos_ids


@pytest.mark.peers
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_result_in_transformers(kind: str, corpus: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tune(base(kind, tmp_path / "base"), corpus, tmp_path / "run")
    directory = tmp_path / "run" / "model"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ours, tokenizer = load_model(directory), Tokenizer.load(directory)
    assert len(their_tokenizer) == tokenizer.vocab_size == theirs.get_input_embeddings().num_embeddings
    messages: list[Any] = [
        {"role": "user", "content": "What is a fox?"},
        {"role": "assistant", "content": "I do not know."},
    ]
    encoded = their_tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    chat = encode_chat(tokenizer, messages)
    assert chat.ids == encoded["input_ids"]
    assert chat.mask == [on == 1 for on in encoded["assistant_masks"]]
    ids = torch.tensor([chat.ids])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)


def test_a_template_with_generation_blocks_is_used_as_it_is(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = base("llama3", tmp_path / "base")
    path = model / "tokenizer_config.json"
    header = "'<|start_header_id|>' + message.role + '<|end_header_id|>\n\n'"
    template = (
        "{{ bos_token }}{% for message in messages %}{{ " + header + " }}{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content + '<|eot_id|>' }}{% endgeneration %}{% else %}"
        "{{ message.content + '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    )
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    tune(model, corpus, tmp_path / "run")
    assert "tokenizer:" not in capsys.readouterr().err
    before, after = Tokenizer.load(model), Tokenizer.load(tmp_path / "run" / "model")
    assert after.fingerprint() == before.fingerprint()
    end = before.special_tokens["<|eot_id|>"]
    generation = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [end, before.eos_id]
    chats = read_conversations(corpus / "chats.jsonl", after, 10_000, False)
    assert all(mask[-1] and ids[-1] == end for ids, mask in zip(chats.ids, chats.masks, strict=True))
