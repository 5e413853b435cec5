"""Beam search: transformers' tokens and scores, all that a tiny vocabulary has, and samples without
replacement."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from fledge.engine.beam import Beams, beam_search
from fledge.engine.constraints import Grammars
from fledge.engine.engine import Engine
from fledge.engine.scheduler import Scheduler
from fledge.engine.search import Hypothesis
from fledge.engine.slots import Slots
from fledge.errors import UserError
from fledge.model.checkpoint import save_model
from fledge.model.config import ModelConfig
from fledge.model.transformer import CausalLM
from fledge.tokenizer.bpe import Tokenizer
from fledge.types import Grammar, SamplingParams

from .conftest import random_model

TEXTS = ["The cats", "Hello", "A café 漢字 sells books; the cats ate.", "🙂"]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def ids_of(hypothesis: Hypothesis) -> list[int]:
    """All tokens, the end among them."""
    end = hypothesis.completion.stop_token
    return hypothesis.completion.ids + ([end.id] if end else [])


def settings(free: list[int]) -> list[tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """Width, the beams' settings (of both), ours and theirs; `free` is what the model likes to say."""
    a, b, c = free[:3]
    return [
        (1, {}, {}, {}),
        (2, {"length_penalty": 0.0, "early_stopping": "never"}, {}, {}),
        (4, {}, {}, {}),
        (4, {"early_stopping": True}, {}, {}),
        (4, {"early_stopping": "never"}, {}, {}),
        (4, {"length_penalty": 2.0}, {}, {}),
        (4, {"length_penalty": 2.0, "early_stopping": True}, {}, {}),
        (4, {"length_penalty": 2.0, "early_stopping": "never"}, {}, {}),
        (3, {"length_penalty": -1.0}, {}, {}),
        (5, {"length_penalty": 0.5}, {"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
        (4, {}, {"min_tokens": 6}, {"min_new_tokens": 6}),
        (4, {}, {"banned": ((a,), (b, c)), "logit_bias": {c: 1.5}},
         {"bad_words_ids": [[a], [b, c]], "sequence_bias": [[[c], 1.5]]}),
        (6, {"early_stopping": True, "length_penalty": 1.5}, {"logit_bias": {b: -2.0}, "min_tokens": 3},
         {"sequence_bias": [[[b], -2.0]], "min_new_tokens": 3}),
    ]  # fmt: skip


@pytest.mark.peers
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_scores_are_those_of_transformers(
    family: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    model = random_model(tokenizer.vocab_size, family, seed=2)
    prompts = tokenizer.encode_batch(TEXTS)
    free = beam_search(Engine(model, []), prompts, SamplingParams(max_tokens=12, n=8), Beams(8))
    common = Counter(i for found in free for h in found for i in set(h.completion.ids[2:]))
    liked = [token_id for token_id, _ in common.most_common()]
    eos_ids = liked[:12:2]  # so that beams end here and there
    save_model(tmp_path, model, tokenizer, {"stage": "sft"}, eos_ids)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    engine = Engine(model, eos_ids)
    reasons = Counter[str]()
    by_mode: dict[Any, list[Any]] = {True: [], False: [], "never": []}
    for width, search, ours, other in settings([i for i in liked if i not in eos_ids]):
        n = max(1, width - 1)
        params = SamplingParams(max_tokens=12, n=n, **ours)
        found = beam_search(engine, prompts, params, Beams(width, **search))
        for prompt, hypotheses in zip(prompts, found, strict=True):
            ids = torch.tensor([prompt])
            flags: dict[str, Any] = {"pad_token_id": 1, "max_new_tokens": 12, "do_sample": False}
            flags |= {"num_beams": width, "num_return_sequences": n, **search}
            flags |= {"return_dict_in_generate": True, "output_scores": True, **other}
            out = theirs.generate(ids, attention_mask=torch.ones_like(ids), **flags)
            if width == 1:  # that is greedy for them, and has no score
                expected = [out.sequences[0, len(prompt) :].tolist()]
                assert [ids_of(hypothesis) for hypothesis in hypotheses] == expected
                continue
            made = [ids_of(hypothesis) for hypothesis in hypotheses]
            rows = out.sequences[:, len(prompt) :].tolist()
            assert made == [row[: len(ids)] for row, ids in zip(rows, made, strict=True)]
            assert all(set(row[len(ids) :]) <= {1} for row, ids in zip(rows, made, strict=True))
            scores = [hypothesis.score for hypothesis in hypotheses]
            assert scores == pytest.approx(out.sequences_scores.tolist(), abs=1e-4)
            reasons.update(hypothesis.completion.finish_reason for hypothesis in hypotheses)
        if width == 4 and not ours:
            mode = search.get("early_stopping", False)
            by_mode[mode].append([[ids_of(h) for h in hypotheses] for hypotheses in found])
    assert reasons["stop"] > 5 and reasons["length"] > 5
    # The ways to stop are different ones.
    assert by_mode[True] != by_mode[False] != by_mode["never"]


# A model of 5 ids, one of them the end, and everything that it can say in up to 4 tokens.
END, TINY, LONGEST = 4, 5, 4
PROMPT = [1, 2]


@pytest.fixture(scope="module")
def tiny() -> CausalLM:
    model = CausalLM(ModelConfig("llama", TINY, 8, 8, 1, 2, 1, 4, 16)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3, generator=generator)
    return model


@torch.no_grad()
def everything(model: CausalLM, temperature: float = 1.0) -> dict[tuple[int, ...], float]:
    """The probability of each text: those that end, and those that are cut off; they sum to 1."""
    found: dict[tuple[int, ...], float] = {}
    for length in range(1, LONGEST + 1):
        for ids in itertools.product(range(TINY), repeat=length):
            if END in ids[:-1] or (ids[-1] != END and length < LONGEST):
                continue
            logps_TV = (model(torch.tensor([[*PROMPT, *ids]]))[0].double() / temperature).log_softmax(-1)
            places = range(len(PROMPT) - 1, len(PROMPT) - 1 + length)
            found[ids] = math.exp(sum(float(logps_TV[t, i]) for t, i in zip(places, ids, strict=True)))
    assert sum(found.values()) == pytest.approx(1.0)
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_beam_as_wide_as_the_tree_finds_the_best_texts(tiny: CausalLM, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, max_tokens=LONGEST, n=10)
    beams = Beams(200, length_penalty=0.0, early_stopping="never")
    (found,) = beam_search(Engine(tiny, [END]), [PROMPT], params, beams)
    best = sorted(everything(tiny, temperature).items(), key=lambda item: -item[1])[:10]
    assert [tuple(ids_of(hypothesis)) for hypothesis in found] == [ids for ids, _ in best]
    assert [math.exp(hypothesis.score) for hypothesis in found] == pytest.approx(
        [p for _, p in best], rel=1e-4
    )
    raw = everything(tiny)
    assert [math.exp(h.logp) for h in found] == pytest.approx(
        [raw[tuple(ids_of(h))] for h in found], rel=1e-4
    )


def test_a_beam_of_one_is_greedy(model: CausalLM, tokenizer: Tokenizer) -> None:
    engine = Engine(model, [tokenizer.eos_id])
    prompts = tokenizer.encode_batch(TEXTS)
    greedy = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=20))
    found = beam_search(engine, prompts, SamplingParams(max_tokens=20), Beams(1))
    for completion, (hypothesis,) in zip(greedy, found, strict=True):
        assert hypothesis.completion.ids == completion.ids
        assert hypothesis.completion.logps == pytest.approx(completion.logps, abs=1e-4)


def test_neighbours_change_nothing(model: CausalLM, tokenizer: Tokenizer) -> None:
    prompts = tokenizer.encode_batch(TEXTS)
    params = SamplingParams(max_tokens=10, n=3)
    together = beam_search(Engine(model, [tokenizer.eos_id], batch_size=9), prompts, params, Beams(3))
    for prompt, hypotheses in zip(prompts, together, strict=True):
        (alone,) = beam_search(Engine(model, [tokenizer.eos_id]), [prompt], params, Beams(3))
        assert [ids_of(h) for h in alone] == [ids_of(h) for h in hypotheses]


def chi_square(counts: list[int], expected: list[float]) -> float:
    return sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True))


def inclusions(probabilities: dict[tuple[int, ...], float]) -> tuple[list[tuple[int, ...]], dict[Any, float]]:
    """The probability of each ordered pair that is drawn one after the other without replacement."""
    texts = list(probabilities)
    pairs = {
        (a, b): probabilities[a] * probabilities[b] / (1 - probabilities[a])
        for a in texts
        for b in texts
        if a != b
    }
    return texts, pairs


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_stochastic_beams_are_a_sample_without_replacement(tiny: CausalLM, temperature: float) -> None:
    # Two texts drawn in turn: their order too has the probabilities of drawing without replacement.
    texts, pairs = inclusions(everything(tiny, temperature))
    draws = 2000
    params = SamplingParams(temperature=temperature, max_tokens=LONGEST, n=2)
    engine = Engine(tiny, [END], batch_size=2 * draws)
    found = beam_search(engine, [PROMPT] * draws, params, Beams(2, stochastic=True))
    drawn = Counter((tuple(ids_of(first)), tuple(ids_of(second))) for first, second in found)
    assert all(first != second and pair in pairs for pair in drawn for first, second in [pair])
    for place in (0, 1):
        counts = Counter(pair[place] for pair in drawn.elements())
        expected = Counter[tuple[int, ...]]()
        for pair, probability in pairs.items():
            expected[pair[place]] += probability  # type: ignore[assignment]
        common = [text for text in texts if expected[text] * draws >= 5]
        rest = 1 - sum(expected[text] for text in common)
        observed = [counts[text] for text in common] + [draws - sum(counts[text] for text in common)]
        statistic = chi_square(observed, [expected[text] * draws for text in common] + [rest * draws])
        # The mean is the degrees of freedom, the variance twice that; four standard deviations.
        assert len(common) > 20
        assert abs(statistic - len(common)) < 4 * math.sqrt(2 * len(common))
    for first, second in found[:50]:
        assert first.score >= second.score


def test_a_wide_stochastic_beam_has_every_text_once(tiny: CausalLM) -> None:
    texts = everything(tiny)
    params = SamplingParams(max_tokens=LONGEST, n=len(texts))
    (found,) = beam_search(Engine(tiny, [END]), [PROMPT], params, Beams(len(texts), stochastic=True))
    assert {tuple(ids_of(h)) for h in found} == set(texts)
    for hypothesis in found:
        assert math.exp(hypothesis.logp) == pytest.approx(texts[tuple(ids_of(hypothesis))], rel=1e-4)


def test_seeds_repeat_a_stochastic_beam(tiny: CausalLM) -> None:
    def draw(seed: int) -> list[list[int]]:
        params = SamplingParams(max_tokens=LONGEST, n=3, seed=seed)
        found = beam_search(Engine(tiny, [END]), [PROMPT] * 4, params, Beams(3, stochastic=True))
        return [ids_of(h) for hypotheses in found for h in hypotheses]

    assert draw(1) == draw(1) != draw(2)


def test_cuts_bound_a_stochastic_beam(tiny: CausalLM) -> None:
    params = SamplingParams(max_tokens=LONGEST, n=1, top_k=1)
    (found,) = beam_search(Engine(tiny, [END]), [PROMPT], params, Beams(4, stochastic=True))
    (greedy,) = Engine(tiny, [END]).generate([PROMPT], SamplingParams(temperature=0.0, max_tokens=LONGEST))
    assert found[0].completion.ids == greedy.ids


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize(
    ("grammar", "texts"),
    [
        (Grammar("choices", '["cat", "cats", "book"]'), {"cat", "cats", "book"}),
        (Grammar("regex", "[ab]{2}"), {"aa", "ab", "ba", "bb"}),
        (Grammar("json_schema", '{"enum": [1, true, "a"]}'), {"1", "true", '"a"'}),
    ],
)
def test_all_beams_keep_to_the_constraint(
    stochastic: bool, grammar: Grammar, texts: set[str], model: CausalLM, tokenizer: Tokenizer
) -> None:
    engine = Engine(model, [tokenizer.eos_id], grammars=Grammars(tokenizer, model.config.vocab_size))
    params = SamplingParams(max_tokens=20, n=12, constraint=grammar)
    (found,) = beam_search(engine, [tokenizer.encode("The")], params, Beams(12, stochastic=stochastic))
    assert {tokenizer.decode(h.completion.ids) for h in found} == texts
    assert {h.completion.finish_reason for h in found} == {"stop"}


def test_a_full_context_cuts_off(model: CausalLM, tokenizer: Tokenizer) -> None:
    prompt = (tokenizer.encode("The cats sat") * 60)[: model.config.max_position_embeddings - 3]
    (found,) = beam_search(Engine(model, []), [prompt], SamplingParams(n=2), Beams(2))
    assert [h.completion.finish_reason for h in found] == ["context", "context"]
    assert [len(h.completion.ids) for h in found] == [3, 3]


@pytest.mark.parametrize(
    ("params", "beams", "says"),
    [
        ({"temperature": 0.0}, {}, "greedy"),
        ({"n": 5}, {}, "more than the 4 beams"),
        ({"stop": ("a",)}, {}, "stop strings"),
        ({"top_k": 3}, {}, "top_k is for sampling"),
        ({"top_logprobs": 2}, {}, "top_logprobs"),
        ({}, {"width": 0}, "below 1"),
        ({}, {"length_penalty": math.inf}, "length_penalty"),
        ({}, {"stochastic": True, "early_stopping": True}, "stochastic"),
        ({"logit_bias": {i: -100.0 for i in range(TINY)}}, {}, "no token"),
        ({"constraint": Grammar("regex", "a")}, {}, "Grammars"),
    ],
)
def test_what_does_not_go_together(
    params: dict[str, Any], beams: dict[str, Any], says: str, tiny: CausalLM
) -> None:
    with pytest.raises(UserError, match=says):
        beam_search(Engine(tiny, [END]), [PROMPT], SamplingParams(**params), Beams(**{"width": 4, **beams}))


def test_one_cache_serves_all_groups(
    model: CausalLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Slots] = []
    new_scheduler = Engine.new_scheduler

    def noted(engine: Engine, rows: int, slots: int) -> Scheduler:
        scheduler = new_scheduler(engine, rows, slots)
        made.append(scheduler.slots)
        return scheduler

    monkeypatch.setattr(Engine, "new_scheduler", noted)
    params, beams = SamplingParams(max_tokens=6), Beams(3)
    prompts = [[5, 6, 7], [40], [9, 9], [1, 2, 3, 4]]
    apart = [beam_search(Engine(model, [0]), [prompt], params, beams)[0] for prompt in prompts]
    made.clear()
    together = beam_search(Engine(model, [0], batch_size=3), prompts, params, beams)
    assert len(made) == 1 and made[0].rows == 3
    for found, alone in zip(together, apart, strict=True):
        assert [one.completion.ids for one in found] == [one.completion.ids for one in alone]
