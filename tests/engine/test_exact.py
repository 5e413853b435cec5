"""Exact search against an enumeration of everything that can be said, which shares no code with it."""

from __future__ import annotations

import itertools
import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fledge.engine.prefixes
from fledge.engine.beam import Beams, beam_search
from fledge.engine.constraints import Grammars
from fledge.engine.engine import Engine
from fledge.engine.exact import Budget, ExactResult, exact_search
from fledge.engine.prefixes import OpenPrefixes
from fledge.errors import UserError
from fledge.model.config import ModelConfig
from fledge.model.transformer import CausalLM
from fledge.tokenizer.bpe import Tokenizer
from fledge.types import Grammar, SamplingParams

VOCAB, ENDS, PROMPT = 5, (3, 4), [1, 2]
SPREADS = (0.1, 0.25, 0.5, 1.0)


@cache
def tiny(seed: int, spread: float) -> CausalLM:
    """A model of 5 ids; the spread of its weights says how sure it is."""
    model = CausalLM(ModelConfig("llama", VOCAB, 8, 8, 1, 2, 1, 4, 16)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, spread, generator=generator)
    return model


@torch.no_grad()
def enumerate_texts(
    model: CausalLM, ends: tuple[int, ...], shortest: int, longest: int
) -> dict[tuple[int, ...], float]:
    """The log-probability of every text of so many tokens whose last is its first end."""
    others = [i for i in range(VOCAB) if i not in ends]
    found = {}
    for length in range(shortest, longest + 1):
        texts = [(*inner, end) for inner in itertools.product(others, repeat=length - 1) for end in ends]
        logps_BTV = model(torch.tensor([[*PROMPT, *text] for text in texts])).double().log_softmax(-1)
        for text, logps_TV in zip(texts, logps_BTV, strict=True):
            places = range(len(PROMPT) - 1, len(PROMPT) - 1 + length)
            found[text] = math.fsum(float(logps_TV[t, i]) for t, i in zip(places, text, strict=True))
    return found


def text_of(result: ExactResult) -> tuple[int, ...]:
    assert result.completion.stop_token is not None
    return (*result.completion.ids, result.completion.stop_token.id)


models = st.builds(tiny, st.integers(0, 10_000), st.sampled_from(SPREADS))


@settings(deadline=None, max_examples=40)
@given(
    model=models,
    ends=st.sampled_from([(4,), ENDS]),
    lengths=st.tuples(st.integers(0, 3), st.integers(1, 5)),
    pool_bytes=st.sampled_from([0, 256, 2**20]),
    a_pass=st.sampled_from([1, 3, 16]),
    seed_beams=st.integers(1, 3),
)
def test_the_result_is_that_of_the_enumeration(
    model: CausalLM,
    ends: tuple[int, ...],
    lengths: tuple[int, int],
    pool_bytes: int,
    a_pass: int,
    seed_beams: int,
) -> None:
    shortest, longest = min(lengths), max(lengths)
    texts = enumerate_texts(model, ends, shortest + 1, longest + 1)
    best, logp = max(texts.items(), key=lambda item: item[1])
    params = SamplingParams(min_tokens=shortest, max_tokens=longest + 1)
    engine = Engine(model, ends)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fledge.engine.prefixes, "POOL_BYTES", pool_bytes)
        patch.setattr(fledge.engine.prefixes, "PREFIXES_A_PASS", a_pass)
        result = exact_search(engine, PROMPT, params, seed_beams=seed_beams)
    assert result.certified and result.gap == 0
    assert result.logp == pytest.approx(logp, abs=1e-5)
    assert text_of(result) == best or texts[text_of(result)] == pytest.approx(logp, abs=1e-5)
    assert [result.logp] == pytest.approx([math.fsum(result.completion.logps) + end_logp(result)], abs=1e-5)
    # Nothing that a beam or greedy decoding ends with is better.
    for width in (1, 2, 3):
        (found,) = beam_search(engine, [PROMPT], params, Beams(width, 0.0))
        assert all(h.logp <= result.logp + 1e-5 for h in found if h.completion.finish_reason == "stop")
    (greedy,) = engine.generate(
        [PROMPT], SamplingParams(temperature=0.0, min_tokens=shortest, max_tokens=longest + 1)
    )
    if greedy.stop_token is not None:
        assert math.fsum(greedy.logps) + greedy.stop_token.logp <= result.logp + 1e-5


def end_logp(result: ExactResult) -> float:
    assert result.completion.stop_token is not None
    return result.completion.stop_token.logp


@settings(deadline=None, max_examples=40)
@given(model=models, expansions=st.integers(1, 30))
def test_a_small_budget_never_claims_too_much(model: CausalLM, expansions: int) -> None:
    texts = enumerate_texts(model, (4,), 1, 5)
    best = max(texts.values())
    traced: list[tuple[int, float, float]] = []
    try:
        result = exact_search(
            Engine(model, [4]), PROMPT, SamplingParams(max_tokens=5), Budget(expansions), 1,
            lambda *figures: traced.append(figures),
        )  # fmt: skip
    except UserError as error:
        assert "no whole text was found" in str(error)
        return
    assert result.expansions <= expansions
    assert result.logp <= best + 1e-5 <= result.bound + 2e-5
    assert texts[text_of(result)] == pytest.approx(result.logp, abs=1e-5)
    if result.certified:
        assert result.logp == pytest.approx(best, abs=1e-5)
    # The bound only falls and the best only rises, and the truth is between them.
    for (_, low, high), (_, later_low, later_high) in itertools.pairwise(traced):
        assert low <= later_low and high >= later_high
    assert all(high >= best - 1e-5 for _, _, high in traced)


@settings(deadline=None, max_examples=100)
@given(
    passes=st.lists(st.lists(st.integers(-30, 0), min_size=6, max_size=6), min_size=1, max_size=8),
    taken=st.integers(1, 3),
    least=st.integers(-40, -10),
)
def test_open_prefixes_are_taken_best_first_and_none_is_forgotten(
    passes: list[list[int]], taken: int, least: int
) -> None:
    # Against a list of all; no more are kept than can be taken until the end.
    queue, everything = OpenPrefixes(), list[float]()
    for number, bounds in enumerate(passes):
        queue.add(torch.tensor(bounds, dtype=torch.float64).view(2, 3), [number, number], least)
        everything += [float(bound) for bound in bounds if bound > least]
        left = taken * (len(passes) - number)
        queue.tidy(least, left)
        assert len(queue.bounds_N) <= left
        assert queue.bound == max(everything, default=-math.inf)
        best = sorted(everything, reverse=True)[:taken]
        assert [bound for bound, _, _ in queue.take(taken)] == best
        for bound in best:
            everything.remove(bound)
        assert queue.bound == max(everything, default=-math.inf)


def test_search_finds_what_greedy_and_beam_miss() -> None:
    found_by = []
    for seed in range(60):
        result = exact_search(Engine(tiny(seed, 0.5), [4]), PROMPT, SamplingParams(max_tokens=6), None, 2)
        found_by.append(result.found_by)
    assert {"greedy", "exact"} <= set(found_by)


def test_as_many_prefixes_are_expanded_as_are_more_probable_than_the_answer() -> None:
    # One at a time it would be exactly those; in a pass there may be some more.
    model = tiny(3, 0.25)
    result = exact_search(Engine(model, [4]), PROMPT, SamplingParams(max_tokens=6))
    texts = enumerate_texts(model, (4,), 1, 6)
    prefixes = {text[:length] for text in texts for length in range(len(text))}
    more_probable = 0
    for prefix in prefixes:
        with torch.no_grad():
            logps_TV = model(torch.tensor([[*PROMPT, *prefix]]))[0].double().log_softmax(-1)
        logp = math.fsum(float(logps_TV[len(PROMPT) - 1 + t, i]) for t, i in enumerate(prefix))
        more_probable += logp > result.logp and len(prefix) < 6
    assert result.certified
    assert more_probable <= result.expansions < more_probable + fledge.engine.prefixes.PREFIXES_A_PASS


def tokenisations(text: bytes, pieces: dict[bytes, int]) -> list[list[int]]:
    if not text:
        return [[]]
    starts = [text[:n] for n in range(1, len(text) + 1) if text[:n] in pieces]
    return [[pieces[s], *rest] for s in starts for rest in tokenisations(text[len(s) :], pieces)]


@pytest.mark.parametrize(
    ("grammar", "texts"),
    [
        (Grammar("choices", '["cat", "cats", "The book", "hello"]'), ["cat", "cats", "The book", "hello"]),
        (Grammar("regex", "(ab|c){1,3}"), ["ab", "c", "abab", "abc", "cab", "cc", "ababab", "ababc", "abcab",
                                          "abcc", "cabab", "cabc", "ccab", "ccc"]),
        (Grammar("json_schema", '{"type": "array", "items": {"enum": [1, 22]}, "maxItems": 2}'),
         ["[]", "[1]", "[22]", "[1, 1]", "[1, 22]", "[22, 1]", "[22, 22]"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("shortest", [0, 3])
def test_within_a_grammar_raw_log_probabilities_decide(
    grammar: Grammar, texts: list[str], shortest: int, model: CausalLM, tokenizer: Tokenizer
) -> None:
    pieces = {
        tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids
    }
    prompt = tokenizer.encode("Hello")
    scores = {}
    for text in texts:
        for ids in tokenisations(text.encode(), pieces):
            if len(ids) >= shortest:
                with torch.no_grad():
                    logps_TV = model(torch.tensor([[*prompt, *ids]]))[0].double().log_softmax(-1)
                steps = enumerate([*ids, tokenizer.eos_id], start=len(prompt) - 1)
                scores[tuple(ids)] = math.fsum(float(logps_TV[t, i]) for t, i in steps)
    best, logp = max(scores.items(), key=lambda item: item[1])
    engine = Engine(model, [tokenizer.eos_id], grammars=Grammars(tokenizer, model.config.vocab_size))
    params = SamplingParams(min_tokens=shortest, max_tokens=20, constraint=grammar)
    result = exact_search(engine, prompt, params)
    assert result.certified
    assert tuple(result.completion.ids) == best
    assert result.logp == pytest.approx(logp, abs=1e-4)


def test_a_budget_of_time_ends_the_search(model: CausalLM, tokenizer: Tokenizer) -> None:
    engine, prompt = Engine(model, [tokenizer.eos_id]), tokenizer.encode("The cats")
    params = SamplingParams(max_tokens=20)
    result = exact_search(engine, prompt, params, Budget(10**6, 1e-9), seed_beams=64)
    assert result.expansions == 1 and not result.certified and result.gap > 0


def test_what_can_never_be_said() -> None:
    with pytest.raises(UserError, match="no whole text is possible"):
        exact_search(Engine(tiny(0, 0.25), [4]), PROMPT, SamplingParams(min_tokens=3, max_tokens=3))
    with pytest.raises(UserError, match="no end-of-text id"):
        exact_search(Engine(tiny(0, 0.25), []), PROMPT, SamplingParams())


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.5),
        SamplingParams(repetition_penalty=1.2),
        SamplingParams(logit_bias={1: 2.0}),
        SamplingParams(top_k=3),
        SamplingParams(n=2),
    ],
)
def test_settings_under_which_a_prefix_bounds_nothing(params: SamplingParams) -> None:
    with pytest.raises(UserError, match="does not go with exact search"):
        exact_search(Engine(tiny(0, 0.25), [4]), PROMPT, params)


@pytest.mark.parametrize("budget", [Budget(0), Budget(10, 0.0)])
def test_a_budget_of_nothing(budget: Budget) -> None:
    with pytest.raises(UserError, match="max_"):
        exact_search(Engine(tiny(0, 0.25), [4]), PROMPT, SamplingParams(), budget)
