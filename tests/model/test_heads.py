"""The reward model: its head, where it is read, and that its directory is one of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fledge.errors import UserError
from fledge.model.checkpoint import load_model, load_reward_model, save_model
from fledge.model.config import ModelConfig
from fledge.model.heads import RewardModel, add_blocks
from fledge.model.transformer import CausalLM


class NoTokenizer:
    def save(self, directory: Path) -> None:
        pass


PAD = 49


def language_model(family: str = "qwen3", tied: bool = True) -> CausalLM:
    model = CausalLM(ModelConfig(family, 50, 16, 24, 2, 4, 2, 4, 32, tie_word_embeddings=tied))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model


def rows(lengths: tuple[int, ...] = (7, 3, 10)) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, PAD, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    for row, length in zip(ids, lengths, strict=True):
        row[length:] = PAD
    return ids, torch.tensor(lengths) - 1


def test_a_row_is_read_at_its_last_token_whatever_follows() -> None:
    model = RewardModel(language_model(), torch.Generator().manual_seed(0))
    ids, last = rows()
    together = model(ids, last)
    alone = [model(row[None, : end + 1], end[None])[0] for row, end in zip(ids, last, strict=True)]
    torch.testing.assert_close(together, torch.stack(alone))
    assert together.dtype == torch.float32


def test_the_head_starts_as_small_as_it_should() -> None:
    """N(0, 1 / (C + 1)): over many seeds its variance is that, to three standard errors."""
    config = ModelConfig("llama", 4, 64, 8, 1, 1, 1, 8, 8)
    draws = [
        RewardModel(CausalLM(config), torch.Generator().manual_seed(seed)).score.weight.detach()
        for seed in range(60)
    ]
    drawn = torch.cat(draws).flatten()
    assert float(drawn.var()) * 65 == pytest.approx(1.0, abs=3 * (2 / drawn.numel()) ** 0.5)
    assert abs(float(drawn.mean())) < 3 * (1 / 65 / drawn.numel()) ** 0.5


def test_a_saved_reward_model_scores_the_same(tmp_path: Path) -> None:
    model = RewardModel(language_model(), torch.Generator().manual_seed(0))
    save_model(tmp_path, model, NoTokenizer(), {"stage": "reward"}, [1], pad_id=PAD)
    again = load_reward_model(tmp_path)
    assert torch.equal(model(*rows()), again(*rows()))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForSequenceClassification"]
    assert (config["num_labels"], config["pad_token_id"]) == (1, PAD)
    assert "text-classification" in (tmp_path / "README.md").read_text()
    with pytest.raises(UserError, match="a reward model, which gives scores and no text"):
        load_model(tmp_path)


def test_a_language_model_is_no_reward_model(tmp_path: Path) -> None:
    save_model(tmp_path, language_model(), NoTokenizer(), {"stage": "sft"}, [1])
    with pytest.raises(UserError, match="not a reward model; `fledge reward` makes one"):
        load_reward_model(tmp_path)


@pytest.mark.peers
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_transformers_gives_the_same_scores(family: str, tied: bool, tmp_path: Path) -> None:
    """Padded and in one batch, through AutoModelForSequenceClassification; and what it saves loads here."""
    transformers = pytest.importorskip("transformers")
    model = RewardModel(language_model(family, tied), torch.Generator().manual_seed(0))
    save_model(tmp_path, model, NoTokenizer(), {"stage": "reward"}, [1], pad_id=PAD)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert theirs.config.num_labels == 1
    ids, last = rows()
    with torch.no_grad():
        logits = theirs(input_ids=ids, attention_mask=(ids != PAD).long()).logits[:, 0]
        torch.testing.assert_close(model(ids, last), logits, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_reward_model(tmp_path / "theirs")
    torch.testing.assert_close(again(ids, last), model(ids, last))


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "mistral"])
def test_new_blocks_change_nothing_at_first_and_are_all_that_learns(family: str) -> None:
    plain = RewardModel(language_model(family), torch.Generator().manual_seed(0))
    grown_lm = language_model(family)
    add_blocks(grown_lm, 2, torch.Generator().manual_seed(3))
    grown = RewardModel(grown_lm, torch.Generator().manual_seed(0))
    ids, last = rows()
    torch.testing.assert_close(grown(ids, last), plain(ids, last))
    assert grown.config.num_hidden_layers == plain.config.num_hidden_layers + 2
    learning = {name for name, parameter in grown.named_parameters() if parameter.requires_grad}
    own = {name for name, _ in plain.named_parameters()} - {"model.norm.weight", "score.weight"}
    assert learning == {name for name, _ in grown.named_parameters()} - own
    grown(ids, last).sum().backward()
    writes = [block.mlp.down_proj.weight.grad for block in grown.model.layers[2:]]
    assert all(grad is not None and bool(grad.any()) for grad in writes)


def test_new_blocks_have_the_window_of_the_last_one(tmp_path: Path) -> None:
    config = ModelConfig(
        "mistral", 50, 16, 24, 2, 4, 2, 4, 32, sliding_window=4, layer_types=("sliding_attention",) * 2
    )
    model = CausalLM(config)
    model.init_weights(torch.Generator().manual_seed(0))
    add_blocks(model, 1, torch.Generator().manual_seed(1))
    assert model.config.layer_types == ("sliding_attention",) * 3
    reward_model = RewardModel(model, torch.Generator().manual_seed(0))
    save_model(tmp_path, reward_model, NoTokenizer(), {}, [1], pad_id=PAD)
    ids, last = rows()
    torch.testing.assert_close(load_reward_model(tmp_path)(ids, last), reward_model(ids, last))
