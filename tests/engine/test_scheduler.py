"""Continuous batching: whoever joins, leaves or fails, everybody else gets what they get alone."""

from __future__ import annotations

import gc
import itertools
import math
import random
import threading
from dataclasses import replace

import pytest
import torch

from fledge.engine.decoder import Decoder
from fledge.engine.engine import Engine
from fledge.engine.generation import Generation, Request
from fledge.engine.scheduler import Scheduler
from fledge.engine.slots import MIN_SHARED_PREFIX_TOKENS, Slots, common_prefix
from fledge.errors import UserError
from fledge.model.kv_cache import KVCache
from fledge.model.transformer import CausalLM
from fledge.types import Completion, SamplingParams, Token

from .conftest import random_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


def random_prompts(count: int, longest: int = 20, seed: int = 0) -> list[list[int]]:
    chosen = random.Random(seed)
    return [[chosen.randrange(256) for _ in range(chosen.randint(1, longest))] for _ in range(count)]


def alone(model: CausalLM, prompt: list[int], params: SamplingParams, number: int = 0) -> Completion:
    """A fresh scheduler of one row."""
    scheduler = Scheduler(Decoder(model), [3], 1, 128)
    generation = scheduler.submit(Request(prompt, replace(params, n=1), number))[0]
    while scheduler.step():
        pass
    return generation.completion()


def assert_same(made: Completion, expected: Completion) -> None:
    assert (made.ids, made.finish_reason) == (expected.ids, expected.finish_reason)
    assert made.logps == pytest.approx(expected.logps, abs=1e-4)
    assert made.sampled_logps == pytest.approx(expected.sampled_logps, abs=1e-4)


def run(scheduler: Scheduler) -> None:
    while scheduler.step():
        assert len(scheduler.running) <= scheduler.slots.rows


@pytest.mark.parametrize("rows", [16, 5])
def test_sixteen_lengths_and_settings_in_one_batch(model: CausalLM, rows: int) -> None:
    settings = [
        GREEDY,
        SamplingParams(max_tokens=12, seed=1),
        SamplingParams(max_tokens=9, seed=2, top_k=20, repetition_penalty=1.3),
        SamplingParams(temperature=0.0, max_tokens=15, presence_penalty=1.0, frequency_penalty=0.5),
        SamplingParams(max_tokens=12, top_p=0.8, min_p=0.02, logit_bias={5: 3.0}, min_tokens=4),
    ]
    prompts = [[*range(length)] for length in range(1, 33, 2)]
    scheduler = Scheduler(Decoder(model), [3], rows, 60)
    params = [settings[i % len(settings)] for i in range(16)]
    made = [
        scheduler.submit(Request(p, s, i))[0] for i, (p, s) in enumerate(zip(prompts, params, strict=True))
    ]
    run(scheduler)
    for i, (generation, prompt, one) in enumerate(zip(made, prompts, params, strict=True)):
        assert_same(generation.completion(), alone(model, prompt, one, i))


def num_tensors() -> tuple[int, int]:
    gc.collect()
    # By type: some lazy objects warn when they are asked what they are.
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    tensors = [x for x in tensors if not x.is_mkldnn]  # laid out weights: they have no storage to ask
    return len(tensors), sum(
        {s.data_ptr(): s.nbytes() for s in map(torch.Tensor.untyped_storage, tensors)}.values()
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_two_hundred_requests_join_and_cancel_at_random(model: CausalLM, seed: int) -> None:
    chosen = random.Random(seed)
    scheduler = Scheduler(Decoder(model), [3], 6, 80)
    stems = [[chosen.randrange(256) for _ in range(40)] for _ in range(3)]
    jobs: list[tuple[list[int], SamplingParams]] = []
    for _ in range(200):
        stem = chosen.choice(stems)[: chosen.choice([0, 0, 35, 40])]
        prompt = stem + [chosen.randrange(256) for _ in range(chosen.randint(1, 15))]
        penalty = chosen.choice([1.0, 1.0, 1.2])
        jobs.append((prompt, replace(GREEDY, max_tokens=chosen.randint(1, 20), repetition_penalty=penalty)))
    made: list[Generation] = []
    storage = [t.data_ptr() for t in scheduler.slots.cache.layers]
    waiting, cancelled, sizes = list(jobs), set[int](), []
    while waiting or scheduler.step():
        for _ in range(chosen.choice([0, 0, 1, 3])):
            if waiting:
                made += scheduler.submit(Request(*waiting.pop(0)))
        if made and chosen.random() < 0.25:
            victim = chosen.randrange(len(made))
            if not made[victim].done:
                made[victim].cancel()
                cancelled.add(victim)
                free = scheduler.slots.rows - len(scheduler.running)
                scheduler.step()
                assert made[victim].reason == "cancelled" and free >= 0
        scheduler.step()
        if len(made) in (60, 120, 180):
            sizes.append(num_tensors())
    assert len(made) == 200 and all(generation.done for generation in made)
    assert 10 < len(cancelled) < 190
    assert [t.data_ptr() for t in scheduler.slots.cache.layers] == storage
    assert max(size for _, size in sizes) - min(size for _, size in sizes) < 200_000
    assert max(count for count, _ in sizes) - min(count for count, _ in sizes) < 60
    for i, (generation, (prompt, params)) in enumerate(zip(made, jobs, strict=True)):
        expected, completion = alone(model, prompt, params), generation.completion()
        if i in cancelled:
            assert completion.finish_reason == "cancelled"
            assert completion.ids == expected.ids[: len(completion.ids)]
        else:
            assert_same(completion, expected)


def test_a_cancelled_row_is_free_at_the_next_step(model: CausalLM) -> None:
    scheduler = Scheduler(Decoder(model), [], 1, 40)
    first, second, third = (scheduler.submit(Request([i, 7], GREEDY))[0] for i in range(3))
    scheduler.step()
    assert (len(first.tokens), len(second.tokens), len(scheduler.waiting)) == (1, 0, 2)
    first.cancel()
    third.cancel()
    scheduler.step()
    assert (first.reason, third.reason, len(second.tokens)) == ("cancelled", "cancelled", 1)
    run(scheduler)
    assert_same(second.completion(), alone(model, [1, 7], GREEDY))
    assert first.completion().ids == alone(model, [0, 7], GREEDY).ids[:1]


def test_closing_a_stream_cancels_it(model: CausalLM) -> None:
    scheduler = Scheduler(Decoder(model), [], 2, 40)
    generation = scheduler.submit(Request([4, 5], GREEDY))[0]
    stream = generation.events(scheduler.step)
    next(stream)
    stream.close()
    assert generation.cancelled and not scheduler.step() and generation.reason == "cancelled"
    engine = Engine(model, [], keep_cache=True)
    stream = engine.stream([4, 5], GREEDY)
    next(stream)
    del stream
    assert_same(engine.generate([[4, 5]], GREEDY)[0], alone(model, [4, 5], GREEDY))
    assert engine.scheduler_for([2], GREEDY).slots.used == 0


def test_a_kept_cache_may_become_shorter_as_it_gains_rows(model: CausalLM) -> None:
    engine = Engine(model, [], keep_cache=True)
    long = [1 + i % 7 for i in range(90)]
    kept = engine.scheduler_for([90], GREEDY)  # one row, as long as the context
    assert kept.slots.rows == 1
    engine.generate([long], GREEDY)
    short = engine.new_scheduler(4, 40)
    short.adopt(kept)
    engine._kept = short
    prompts = [long[:30], [4, 5], [6]]
    for made, prompt in zip(engine.generate(prompts, GREEDY), prompts, strict=True):
        assert_same(made, alone(model, prompt, GREEDY))


def test_other_threads_submit_wait_and_cancel(model: CausalLM) -> None:
    scheduler = Scheduler(Decoder(model), [3], 3, 60)
    prompts = random_prompts(12)
    results: dict[int, object] = {}

    def client(i: int) -> None:
        generation = scheduler.submit(Request(prompts[i], GREEDY))[0]
        if i % 4 == 3:
            generation.cancel()
        *tokens, reason = generation.events()
        results[i] = ([token.id for token in tokens if isinstance(token, Token)], reason)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if not scheduler.step():
            threading.Event().wait(0.001)
    for i, prompt in enumerate(prompts):
        expected = alone(model, prompt, GREEDY)
        wanted = ([], "cancelled") if i % 4 == 3 else (expected.ids, expected.finish_reason)
        assert results[i] == wanted


def spy_on_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each pass."""
    read: list[int] = []
    extend = Decoder.extend

    def spy(decoder: Decoder, ids_BT: torch.Tensor, lengths_B: torch.Tensor, cache: KVCache) -> torch.Tensor:
        read.append(int(lengths_B.sum()))
        return extend(decoder, ids_BT, lengths_B, cache)

    monkeypatch.setattr(Decoder, "extend", spy)
    return read


def test_the_samples_of_a_prompt_read_it_once(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = random_prompts(1, 1)[0] * 50
    params = SamplingParams(max_tokens=3, n=5, seed=4)
    expected = [alone(model, prompt, params)]
    read = spy_on_reads(monkeypatch)
    made = Engine(model, [3]).generate([prompt], params)
    assert read[:2] == [50, 4]  # the last token is read again, for its scores
    assert_same(made[0], expected[0])
    assert len({tuple(completion.ids) for completion in made}) > 1
    again = Engine(model, [3], batch_size=2).generate([prompt], params)
    for one, other in zip(again, made, strict=True):
        assert_same(one, other)


def test_the_turns_of_a_chat_read_what_is_new(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, [], keep_cache=True)
    read = spy_on_reads(monkeypatch)
    prompt = random_prompts(1, 1)[0] * 40
    for turn in range(3):
        before = len(read)
        made = engine.generate([prompt], GREEDY)[0]
        assert_same(made, alone(model, prompt, GREEDY))
        if turn:
            assert read[before] == 1 + 4  # the answer's last token was never read
        prompt = prompt + made.ids + [turn, 9, 9, 9]
    # A cache that is too small for the next call hands over what it has read.
    before = len(read)
    kept = engine.scheduler_for([len(prompt)], GREEDY)
    engine.generate([prompt, [1]], replace(GREEDY, max_tokens=2))
    assert engine.scheduler_for([1], GREEDY) is not kept and read[before] == 1 + 4 + 1


def test_a_kept_cache_is_asked_for(model: CausalLM) -> None:
    mine = random_model(model.config.vocab_size)
    engine, prompt = Engine(mine, []), [5] * 60
    before = engine.generate([prompt], GREEDY)[0]
    with torch.no_grad():
        for parameter in mine.parameters():
            parameter.mul_(0.8)
    assert_same(engine.generate([prompt], GREEDY)[0], alone(mine, prompt, GREEDY))
    assert engine.generate([prompt], GREEDY)[0].logps != before.logps


def test_long_prompts_are_read_in_pieces(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    params = replace(GREEDY, echo=True, top_logprobs=2)
    prompts = random_prompts(6, 60, seed=3)
    expected = Engine(model, [3]).generate(prompts, params)
    monkeypatch.setattr("fledge.engine.slots.PIECE_TOKENS", 7)
    monkeypatch.setattr("fledge.engine.reading.MAX_PASS_TOKENS", 90)
    monkeypatch.setattr("fledge.engine.reading.MAX_LOGITS", 900)
    for one, other in zip(Engine(model, [3]).generate(prompts, params), expected, strict=True):
        assert_same(one, other)
        ours, theirs = [t.logp for t in one.echoed], [t.logp for t in other.echoed]
        assert ours == pytest.approx(theirs, abs=1e-4)
        assert [[i for i, _ in t.top] for t in one.echoed] == [[i for i, _ in t.top] for t in other.echoed]


@pytest.mark.parametrize("length", [1, 5, 40, 128])
def test_echo_scores_the_prompt_once(model: CausalLM, length: int) -> None:
    prompt = random_prompts(1, 1)[0] * 128
    prompt = [(token + i) % 256 for i, token in enumerate(prompt[:length])]
    engine = Engine(model, [])
    for max_tokens, n in ((0, 1), (3, 3)):
        made = engine.generate([prompt, prompt], SamplingParams(max_tokens=max_tokens, n=n, echo=True))
        scores = engine.score([prompt])[0]
        for completion in made:
            assert [token.id for token in completion.echoed] == prompt[1:]
            assert [token.logp for token in completion.echoed] == pytest.approx(scores, abs=1e-4)
            if max_tokens == 0:
                assert (completion.ids, completion.finish_reason) == ([], "length")
            else:
                assert len(completion.ids) == min(3, 128 - length)


def test_what_never_fits_is_refused_and_what_does_not_fit_now_waits(model: CausalLM) -> None:
    scheduler = Scheduler(Decoder(model), [], 2, 20)
    with pytest.raises(UserError, match=r"the prompt has 9 tokens, with max_tokens 12 up to 21.*20 here"):
        scheduler.submit(Request([1] * 9, GREEDY))
    made = [scheduler.submit(Request([i] * 8, GREEDY))[0] for i in range(5)]
    scheduler.step()
    assert [len(generation.tokens) for generation in made] == [1, 1, 0, 0, 0]
    run(scheduler)
    for i, generation in enumerate(made):
        assert_same(generation.completion(), alone(model, [i] * 8, GREEDY))
    with pytest.raises(UserError, match=r"needs 0.0 GiB of cache.*lower max_tokens"):
        Engine(model, [], cache_bytes=1000).generate([[1]], GREEDY)
    token_bytes = 2 * 2 * 2 * 8 * 4
    engine = Engine(model, [], cache_bytes=3 * token_bytes * (1 + 12 + 1))
    assert engine.scheduler_for([1] * 9, GREEDY).slots.rows == 3
    assert [len(c.ids) for c in engine.generate([[i] for i in range(9)], GREEDY)] == [12] * 9


@pytest.mark.parametrize(
    ("prompt", "change", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1] * 129, {}, "the prompt has 129 tokens, the model's context holds 128"),
        ([999], {}, "outside the model's vocabulary"),
        ([1], {"logit_bias": {999: 1.0}}, "token 999 is unknown"),
        ([1], {"n": 0}, "n 0"),
        ([1], {"temperature": -0.5}, "temperature -0.5"),
        ([1], {"stop": ("",)}, "stop string is empty"),
    ],
)
def test_a_bad_request_is_refused_and_the_others_go_on(
    model: CausalLM, prompt: list[int], change: dict[str, object], message: str
) -> None:
    scheduler = Scheduler(Decoder(model), [], 4, 128)
    made = [scheduler.submit(Request([i, 7], GREEDY))[0] for i in range(3)]
    scheduler.step()
    with pytest.raises(UserError, match=message) as error:
        scheduler.submit(Request(prompt, replace(GREEDY, **change)))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    run(scheduler)
    for i, generation in enumerate(made):
        assert_same(generation.completion(), alone(model, [i, 7], GREEDY))


@pytest.mark.parametrize("damage", ["prompt", "made", "should_stop", "nothing left"])
def test_a_request_that_fails_harms_nobody(damage: str, model: CausalLM) -> None:
    broken = random_model(model.config.vocab_size)
    broken.lm_head.weight = torch.nn.Parameter(broken.lm_head.weight.clone())  # not tied any more
    expected = [alone(broken, [i, 7], GREEDY) for i in range(8)]
    ids = {token for completion in expected for token in completion.ids} | {*range(8)}
    bad_id = next(i for i in range(50, 300) if i not in ids)
    with torch.no_grad():
        broken.model.embed_tokens.weight[bad_id] = math.nan
    scheduler = Scheduler(Decoder(broken), [3], 3, 40)
    request = Request([bad_id, 7], GREEDY)
    if damage == "made":  # the first token is the one that breaks the second step
        request = Request([5, 5], replace(GREEDY, logit_bias={bad_id: 100.0}))
    if damage == "should_stop":
        request = Request([5, 5], GREEDY, should_stop=lambda sample, token: bool(1 / 0))
    if damage == "nothing left":
        request = Request([5, 5], replace(GREEDY, logit_bias={bad_id: 100.0}, banned=((bad_id,),)))
    made = []
    for i in range(8):
        made += scheduler.submit(Request([i, 7], GREEDY))
        if i % 3 == 1:
            bad = scheduler.submit(request)[0]
            scheduler.step()
    run(scheduler)
    with pytest.raises(ZeroDivisionError if damage == "should_stop" else UserError) as error:
        bad.completion()
    assert "\n" not in str(error.value)
    with pytest.raises(type(error.value)):
        list(bad.events(scheduler.step))
    for generation, one in zip(made, expected, strict=True):
        assert_same(generation.completion(), one)


def test_what_a_broken_request_leaves_in_the_cache_is_wiped(model: CausalLM) -> None:
    """Attention multiplies what it must not see by zero, and zero times NaN is NaN."""
    broken = random_model(model.config.vocab_size)
    broken.lm_head.weight = torch.nn.Parameter(broken.lm_head.weight.clone())
    with torch.no_grad():
        broken.model.embed_tokens.weight[77] = math.nan
    scheduler = Scheduler(Decoder(broken), [], 2, 60)
    bad = scheduler.submit(Request([77] * 20, replace(GREEDY, n=2)))[1]
    run(scheduler)
    assert isinstance(bad.error, UserError)
    prompts = [[5] * 25, [6, 7]]
    made = []
    for prompt in prompts:  # the short one joins later: read together, padding would cover the NaN
        made += scheduler.submit(Request(prompt, GREEDY))
        scheduler.step()
    run(scheduler)
    for generation, prompt in zip(made, prompts, strict=True):
        assert_same(generation.completion(), alone(broken, prompt, GREEDY))


def test_an_interrupted_step_leaves_nobody_waiting(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(Decoder(model), [], 1, 40)
    made = [scheduler.submit(Request([i, 7], GREEDY))[0] for i in range(3)]
    scheduler.step()
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            scheduler.step()
    for generation in made:
        with pytest.raises(RuntimeError, match="interrupted"):
            list(generation.events())
    again = scheduler.submit(Request([0, 7], GREEDY))[0]
    run(scheduler)
    assert_same(again.completion(), alone(model, [0, 7], GREEDY))


def test_min_tokens_and_stop_ids(model: CausalLM) -> None:
    free = alone(model, [4, 5], GREEDY).ids
    place = next(i for i, token in enumerate(free) if i and token not in free[:i])
    params = replace(GREEDY, stop_ids=(free[place],))
    made = alone(model, [4, 5], params)
    assert (made.ids, made.finish_reason) == (free[:place], "stop")
    assert made.stop_token is not None and made.stop_token.id == free[place]
    longer = alone(model, [4, 5], replace(params, min_tokens=6))
    assert len(longer.ids) >= 6 and free[place] not in longer.ids[:6]


def test_common_prefix() -> None:
    for first, second in itertools.product([[], [1], [1, 2], [1, 2, 3], [2, 1], [1, 2, 4, 5]], repeat=2):
        by_hand = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
        assert common_prefix(first, second) == (min(len(first), len(second)) if by_hand is None else by_hand)


def stemmed_prompts(count: int, seed: int) -> list[list[int]]:
    """Prompts that share beginnings of all lengths around the one from which on they are reused."""
    chosen = random.Random(seed)
    stems = [[chosen.randrange(256) for _ in range(60)] for _ in range(2)]
    lengths = [0, 5, 30, 31, 32, 33, 45]
    return [
        chosen.choice(stems)[: chosen.choice(lengths)] + chosen.choices(range(3), k=chosen.randint(1, 4))
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_the_row_with_the_longest_common_prefix_is_found(model: CausalLM, seed: int) -> None:
    """As if every row were compared: the first of those that share most, where that is worth a copy."""
    slots = Slots(Decoder(model), 12, 64)
    with torch.inference_mode():
        for prompt in stemmed_prompts(12, seed)[: 6 + seed % 7]:
            rest = prompt[slots.take(prompt, reuse=False) :]
            list(slots.read(slots.used - 1, [rest]))
    held = slots._held
    for prompt in [*stemmed_prompts(40, seed), *(ids for ids in held if ids)]:
        longest = max(common_prefix(prompt, ids) for ids in held)
        found, row = slots.shared(prompt)
        wanted = min(longest, len(prompt) - 1)
        assert found == wanted if wanted >= MIN_SHARED_PREFIX_TOKENS else found <= wanted
        if found:
            assert row == min(row for row in range(12) if common_prefix(prompt, held[row]) == longest)


@pytest.mark.parametrize("seed", range(5))
def test_who_waits_shares_more_with_a_joining_prompt_than_with_a_row(model: CausalLM, seed: int) -> None:
    scheduler = Scheduler(Decoder(model), [3], 40, 80)
    read = [scheduler.submit(Request(prompt, GREEDY))[0] for prompt in stemmed_prompts(4, seed)]
    scheduler.step()
    joining = [
        made
        for i, prompt in enumerate(stemmed_prompts(36, seed)[4:])
        for made in scheduler.submit(Request(prompt, replace(GREEDY, n=1 + i % 2, echo=i % 5 == 0)))
    ]
    wave, later = scheduler._wave(joining)
    assert read and later and [g for g in joining if g in wave] == wave
    for generation in joining:
        prompt = generation.row.ids
        earlier = [g for g in wave if joining.index(g) < joining.index(generation)]
        common = max((common_prefix(prompt, other.row.ids) for other in earlier), default=0)
        more = common >= MIN_SHARED_PREFIX_TOKENS and common > scheduler.slots.shared(prompt)[0] + 1
        echoes = generation.request.params.echo and any(g.echoed is generation.echoed for g in earlier)
        assert (generation in later) == (more or echoes)


def test_prompts_that_share_nothing_are_not_compared_with_each_other(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of comparisons grows with the number of requests, not with its square."""
    compared: list[int] = []

    def spy(first: list[int], second: list[int]) -> int:
        compared.append(1)
        return common_prefix(first, second)

    monkeypatch.setattr("fledge.engine.slots.common_prefix", spy)
    monkeypatch.setattr("fledge.engine.scheduler.common_prefix", spy)
    prompts = [[i % 256, i // 256, *[7] * 38] for i in range(300)]
    Engine(model, [], batch_size=300).generate(prompts, replace(GREEDY, max_tokens=1))
    assert len(compared) < 3 * 300


def test_rows_change_places_and_keep_what_they_hold(model: CausalLM) -> None:
    """Against a fresh cache, whatever was taken, left and shared before."""
    chosen = random.Random(5)
    with torch.inference_mode():
        slots = Slots(Decoder(model), 4, 100)
        taken: list[list[int]] = []
        stem = [chosen.randrange(256) for _ in range(60)]
        for _ in range(60):
            if taken and (slots.used == 4 or chosen.random() < 0.5):
                row = chosen.randrange(slots.used)
                slots.leave(row, keep=chosen.random() < 0.8)
                last = taken.pop()
                if row < len(taken):
                    taken[row] = last
            else:
                prompt = stem[: chosen.randint(1, 60)] + [chosen.randrange(256) for _ in range(3)]
                rest = prompt[slots.take(prompt) :]
                list(slots.read(slots.used - 1, [rest]))
                taken.append(prompt)
            if taken:
                step = [chosen.randrange(256) for _ in taken]
                logits_BV = slots.step(step)
                for ids, token, logits_V in zip(taken, step, logits_BV, strict=True):
                    ids.append(token)
                    expected_V = model(torch.tensor([ids]))[0, -1]
                    torch.testing.assert_close(logits_V, expected_V, atol=1e-4, rtol=1e-4)
                taken = [ids for ids in taken]
                if max(map(len, taken)) > 95:
                    while slots.used:
                        slots.leave(0)
                    taken = []
