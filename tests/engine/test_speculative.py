"""Speculative decoding: the same greedy texts as without, and the same distribution when sampling."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from fledge.engine.constraints import Grammars
from fledge.engine.draft_models import check_same_tokens, load_draft, new_lookup
from fledge.engine.drafts import Draft, LookupDraft, ModelDraft
from fledge.engine.engine import Engine
from fledge.engine.generation import Generation, Request
from fledge.engine.language_model import reader_of
from fledge.engine.processors import without
from fledge.engine.speculative import Speculation
from fledge.errors import UserError
from fledge.model.checkpoint import save_model
from fledge.model.ngram import NgramConfig, NgramModel
from fledge.model.transformer import CausalLM
from fledge.tokenizer.bpe import Tokenizer, train_bpe
from fledge.types import Completion, Grammar, SamplingParams

from .conftest import TEXT, random_model

NewDraft = Callable[[int, int], Draft]
PROMPTS = [[5, 6, 7, 5, 6, 7, 5, 6], [40], list(range(60, 20, -1)), [9, 9, 9, 9]]


def by_model(model: CausalLM | NgramModel, vocab_size: int) -> NewDraft:
    return partial(ModelDraft, reader_of(model, None), vocab_size)


def drafts(model: CausalLM, tokenizer: Tokenizer) -> dict[str, NewDraft]:
    size = model.config.vocab_size
    documents = [np.array([tokenizer.eos_id, *tokenizer.encode(TEXT)])]
    counts = NgramModel.count(documents, tokenizer.eos_id, NgramConfig(size, 3, 128))
    return {
        "look-up": new_lookup,
        "itself": by_model(model, size),
        "another": by_model(random_model(size, seed=2), size),
        "a larger vocabulary": by_model(random_model(size + 7, seed=3), size),
        "a shorter context": by_model(random_model(size, context=24, seed=2), size),
        "n-gram": by_model(counts, size),
    }


def engine_of(model: CausalLM, tokenizer: Tokenizer, draft: NewDraft | None, tokens: int = 4) -> Engine:
    engine = Engine(model, [tokenizer.eos_id], grammars=Grammars(tokenizer, model.config.vocab_size))
    engine.speculation = None if draft is None else Speculation(draft, tokens)
    return engine


GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
SETTINGS = [
    GREEDY,
    replace(GREEDY, top_logprobs=3, n=2),
    replace(GREEDY, repetition_penalty=1.8, presence_penalty=0.5, frequency_penalty=0.4),
    replace(GREEDY, logit_bias={7: 3.0, 5: -100.0}, banned=((6, 7), (9, 9, 9), (40,)), min_tokens=20),
    replace(GREEDY, stop_ids=tuple(range(0, 310, 9)), min_tokens=3),
    replace(GREEDY, max_tokens=1),
    replace(GREEDY, echo=True),
    replace(GREEDY, constraint=Grammar("regex", "(the |cats |ate ){4,8}books[.]")),
    replace(GREEDY, constraint=Grammar("json_schema", '{"type": "object", "properties": {"a": {"type": '
            '"string", "maxLength": 5}, "b": {"enum": ["hello", "café"]}}, "required": ["a", "b"]}')),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "params"),
    [
        *itertools.product(("look-up", "another"), SETTINGS),
        *itertools.product(
            ("itself", "a larger vocabulary", "a shorter context", "n-gram"),
            (GREEDY, SETTINGS[2], SETTINGS[-1]),
        ),
    ],
)
def test_greedy_is_the_same_token_for_token(
    name: str, params: SamplingParams, model: CausalLM, tokenizer: Tokenizer
) -> None:
    plain = engine_of(model, tokenizer, None).generate(PROMPTS, params)
    engine = engine_of(model, tokenizer, drafts(model, tokenizer)[name])
    for made, expected in zip(engine.generate(PROMPTS, params), plain, strict=True):
        assert_same(made, expected)
    assert engine.speculation is not None
    counts = engine.speculation.counts
    assert 0 <= counts.kept <= counts.proposed
    if name == "itself" and params == GREEDY:
        assert counts.kept == counts.proposed > 50 and counts.tokens > 3 * counts.passes


def assert_same(made: Completion, expected: Completion) -> None:
    assert (made.ids, made.finish_reason) == (expected.ids, expected.finish_reason)
    assert made.logps == pytest.approx(expected.logps, abs=1e-4)
    assert made.sampled_logps == pytest.approx(expected.sampled_logps, abs=1e-4)
    assert (made.stop_token is None) == (expected.stop_token is None)
    for one, other in zip(made.top_logps, expected.top_logps, strict=True):
        assert [i for i, _ in one] == [i for i, _ in other]
    assert [token.id for token in made.echoed] == [token.id for token in expected.echoed]


# A vocabulary of 6; the prompt has every pair of 1 to 5, so that a look-up always has something to propose.
PROMPT = [1, 1, 2, 1, 3, 1, 4, 1, 5, 2, 2, 3, 2, 4, 2, 5, 3, 3, 4, 3, 5, 4, 4, 5, 5, 1]
TINY = SamplingParams(max_tokens=3)


def distribution(model: CausalLM, params: SamplingParams) -> dict[tuple[int, ...], float]:
    """The probability of every text of at most three tokens, from the model's scores, one by one."""
    found: dict[tuple[int, ...], float] = {}

    def walk(made: tuple[int, ...], probability: float) -> None:
        if len(made) == params.max_tokens or 0 in made:
            found[made] = probability
            return
        with torch.no_grad():
            scores = dict(enumerate(model(torch.tensor([[*PROMPT, *made]]))[0, -1].tolist()))
        for i in set(PROMPT) | set(made):
            scores[i] *= params.repetition_penalty if scores[i] < 0 else 1 / params.repetition_penalty
        for i in set(made):
            scores[i] -= params.presence_penalty + params.frequency_penalty * made.count(i)
        for banned in params.banned:
            if ([*PROMPT, *made, banned[-1]])[-len(banned) :] == list(banned):
                del scores[banned[-1]]
        weights = {i: math.exp(score / params.temperature) for i, score in scores.items()}
        kept = sorted(weights, key=lambda i: -weights[i])[: params.top_k]
        if params.top_p is not None:
            shares = [weights[i] / sum(weights[j] for j in kept) for i in kept]
            mass = [0.0, *itertools.accumulate(shares)]
            kept = [i for i, before in zip(kept, mass, strict=False) if before < params.top_p]
        total = sum(weights[i] for i in kept)
        for i in kept:
            walk((*made, i), probability * weights[i] / total)

    walk((), 1.0)
    return found


PENALTIES = replace(TINY, repetition_penalty=1.6, presence_penalty=0.7, frequency_penalty=0.4)
CUTS = replace(TINY, temperature=1.3, banned=((4,), (2, 3)), top_k=4, top_p=0.95)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("look-up", PENALTIES),
        ("look-up", CUTS),
        ("another", TINY),
        ("another", replace(TINY, temperature=0.6, top_p=0.8)),
        ("another", PENALTIES),
        ("another", CUTS),
        ("itself", TINY),
    ],
)
def test_chi_square_against_the_exact_distribution(name: str, params: SamplingParams) -> None:
    model, other = random_model(6, seed=4), random_model(6, seed=8)
    with torch.no_grad():
        for network in (model, other):  # flatter, so that there are many texts
            network.model.norm.weight *= 0.4
    draft = {
        "look-up": new_lookup,
        "another": by_model(other, 6),
        "itself": by_model(model, 6),
    }
    engine = Engine(model, [0], batch_size=512)
    engine.speculation = Speculation(draft[name], 3)
    n = 2500
    made = engine.generate([PROMPT], replace(params, n=n, seed=11))
    counts = Counter((*one.ids, 0) if one.stop_token else tuple(one.ids) for one in made)
    expected = distribution(model, params)
    assert sum(expected.values()) == pytest.approx(1.0)
    assert set(counts) <= set(expected)
    # Texts too rare for the test are one kind.
    rare = [text for text, p in expected.items() if n * p < 5]
    cells = [(counts[text], n * p) for text, p in expected.items() if n * p >= 5]
    if rare:
        cells.append((sum(counts[text] for text in rare), n * sum(expected[text] for text in rare)))
    chi_square = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    degrees = len(cells) - 1
    # The 0.0001 point, by Wilson and Hilferty.
    assert chi_square < degrees * (1 - 2 / (9 * degrees) + 3.72 * math.sqrt(2 / (9 * degrees))) ** 3
    seen = engine.speculation.counts
    assert seen.proposed > 1000 and seen.kept > 0
    assert (seen.kept > 0.999 * seen.proposed) == (name == "itself")


def test_sampled_texts_do_not_depend_on_their_neighbours(model: CausalLM, tokenizer: Tokenizer) -> None:
    params = SamplingParams(temperature=0.9, max_tokens=20, top_p=0.9, seed=3)
    for name in ("look-up", "another"):
        together = engine_of(model, tokenizer, drafts(model, tokenizer)[name]).generate(PROMPTS, params)
        scheduler = engine_of(model, tokenizer, drafts(model, tokenizer)[name]).new_scheduler(2, 100)
        apart = [scheduler.submit(Request(prompt, params, i))[0] for i, prompt in enumerate(PROMPTS)]
        while scheduler.step():
            pass
        assert [one.ids for one in together] == [one.completion().ids for one in apart]


@pytest.mark.parametrize("name", ["look-up", "another", "itself"])
def test_requests_join_leave_and_are_cancelled(name: str, model: CausalLM, tokenizer: Tokenizer) -> None:
    draw = torch.Generator().manual_seed(5)

    def number(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=draw))

    plain = engine_of(model, tokenizer, None)
    scheduler = engine_of(model, tokenizer, drafts(model, tokenizer)[name]).new_scheduler(3, 100)
    running: list[tuple[Request, Generation]] = []
    for _ in range(25):
        ids = torch.randint(0, 12, (number(40),), generator=draw).tolist()
        request = Request(ids, SamplingParams(temperature=0.0, max_tokens=number(30)))
        running.append((request, scheduler.submit(request)[0]))
        for _ in range(number(4)):
            scheduler.step()
        if number(5) == 1:
            running[number(len(running)) - 1][1].cancel()
    while scheduler.step():
        pass
    for request, generation in running:
        (whole,) = plain.generate([request.prompt], request.params)
        made = generation.completion()
        assert made.finish_reason in ("cancelled", whole.finish_reason)
        assert made.ids == whole.ids[: len(made.ids)]
        assert made.finish_reason == "cancelled" or len(made.ids) == len(whole.ids)


def test_streams_and_functions_that_stop(model: CausalLM, tokenizer: Tokenizer) -> None:
    plain = engine_of(model, tokenizer, None)
    engine = engine_of(model, tokenizer, by_model(model, model.config.vocab_size))
    ids = plain.generate(PROMPTS[:1], GREEDY)[0].ids
    *tokens, reason = engine.stream(PROMPTS[0], GREEDY)
    assert [token.id for token in tokens] == ids and reason == "length"  # type: ignore[union-attr]
    seen: list[int] = []

    def stop(place: int, token_id: int) -> bool:
        seen.append(token_id)
        return len(seen) == 6

    (made,) = engine.generate(PROMPTS[:1], GREEDY, stop)
    assert made.ids == seen == ids[:6] and made.finish_reason == "stop"


def places(ids: Sequence[int], count: int) -> list[int]:
    generation = Generation(Request(list(ids), GREEDY), 0, frozenset(), [])
    return LookupDraft().propose([generation], [count])[0].ids


def test_what_is_looked_up() -> None:
    assert places([1, 2, 3, 4, 5, 1, 2, 3], 2) == [4, 5]
    assert places([1, 2, 3, 4, 5, 1, 2, 3], 5) == [4, 5, 1, 2, 3]
    # The last time counts; three ids before two; a repetition goes on.
    assert places([7, 2, 3, 8, 0, 2, 3, 9, 2, 3], 1) == [9]
    assert places([7, 2, 3, 8, 0, 2, 3, 9, 7, 2, 3], 1) == [8]
    assert places([4, 5, 4, 5, 4], 5) == [5, 4, 5, 4, 5]
    assert places([1, 2, 3, 4], 5) == places([1], 5) == []


def test_what_is_left_of_a_distribution() -> None:
    p, q = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]), torch.tensor([0.6, 0.1, 0.3])
    left = without(p.log(), {0: q}).softmax(-1)
    assert left[0].tolist() == pytest.approx([0.0, 1.0, 0.0])
    assert left[1].tolist() == pytest.approx(p[1].tolist())
    same = without(p.log(), {1: p[1]}).softmax(-1)  # nothing is left but rounding
    assert same[1].sum().item() == pytest.approx(1.0)


def test_a_draft_that_is_damaged_and_a_model_that_is(model: CausalLM, tokenizer: Tokenizer) -> None:
    damaged = random_model(model.config.vocab_size)
    with torch.no_grad():
        damaged.lm_head.weight[3] = math.nan
    with pytest.raises(UserError, match="the draft model gives no finite scores"):
        engine_of(model, tokenizer, by_model(damaged, model.config.vocab_size)).generate(PROMPTS, GREEDY)
    with pytest.raises(UserError, match="NaN"):
        engine_of(damaged, tokenizer, by_model(model, model.config.vocab_size)).generate(PROMPTS, GREEDY)
    with pytest.raises(UserError, match="draft_tokens 0 is below 1"):
        Speculation(new_lookup, 0)


def test_a_draft_has_the_models_tokens(model: CausalLM, tokenizer: Tokenizer, tmp_path: Path) -> None:
    size = model.config.vocab_size
    for name, other in (
        ("same", tokenizer),
        ("fewer", train_bpe([TEXT], 300)),
        ("others", train_bpe(["ab" * 99, *TEXT], 320)),
    ):
        (tmp_path / name).mkdir()
        save_model(tmp_path / name, model, other, {"stage": "pretrain"}, [other.eos_id])
    new_draft = load_draft(tmp_path / "same", tokenizer, size)
    expected = engine_of(model, tokenizer, None).generate(PROMPTS, GREEDY)
    made = engine_of(model, tokenizer, new_draft).generate(PROMPTS, GREEDY)
    assert [one.ids for one in made] == [one.ids for one in expected]
    with pytest.raises(UserError, match=f"the model's {size}; a draft needs the model's own"):
        load_draft(tmp_path / "fewer", tokenizer, size)
    words = "Seven wizards quickly judged my box of frozen lamps while thunder rolled over the quiet valley"
    others = train_bpe([f"{words}. {words[::-1]}. "] * 5, tokenizer.vocab_size)
    with pytest.raises(UserError, match=r"token \d+ is b.* a draft needs the model's own tokenizer"):
        check_same_tokens(tmp_path, others, tokenizer)
