"""Probabilities of choices: sums over all tokenisations, by hand."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import pytest
import torch

from fledge.engine import choices as choices_module
from fledge.engine.choices import choice_logps
from fledge.engine.decoder import Decoder
from fledge.engine.engine import Engine
from fledge.errors import UserError
from fledge.model.config import ModelConfig
from fledge.model.transformer import CausalLM
from fledge.tokenizer.bpe import Tokenizer

from .conftest import random_model

CHOICES = ["The cats", "The", "books", "é"]


def tokenisations(tokenizer: Tokenizer, text: str) -> list[list[int]]:
    """All, found by trying every way to cut the bytes."""
    whole = text.encode()
    ids_of: dict[bytes, list[int]] = {}
    for token_id in range(tokenizer.vocab_size):
        ids_of.setdefault(tokenizer.token_bytes(token_id), []).append(token_id)
    found: list[list[int]] = []
    for count in range(len(whole)):
        for cuts in itertools.combinations(range(1, len(whole)), count):
            pieces = [whole[i:j] for i, j in itertools.pairwise([0, *cuts, len(whole)])]
            found += map(list, itertools.product(*(ids_of.get(piece, []) for piece in pieces)))
    return found


def by_hand(engine: Engine, prompt: Sequence[int], paths: list[list[int]], ends: Sequence[int]) -> float:
    total = 0.0
    for path in paths:
        for end in [[i] for i in ends] or [[]]:
            (logps,) = engine.score([[*prompt, *path, *end]])
            total += math.exp(math.fsum(logps[len(prompt) - 1 :]))
    return math.log(total)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("end", [True, False])
def test_exact_is_the_sum_over_all_tokenisations(tokenizer: Tokenizer, family: str, end: bool) -> None:
    engine = Engine(random_model(tokenizer.vocab_size, family), [tokenizer.eos_id])
    assert tokenizer.end_of_turn_id is not None
    prompts = [tokenizer.encode(text) for text in ("A cat", "A cat sat on", "Hello", "A cat")]
    made = choice_logps(engine, tokenizer, prompts, CHOICES, [tokenizer.end_of_turn_id], end)
    assert len(tokenisations(tokenizer, "The cats")) > 10
    ends = [tokenizer.eos_id, tokenizer.end_of_turn_id] if end else []
    for prompt, scores in zip(prompts, made, strict=True):
        assert scores.method == "exact"
        expected = [by_hand(engine, prompt, tokenisations(tokenizer, text), ends) for text in CHOICES]
        assert scores.logps == pytest.approx(expected, abs=1e-3)
        total = math.fsum(map(math.exp, expected))
        assert scores.probabilities == pytest.approx([math.exp(x) / total for x in expected], rel=1e-2)
        assert math.fsum(scores.probabilities) == pytest.approx(1.0)
    assert made[0] == made[3]


def test_too_many_tokenisations_leave_the_tokenizers_own(tokenizer: Tokenizer) -> None:
    engine = Engine(random_model(tokenizer.vocab_size), [tokenizer.eos_id])
    prompt = tokenizer.encode("A cat")
    (made,) = choice_logps(engine, tokenizer, [prompt], CHOICES, max_tokens=8)
    assert made.method == "canonical"
    expected = [by_hand(engine, prompt, [tokenizer.encode(c)], [tokenizer.eos_id]) for c in CHOICES]
    assert made.logps == pytest.approx(expected, abs=1e-4)
    (exact,) = choice_logps(engine, tokenizer, [prompt], CHOICES)
    assert all(part < whole + 1e-4 for part, whole in zip(made.logps, exact.logps, strict=True))
    # 300 letters have more tokenisations than atoms; nobody lists them.
    (long,) = choice_logps(engine, tokenizer, [prompt], ["cats " * 20, "no"])
    assert long.method == "canonical"


def test_the_end_keeps_a_beginning_from_winning(tokenizer: Tokenizer) -> None:
    """A model of which every token is as likely: V tokens, so "a" has 1/V, and with its end 1/V^2."""
    size = tokenizer.vocab_size
    model = CausalLM(ModelConfig("llama", size, 8, 8, 1, 1, 1, 8, 64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0 if parameter.ndim == 1 else 0.0)
    engine = Engine(model, [tokenizer.eos_id])
    one = -math.log(size)
    (ended,) = choice_logps(engine, tokenizer, [[5]], ["q", "qz"])
    (open_,) = choice_logps(engine, tokenizer, [[5]], ["q", "qz"], end=False)
    assert ended.logps == pytest.approx([2 * one, 3 * one]) and open_.logps == pytest.approx([one, 2 * one])


def test_prompts_read_together_are_those_read_alone(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(random_model(tokenizer.vocab_size), [tokenizer.eos_id])
    chosen = random.Random(0)
    stem = [chosen.randrange(256) for _ in range(30)]
    prompts = [
        stem[: chosen.randint(1, 30)] + [chosen.randrange(256)] * chosen.randint(0, 3) for _ in range(40)
    ]
    rows: list[int] = []
    hidden = Decoder.hidden
    monkeypatch.setattr(
        Decoder, "hidden", lambda self, ids, *rest: (rows.append(ids.shape[1]), hidden(self, ids, *rest))[1]
    )
    choice_logps(engine, tokenizer, prompts[:1], CHOICES)
    branches = rows.pop() - len(prompts[0])
    together = choice_logps(engine, tokenizer, prompts, CHOICES)
    assert sum(rows) < 40 * branches + sum(map(len, prompts)) / 2  # what is common is read once
    monkeypatch.setattr(choices_module, "MAX_TREE_TOKENS", 100)
    apart = choice_logps(engine, tokenizer, prompts, CHOICES)
    for prompt, one, other in zip(prompts, together, apart, strict=True):
        (alone,) = choice_logps(engine, tokenizer, [prompt], CHOICES)
        assert one.logps == pytest.approx(alone.logps, abs=1e-3)
        assert other.logps == pytest.approx(alone.logps, abs=1e-3)


def test_choices_that_cannot_be_scored(tokenizer: Tokenizer) -> None:
    model = random_model(tokenizer.vocab_size)
    engine = Engine(model, [tokenizer.eos_id])
    with pytest.raises(UserError, match="choices: none"):
        choice_logps(engine, tokenizer, [[1]], [])
    with pytest.raises(UserError, match="an empty one"):
        choice_logps(engine, tokenizer, [[1]], ["a", ""])
    with pytest.raises(UserError, match="prompt 2 of 2, before the choices, has 126 tokens"):
        choice_logps(engine, tokenizer, [[1], [1] * 126], ["books"])
    with pytest.raises(UserError, match="prompt 1 of 1, before the choices, is empty"):
        choice_logps(engine, tokenizer, [[]], ["a"])
    with pytest.raises(UserError, match="no end-of-text id"):
        choice_logps(Engine(model, []), tokenizer, [[1]], ["a"])
    assert choice_logps(engine, tokenizer, [], ["a"]) == []
    broken = random_model(tokenizer.vocab_size)
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="not numbers"):
        choice_logps(Engine(broken, [1]), tokenizer, [[1]], ["a"])
