"""The histogram over the vocabulary: against the definition, and tokens that can be shown anywhere."""

from __future__ import annotations

import math
import unicodedata

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fledge.engine.engine import Engine
from fledge.errors import UserError
from fledge.evals import token_histogram
from fledge.evals.token_histogram import expectations, logit_lens, token_text, visible
from fledge.model.config import ModelConfig
from fledge.model.transformer import CausalLM
from fledge.tokenizer.bpe import Tokenizer, train_bpe

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def random_model(layers: int = 3, scale: float = 0.25) -> CausalLM:
    model = CausalLM(ModelConfig("qwen3", 50, 32, 48, layers, 4, 2, 8, 16)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, scale, generator=generator)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["café naïve 漢字 🙂 hello\r\n\thello\x1b[31m"] * 3, 300)


@pytest.mark.parametrize("scores_at_once", [2**25, 150])
def test_probability_rank_and_entropy_are_those_of_the_scores(
    scores_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_histogram, "MAX_LOGITS", scores_at_once)
    model = random_model()
    found = expectations(Engine(model, [0]), IDS, top=4)
    with torch.no_grad():
        logps_TV = model(torch.tensor([IDS]))[0].double().log_softmax(-1)
    assert len(found) == len(IDS)
    for i, place in enumerate(found):
        p = logps_TV[i].exp()
        order = logps_TV[i].argsort(descending=True).tolist()
        assert place.entropy_bits == pytest.approx(float(-(p * p.log2()).sum()), abs=1e-4)
        assert [token for token, _ in place.top] == order[:4]
        assert [logp for _, logp in place.top] == pytest.approx(logps_TV[i, order[:4]].tolist(), abs=1e-4)
        if i + 1 < len(IDS):
            assert place.logp == pytest.approx(float(logps_TV[i, IDS[i + 1]]), abs=1e-4)
            assert place.rank == 1 + order.index(IDS[i + 1])
    assert (found[-1].logp, found[-1].rank) == (None, None)


def test_a_model_that_knows_nothing_has_the_entropy_of_its_vocabulary() -> None:
    model = random_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    for place in expectations(Engine(model, [0]), IDS, top=1)[:-1]:
        assert place.entropy_bits == pytest.approx(math.log2(50), abs=1e-5)
        assert place.logp == pytest.approx(-math.log(50), abs=1e-5)
        assert place.rank == 1, "none is more probable"


def test_the_last_layer_of_the_lens_is_the_models_own_prediction() -> None:
    model = random_model()
    layers = logit_lens(model, IDS, top=3)
    assert len(layers) == 4
    for lens, own in zip(layers[-1], expectations(Engine(model, [0]), IDS, top=3), strict=True):
        assert lens.entropy_bits == pytest.approx(own.entropy_bits, abs=1e-4)
        assert [token for token, _ in lens.top] == [token for token, _ in own.top]
        assert lens.rank == own.rank
    assert layers[0][0].top != layers[-1][0].top
    assert not any(block._forward_hooks for block in model.model.layers), "the model is left as it was"


def test_a_layer_of_the_lens_is_the_model_that_ends_there() -> None:
    model, short = random_model(layers=3), random_model(layers=2)
    short.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        own_TV = short(torch.tensor([IDS]))[0].log_softmax(-1)
    for place, own_V in zip(logit_lens(model, IDS, top=50)[2], own_TV, strict=True):
        assert dict(place.top) == pytest.approx(dict(enumerate(own_V.tolist())), abs=1e-4)


@pytest.mark.parametrize("ids", [[], [1] * 17, [50]])
def test_a_text_that_cannot_be_read(ids: list[int]) -> None:
    model = random_model()
    with pytest.raises(UserError, match="the text"):
        expectations(Engine(model, [0]), ids, 1)
    with pytest.raises(UserError, match="the text"):
        logit_lens(model, ids, 1)


def test_damaged_weights_are_named() -> None:
    model = random_model()
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    with pytest.raises(UserError, match="not numbers"):
        expectations(Engine(model, [0]), IDS, 1)


def test_every_token_can_be_shown(tokenizer: Tokenizer) -> None:
    shown = [token_text(tokenizer, i) for i in range(tokenizer.vocab_size)]
    assert all(shown)
    assert not any(unicodedata.category(char) in ("Cc", "Cf", "Cs") for text in shown for char in text)
    assert "<|im_end|>" in shown
    assert "\\xe2" in shown, "a byte that is no character"
    assert "\N{SYMBOL FOR ESCAPE}" in shown


@given(st.text())
def test_nothing_unseen_is_left_and_what_is_seen_stays(text: str) -> None:
    shown = visible(text)
    assert not any(unicodedata.category(char)[0] == "C" for char in shown)
    letters = [char for char in text if char.isalnum() or char == " "]
    rest = iter(shown)
    assert all(char in rest for char in letters)
    assert visible(shown) == shown


def test_pictures() -> None:
    assert visible("a b\u00a0\u3164\ufe0f") == "a b<U+00A0><U+3164><U+FE0F>"
    assert visible("a\n\t\x1b[0m\x7f\x9b\u202e\u200b\ud800") == "a↵⇥␛[0m␡<U+009B><U+202E><U+200B><U+D800>"
