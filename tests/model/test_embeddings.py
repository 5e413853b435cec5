"""New rows for new tokens: where they are, what they are, and that the old tokens' scores stay."""

from __future__ import annotations

import pytest
import torch

from fledge.model.config import ModelConfig
from fledge.model.embeddings import add_token_rows
from fledge.model.transformer import CausalLM


def model_of(tied: bool) -> CausalLM:
    model = CausalLM(ModelConfig("llama", 50, 16, 24, 2, 4, 2, 4, 32, tie_word_embeddings=tied))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.5, 0.3, generator=generator)
    return model


def seed() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("tied", [True, False])
def test_old_tokens_keep_their_scores(tied: bool) -> None:
    model = model_of(tied)
    ids = torch.tensor([[1, 2, 49]])
    with torch.no_grad():
        before = model(ids)
        add_token_rows(model, [50, 53], seed())
        after = model(ids)
    torch.testing.assert_close(after[..., :50], before)
    assert after.shape[-1] == model.config.vocab_size == 54
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_near_the_mean_and_differ(tied: bool) -> None:
    model = model_of(tied)
    old = [model.model.embed_tokens.weight.clone(), model.lm_head.weight.clone()]
    add_token_rows(model, [7, 50, 51], seed())
    for weight, before in zip([model.model.embed_tokens.weight, model.lm_head.weight], old, strict=True):
        others = torch.cat([before[:7], before[8:]])
        new = weight[[7, 50, 51]]
        assert (new - others.mean(0)).abs().max() < 0.06 * others.std(0).max()
        assert len(new.unique(dim=0)) == 3
        assert torch.equal(torch.cat([weight[:7], weight[8:50]]), others)


def test_a_new_token_is_no_more_probable_than_the_average() -> None:
    """Hewitt's argument: the mean's score is the mean score, so at most the average probability (Jensen)."""
    model = model_of(False)
    add_token_rows(model, [50], seed())
    with torch.no_grad():
        probabilities = model(torch.arange(50)[None]).softmax(-1)[0]
    assert (probabilities[:, 50] < 1.05 * probabilities[:, :50].mean(1)).all()


def test_rows_that_the_model_has_already_take_no_more() -> None:
    model = model_of(True)
    add_token_rows(model, [48, 49], seed())
    assert model.config.vocab_size == 50
    add_token_rows(model, [], seed())
    assert model.config.vocab_size == 50


def test_the_same_seed_gives_the_same_rows() -> None:
    weights = []
    for _ in range(2):
        model = model_of(False)
        add_token_rows(model, range(50, 60), seed())
        weights.append(model.lm_head.weight)
    assert torch.equal(*weights)


def test_types_are_kept() -> None:
    model = model_of(False).to(torch.bfloat16)
    add_token_rows(model, [50], seed())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
