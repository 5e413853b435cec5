"""The one dial: a number of parameters in, a model of about that size out."""

from __future__ import annotations

import itertools

import pytest
import torch

from fledge.errors import UserError
from fledge.model.transformer import CausalLM
from fledge.train.recipe import adapted, intermediate_size_for, model_config, parse_count, recipe_for

SIZES = [5e6, 7e6, 10e6, 20e6, 35e6, 50e6, 100e6, 125e6, 350e6, 500e6, 1e9]
VOCABULARIES = [4_096, 8_192, 16_384, 32_000, 50_257, 100_000, 150_000]


@pytest.mark.parametrize(
    ("text", "count"),
    [("10M", 10_000_000), ("1.5B", 1_500_000_000), ("300k", 300_000), ("300K", 300_000), ("5.6m", 5_600_000),
     ("5000000", 5_000_000), (" 2 M ", 2_000_000), ("0.5k", 500)],
)  # fmt: skip
def test_counts(text: str, count: int) -> None:
    assert parse_count(text, "params") == count


@pytest.mark.parametrize(
    "text", ["", "M", "0", "0.0M", "-3M", "ten", "1T", "1e6", "1,000", "1.M", "1M2", "nan"]
)
def test_what_is_no_count_is_named(text: str) -> None:
    with pytest.raises(UserError, match=r"--tokens .*: write a positive number, as in 10M"):
        parse_count(text, "tokens")


def test_a_count_below_one_is_none() -> None:
    with pytest.raises(UserError, match="positive number"):
        parse_count("0.0001k", "tokens")


def parameters(params: float, vocab_size: int) -> int:
    """As the model itself counts them."""
    recipe = recipe_for(round(params), vocab_size)
    with torch.device("meta"):
        return CausalLM(model_config(recipe, "llama", vocab_size, 1024)).num_parameters()


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_the_size_is_about_what_was_asked_for(vocab_size: int) -> None:
    """Within 15% from 5M to 1B, or refused where the smallest embedding leaves nothing for a block."""
    sizes = []
    for params in SIZES:
        if params < 64 * vocab_size + 53_248:
            with pytest.raises(UserError, match="needs at least"):
                recipe_for(round(params), vocab_size)
        else:
            sizes.append(parameters(params, vocab_size))
            assert 0.85 <= sizes[-1] / params <= 1.15, (params, sizes[-1])
    assert len(sizes) >= 9
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("vocab_size", [4_096, 50_257])
def test_a_larger_model_learns_slower_from_larger_batches_and_more_text(vocab_size: int) -> None:
    recipes = [recipe_for(round(params), vocab_size) for params in SIZES if params >= 2 * 64 * vocab_size]
    for small, large in itertools.pairwise(recipes):
        assert small.batch_tokens <= large.batch_tokens
        assert small.adam_lr >= large.adam_lr
        assert small.tokens < large.tokens
    assert {recipe.tokens for recipe in recipes} == {20 * round(p) for p in SIZES if p >= 2 * 64 * vocab_size}
    assert all(recipe.batch_tokens & (recipe.batch_tokens - 1) == 0 for recipe in recipes)


def test_shapes_are_good_for_hardware() -> None:
    for params in SIZES:
        recipe = recipe_for(round(params), 4096)
        assert recipe.hidden_size == 64 * recipe.heads
        assert recipe.intermediate_size % 64 == 0
        assert recipe.intermediate_size / recipe.hidden_size == pytest.approx(8 / 3, rel=0.15)
        assert 25 <= recipe.hidden_size / recipe.layers <= 130
    assert intermediate_size_for(64) >= 64


def test_what_is_chosen_otherwise() -> None:
    recipe = recipe_for(10_000_000, 4096)
    assert adapted(recipe, 256, None, layers=None) == recipe
    wide = adapted(recipe, 256, 192, layers=2, adam_lr=0.5)
    assert (wide.hidden_size, wide.heads, wide.key_value_heads, wide.intermediate_size) == (192, 3, 3, 512)
    assert (wide.layers, wide.adam_lr, wide.matrix_lr) == (2, 0.5, recipe.matrix_lr)
    assert adapted(recipe, 300, None, batch_tokens=1000).batch_tokens == 900
    assert adapted(recipe, 300, None, batch_tokens=100).batch_tokens == 300, "one row at least"


def test_too_large_a_vocabulary_says_what_it_takes() -> None:
    with pytest.raises(UserError, match="a vocabulary of 150,000 needs at least 9,6") as error:
        recipe_for(5_000_000, 150_000)
    smallest = int(str(error.value).split("at least ")[1].split()[0].replace(",", ""))
    assert recipe_for(smallest, 150_000).layers == 1
