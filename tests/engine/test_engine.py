"""The engine: batching, caching and shared prefixes change nothing about what a prompt gets."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping

import pytest
import torch

import fledge.engine.engine as engine_module
from fledge.engine.decoder import Decoder
from fledge.engine.engine import Engine
from fledge.errors import UserError
from fledge.model.kv_cache import KVCache
from fledge.model.transformer import CausalLM
from fledge.types import Completion, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
SAMPLED = SamplingParams(temperature=1.0, max_tokens=12, seed=5)


def random_prompts(count: int, longest: int = 20, seed: int = 0) -> list[list[int]]:
    chosen = random.Random(seed)
    return [[chosen.randrange(256) for _ in range(chosen.randint(1, longest))] for _ in range(count)]


def by_hand(model: CausalLM, prompt: list[int], max_tokens: int, eos_ids: set[int]) -> Completion:
    """Greedy decoding by definition: the whole text through the model for every token."""
    ids: list[int] = []
    logps: list[float] = []
    with torch.no_grad():
        while len(ids) < max_tokens:
            logps_V = model(torch.tensor([prompt + ids]))[0, -1].log_softmax(-1)
            best = int(logps_V.argmax())
            if best in eos_ids:
                return Completion(ids, logps, "stop")
            ids.append(best)
            logps.append(float(logps_V[best]))
    return Completion(ids, logps, "length")


def assert_same(made: Completion, expected: Completion) -> None:
    assert (made.ids, made.finish_reason) == (expected.ids, expected.finish_reason)
    assert made.logps == pytest.approx(expected.logps, abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_greedy_is_the_most_probable_token_each_time(model: CausalLM, batch_size: int) -> None:
    prompts = random_prompts(10)
    eos_ids = {by_hand(model, prompts[0], 12, set()).ids[4], by_hand(model, prompts[1], 12, set()).ids[0]}
    expected = [by_hand(model, prompt, 12, eos_ids) for prompt in prompts]
    assert {completion.finish_reason for completion in expected} == {"stop", "length"}
    made = Engine(model, sorted(eos_ids), batch_size).generate(prompts, GREEDY)
    for one, other in zip(made, expected, strict=True):
        assert_same(one, other)


def test_a_prompts_samples_depend_on_its_seed_and_number_only(model: CausalLM) -> None:
    prompts = random_prompts(9)
    alone = Engine(model, [3], batch_size=1).generate(prompts, SAMPLED)
    together = Engine(model, [3], batch_size=64).generate(prompts, SAMPLED)
    others = Engine(model, [3]).generate([*prompts[:5], *random_prompts(7, 40, seed=1)], SAMPLED)
    for made, expected in [*zip(together, alone, strict=True), *zip(others[:5], alone[:5], strict=True)]:
        assert_same(made, expected)
    assert [c.ids for c in Engine(model, [3]).generate(prompts, SamplingParams(seed=6, max_tokens=12))] != [
        c.ids for c in alone
    ]


def test_equal_prompts_get_different_samples(model: CausalLM) -> None:
    made = Engine(model, []).generate([[1, 2, 3]] * 8, SAMPLED)
    assert len({tuple(completion.ids) for completion in made}) == 8


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_a_stream_gives_what_generate_gives(model: CausalLM, params: SamplingParams) -> None:
    engine = Engine(model, [])
    stop_id = engine.generate([[4, 5]], params)[0].ids[-2]
    for stop_ids in ((), (stop_id,)):
        params = SamplingParams(params.temperature, max_tokens=12, seed=params.seed, stop_ids=stop_ids)
        *tokens, reason = engine.stream([4, 5], params)
        made = engine.generate([[4, 5]], params)[0]
        assert [(token.id, token.logp) for token in tokens] == list(zip(made.ids, made.logps, strict=True))
        assert reason == made.finish_reason == ("stop" if stop_ids else "length")


def test_a_paused_stream_leaves_gradients_on(model: CausalLM) -> None:
    stream = Engine(model, []).stream([4, 5], GREEDY)
    next(stream)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("length", [31, 32, 60])
def test_a_shared_prefix_is_read_once_and_changes_nothing(
    model: CausalLM, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = random_prompts(1, 1)[0] * length
    prompts = [[*prefix, 200 + i, *rest] for i, rest in enumerate(random_prompts(6))]
    expected = [by_hand(model, prompt, 5, set()) for prompt in prompts]
    read: list[int] = []
    extend = Decoder.extend

    def spy(decoder: Decoder, ids_BT: torch.Tensor, lengths_B: torch.Tensor, cache: KVCache) -> torch.Tensor:
        read.append(int(lengths_B.sum()))
        return extend(decoder, ids_BT, lengths_B, cache)

    monkeypatch.setattr(Decoder, "extend", spy)
    made = Engine(model, [], batch_size=4).generate(prompts, SamplingParams(temperature=0.0, max_tokens=5))
    for one, other in zip(made, expected, strict=True):
        assert_same(one, other)
    saved = 5 * length if length >= 32 else 0  # six prompts read it once
    assert sum(read) == sum(map(len, prompts)) - saved + 6 * 4


def test_equal_long_prompts_share_all_but_the_last_token(model: CausalLM) -> None:
    prompt = random_prompts(1)[0] * 20
    prompt = prompt[:50]
    made = Engine(model, []).generate([prompt, prompt], GREEDY)
    for one in made:
        assert_same(one, by_hand(model, prompt, 12, set()))


def test_ended_rows_leave_the_batch(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    step = Decoder.step

    def spy(decoder: Decoder, ids_B: torch.Tensor, cache: KVCache) -> torch.Tensor:
        sizes.append(len(ids_B))
        assert cache.slots == 2 + 20
        return step(decoder, ids_B, cache)

    monkeypatch.setattr(Decoder, "step", spy)
    ends = {row: 1 + row for row in range(16)}
    count = dict.fromkeys(ends, 0)

    def should_stop(row: int, token_id: int) -> bool:
        count[row] += 1
        return count[row] == ends[row]

    params = SamplingParams(temperature=0.0, max_tokens=20)
    made = Engine(model, []).generate([[row, 7] for row in range(16)], params, should_stop)
    assert [len(completion.ids) for completion in made] == list(ends.values())
    assert {completion.finish_reason for completion in made} == {"stop"}
    assert sizes == list(range(15, 0, -1))
    for row, completion in enumerate(made):
        assert_same(completion, Completion(*by_hand_parts(model, [row, 7], ends[row]), "stop"))


def by_hand_parts(model: CausalLM, prompt: list[int], tokens: int) -> tuple[list[int], list[float]]:
    made = by_hand(model, prompt, tokens, set())
    return made.ids, made.logps


def test_the_end_of_the_context(model: CausalLM) -> None:
    engine = Engine(model, [])
    context = engine.context
    prompts = [[1] * context, [2] * (context - 3), [3] * 4]
    made = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=3))
    assert [(len(c.ids), c.finish_reason) for c in made] == [(0, "context"), (3, "length"), (3, "length")]
    made = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=10**9))
    assert [len(c.ids) for c in made] == [0, 3, context - 4]
    assert {c.finish_reason for c in made} == {"context"}
    assert_same(made[1], Completion(*by_hand_parts(model, prompts[1], 3), "context"))
    assert list(engine.stream(prompts[0], GREEDY)) == ["context"]


def test_no_prompts(model: CausalLM) -> None:
    assert Engine(model, []).generate([], GREEDY) == []
    assert Engine(model, []).score([]) == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "text 2 of 2 is empty"),
        ([1] * 129, "text 2 of 2 has 129 tokens, the model's context holds 128"),
        ([1, 100_000], "outside the model's vocabulary"),
        ([-1], "outside the model's vocabulary"),
    ],
)
def test_prompts_that_cannot_be_read(model: CausalLM, prompt: list[int], message: str) -> None:
    engine = Engine(model, [])
    with pytest.raises(UserError, match=message):
        engine.generate([[1], prompt], GREEDY)
    with pytest.raises(UserError, match=message.replace("2 of 2", "1 of 1")):
        next(engine.stream(prompt, GREEDY))
    if prompt:  # the last token is not read, so scoring takes one more
        if len(prompt) == 129:
            assert len(engine.score([prompt])[0]) == 128
            prompt, message = [*prompt, 1], "text 2 of 2 has 130 tokens"
        with pytest.raises(UserError, match=message):
            engine.score([[1], prompt])


def test_settings_are_checked(model: CausalLM) -> None:
    with pytest.raises(UserError, match="temperature"):
        Engine(model, []).generate([[1]], SamplingParams(temperature=-1))
    with pytest.raises(UserError, match="top_k"):
        next(Engine(model, []).stream([1], SamplingParams(top_k=0)))
    with pytest.raises(UserError, match="batch_size"):
        Engine(model, [], batch_size=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_model_is_an_error(chain_model: Callable[[Mapping[int, int]], CausalLM], bad: float) -> None:
    broken = chain_model({})
    with torch.no_grad():
        broken.model.norm.weight[3] = bad
    for call in (
        lambda engine: engine.generate([[3]], GREEDY),
        lambda engine: list(engine.stream([3], GREEDY)),
        lambda engine: engine.score([[3, 3]]),
    ):
        with pytest.raises(UserError, match="not numbers"):
            call(Engine(broken, []))


@pytest.mark.parametrize(("max_logits", "max_tokens"), [(2**25, 16_384), (700, 16_384), (2**25, 40), (1, 1)])
def test_scores_are_those_of_the_full_forward(
    model: CausalLM, max_logits: int, max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "MAX_LOGITS", max_logits)
    monkeypatch.setattr(engine_module, "MAX_PASS_TOKENS", max_tokens)
    sequences = [*random_prompts(9), [5], [], random_prompts(1)[0] * 6]
    scores = Engine(model, [], batch_size=4).score(sequences)
    assert [len(row) for row in scores] == [max(0, len(ids) - 1) for ids in sequences]
    for ids, row in zip(sequences, scores, strict=True):
        if row:
            with torch.no_grad():
                logps_TV = model(torch.tensor([ids]))[0, :-1].log_softmax(-1)
            expected = logps_TV.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            assert row == pytest.approx(expected.tolist(), abs=1e-4)


def test_scores_of_a_completion_are_its_log_probabilities(model: CausalLM) -> None:
    engine = Engine(model, [])
    prompts = random_prompts(5)
    # Raw ones: temperature and top-k shape what is drawn, not what the model thinks of it.
    params = SamplingParams(temperature=2.0, top_k=50, max_tokens=12)
    made = engine.generate(prompts, params)
    scores = engine.score([prompt + c.ids for prompt, c in zip(prompts, made, strict=True)])
    for completion, row in zip(made, scores, strict=True):
        assert completion.logps == pytest.approx(row[-12:], abs=1e-4)


def test_bf16_weights_and_bf16_products(model: CausalLM) -> None:
    prompts = random_prompts(6)
    expected = Engine(model, []).score(prompts)
    low = CausalLM(model.config)
    low.load_state_dict(model.state_dict())
    low.to(torch.bfloat16)
    for engine in (Engine(low, []), Engine(model, [], compute_dtype=torch.bfloat16)):
        for row, other in zip(engine.score(prompts), expected, strict=True):
            assert row == pytest.approx(other, abs=0.5)
            assert row == pytest.approx(other, abs=1e-9) or row != other
        made = engine.generate(prompts, GREEDY)
        assert [len(completion.ids) for completion in made] == [12] * 6
        *tokens, _ = engine.stream(prompts[0], GREEDY)
        assert len(tokens) == 12
