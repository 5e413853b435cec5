"""Constraints: what ends is valid, what is cut could have become so, and nobody else notices."""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fledge.engine.constraints import Constraint, Grammars, choices_grammar, choices_of
from fledge.engine.decoder import Decoder
from fledge.engine.engine import Engine
from fledge.engine.generation import Generation, Request
from fledge.engine.scheduler import Scheduler
from fledge.engine.text import LocalChat, TextCompletion, complete_ids, stream_ids
from fledge.errors import UserError
from fledge.model.transformer import CausalLM
from fledge.tokenizer.bpe import Tokenizer, train_bpe
from fledge.types import Grammar, SamplingParams, Token

from .. import foreign
from .conftest import TEXT, ChainModel, random_model

TOKENIZER = train_bpe([TEXT] * 3, 320)
# More ids than the tokenizer has, and no multiple of 32.
VOCAB_SIZE = TOKENIZER.vocab_size + 5
MODELS = [random_model(VOCAB_SIZE, family, seed=seed) for seed, family in enumerate(["qwen3", "llama"])]
GRAMMARS = Grammars(TOKENIZER, VOCAB_SIZE)
EOS = TOKENIZER.eos_id
PROMPT = TOKENIZER.encode("The cats sat")
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "hello": {"enum": ["the cats ate", "the books"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "hello", "age"],
    "additionalProperties": False,
}


def regex(text: str) -> Grammar:
    return Grammar("regex", text)


def schema(value: dict[str, Any]) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


def params(grammar: Grammar | None, **changes: Any) -> SamplingParams:
    return SamplingParams(constraint=grammar, **{"max_tokens": 40, **changes})


def engine_of(model: CausalLM, **options: Any) -> Engine:
    return Engine(model, [EOS], grammars=GRAMMARS, **options)


def made(
    grammar: Grammar, model: CausalLM = MODELS[0], prompt: list[int] = PROMPT, **changes: Any
) -> TextCompletion:
    return complete_ids(engine_of(model), TOKENIZER, [prompt], params(grammar, **changes))[0]


def allowed(constraint: Constraint) -> set[int]:
    words_W = torch.zeros(-(-VOCAB_SIZE // 32), dtype=torch.int32)
    constraint.mask(words_W)
    return {i for i in range(VOCAB_SIZE) if words_W[i // 32] >> i % 32 & 1}


def is_instance(value: Any, wanted: dict[str, Any]) -> bool:
    """JSON Schema for the keywords that the tests use."""
    if "enum" in wanted:
        return value in wanted["enum"]
    if "anyOf" in wanted:
        return any(is_instance(value, one) for one in wanted["anyOf"])
    kind = wanted["type"]
    if kind == "object":
        properties = wanted["properties"]
        return (
            isinstance(value, dict)
            and set(wanted["required"]) <= value.keys() <= properties.keys()
            and all(is_instance(item, properties[key]) for key, item in value.items())
        )
    if kind == "array":
        fits = isinstance(value, list) and wanted["minItems"] <= len(value) <= wanted["maxItems"]
        return fits and all(is_instance(item, wanted["items"]) for item in value)
    if kind == "string":
        return isinstance(value, str) and len(value) <= wanted["maxLength"]
    if kind == "integer":
        return type(value) is int and wanted["minimum"] <= value <= wanted["maximum"]
    return isinstance(value, bool) if kind == "boolean" else value is None


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    leaves = st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.integers(0, 6).map(lambda n: {"type": "string", "maxLength": n}),
        st.tuples(st.integers(-200, 0), st.integers(0, 3000)).map(
            lambda ends: {"type": "integer", "minimum": ends[0], "maximum": ends[1]}
        ),
        st.lists(st.sampled_from(["a", "ab", 'q"é', "the cats", 1, None]), min_size=1, unique=True).map(
            lambda values: {"enum": values}
        ),
    )

    def as_object(properties: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
        names = st.lists(st.sampled_from(sorted(properties)), unique=True) if properties else st.just([])
        fixed = {"type": "object", "properties": properties, "additionalProperties": False}
        return names.map(lambda required: {**fixed, "required": required})

    def larger(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        keys = st.sampled_from(["a", "name", "the cats", "é"])
        return st.one_of(
            st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
                lambda p: {"type": "array", "items": p[0], "minItems": p[1], "maxItems": p[1] + p[2]}
            ),
            st.lists(inner, min_size=1, max_size=3).map(lambda some: {"anyOf": some}),
            st.dictionaries(keys, inner, max_size=3).flatmap(as_object),
        )

    return st.recursive(leaves, larger, max_leaves=5)


def regexes() -> st.SearchStrategy[str]:
    leaves = st.sampled_from(["a", "the", " cats", "é", "🙂", "[0-9]", "[^ab]", "[a-fé]", ".", "\\.", '"'])

    def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        return st.one_of(
            st.lists(inner, min_size=2, max_size=4).map("".join),
            st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
            st.tuples(inner, st.sampled_from(["?", "*", "+", "{2}", "{1,3}"])).map(
                lambda p: f"({p[0]}){p[1]}"
            ),
        )

    return st.recursive(leaves, larger, max_leaves=8)


def check(grammar: Grammar, is_valid: Callable[[str], bool], model: int, seed: int, most: int) -> None:
    completion = made(grammar, MODELS[model], seed=seed, max_tokens=most, temperature=1.5)
    constraint = GRAMMARS.start(grammar, [EOS])
    for token_id in completion.ids:
        constraint.advance(token_id)
    assert completion.finish_reason in ("stop", "length")
    if completion.finish_reason == "stop":
        assert is_valid(completion.text), completion.text
        assert constraint.accepting
    else:
        assert len(completion.ids) == most and not constraint.finished
    assert len(completion.sampled_logps) == len(completion.logps) == len(completion.ids)
    for ours, raw in zip(completion.sampled_logps, completion.logps, strict=True):
        assert ours <= 1e-6 and raw < 0


PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@PROPERTY
@given(schemas(), st.integers(0, 1), st.integers(0, 1000), st.sampled_from([3, 40, 100]))
def test_json_is_an_instance_of_its_schema(value: dict[str, Any], model: int, seed: int, most: int) -> None:
    check(schema(value), lambda text: is_instance(json.loads(text), value), model, seed, most)


@PROPERTY
@given(regexes(), st.integers(0, 1), st.integers(0, 1000), st.sampled_from([3, 40]))
def test_texts_match_their_regular_expression(pattern: str, model: int, seed: int, most: int) -> None:
    check(regex(pattern), lambda text: re.fullmatch(pattern, text) is not None, model, seed, most)


@PROPERTY
@given(schemas(), st.integers(0, 1), st.integers(0, 1000))
def test_forcing_changes_no_token(value: dict[str, Any], model: int, seed: int) -> None:
    fast, slow = (
        made(schema(value), MODELS[model], seed=seed, max_tokens=60, banned=banned)
        for banned in ((), ((TOKENIZER.special_tokens["<think>"],),))
    )
    assert (fast.ids, fast.finish_reason) == (slow.ids, slow.finish_reason)
    assert fast.logps == pytest.approx(slow.logps, abs=1e-4)


def test_sentences_of_a_lark_grammar() -> None:
    grammar = Grammar("lark", 'start: sum\nsum: N | sum "+" sum | "(" sum ")"\nN: /[1-9]/')
    texts = [made(grammar, seed=seed, max_tokens=60) for seed in range(40)]
    ended = [one.text for one in texts if one.finish_reason == "stop"]
    assert len(ended) > 10 and any("(" in text for text in ended)
    for text in ended:
        assert re.search("[1-9]{2}", text) is None and ast.parse(text, mode="eval")


def test_special_tokens_are_text_unless_the_grammar_names_them() -> None:
    call = TOKENIZER.special_tokens["<tool_call>"]
    constraint = GRAMMARS.start(regex("(?s:.*)"), [EOS])
    assert allowed(constraint) & TOKENIZER.special_ids == {EOS}
    assert max(allowed(constraint)) < TOKENIZER.vocab_size
    named = GRAMMARS.start(Grammar("lark", "start: <tool_call> /a/ | <|endoftext|>"), [EOS])
    assert call in allowed(named) and EOS not in allowed(named)
    assert made(Grammar("lark", "start: <tool_call> /a/")).text == "<tool_call>a"


def states(text: str, grammar: Grammar) -> Iterator[Constraint]:
    constraint = GRAMMARS.start(grammar, [EOS])
    for token_id in TOKENIZER.encode(text):
        yield constraint
        constraint.advance(token_id)
    yield constraint


def test_ends_are_possible_where_the_grammar_accepts() -> None:
    seen = [(c.accepting, EOS in allowed(c), c.finished) for c in states("aXbX", regex("a|aXb(X)?"))]
    no, maybe, yes = (False, False, False), (True, True, False), (True, True, True)
    assert seen == [no, maybe, no, maybe, yes]


def test_rollback_and_fork() -> None:
    text = '{"name": "ab", "hello": "the books", "age": 12}'
    ids = TOKENIZER.encode(text)
    seen = [(allowed(c), c.forced(), c.accepting) for c in states(text, schema(SCHEMA))]
    constraint = GRAMMARS.start(schema(SCHEMA), [EOS])
    for token_id in ids:
        constraint.advance(token_id)
    for back in (1, 4, 2, len(ids) - 7):
        fork = constraint.fork()
        constraint.rollback(back)
        place = next(i for i in range(len(ids) + 1) if len(ids) - i == back) if fork.finished else None
        if place is not None:
            assert (allowed(constraint), constraint.forced(), constraint.accepting) == seen[place]
            for token_id in ids[place:]:
                constraint.advance(token_id)
        assert constraint.finished and fork.finished
    assert not constraint.start([EOS]).accepting and constraint.finished
    with pytest.raises(UserError, match="no token can follow"):
        constraint.advance(ids[0])


def test_end_ids_are_never_part_of_a_text() -> None:
    newline = TOKENIZER.encode("\n")[0]
    constraint = GRAMMARS.start(regex("a\n?"), [newline])
    constraint.advance(TOKENIZER.encode("a")[0])
    assert allowed(constraint) == {newline}  # it ends the text here; EOS is no end of this request
    assert GRAMMARS.start(regex("\n\n"), [newline]).forced() == []


@pytest.mark.parametrize(
    "changes", [{"temperature": 0.0}, {"seed": 3}, {"repetition_penalty": 1.4, "seed": 5}]
)
@pytest.mark.parametrize("rows", [1, 6])
def test_forced_tokens_are_those_of_decoding_one_by_one(
    rows: int, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A ban, even one that never applies, makes the engine choose every token.
    never = TOKENIZER.special_tokens["<think>"]
    passes, extend = [0], Decoder.extend

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        passes[0] += 1
        return extend(*args, **kwargs)

    monkeypatch.setattr(Decoder, "extend", counted)
    prompts = [PROMPT[: 1 + i] for i in range(rows)]
    both, counts = [], []
    for banned in ((), ((never,),)):
        passes[0] = 0
        wanted = params(schema(SCHEMA), max_tokens=70, top_logprobs=2, banned=banned, **changes)
        both.append(engine_of(MODELS[0]).generate(prompts, wanted))
        counts.append(passes[0])
    assert counts[0] < 0.75 * counts[1]
    for fast, slow in zip(*both, strict=True):
        assert (fast.ids, fast.finish_reason) == (slow.ids, slow.finish_reason)
        assert fast.logps == pytest.approx(slow.logps, abs=1e-4)
        assert fast.sampled_logps == pytest.approx(slow.sampled_logps, abs=1e-4)
        assert [[i for i, _ in top] for top in fast.top_logps] == [[i for i, _ in t] for t in slow.top_logps]
    assert any(completion.finish_reason == "stop" for completion in both[0])


def test_one_forced_text_is_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    passes, extend = list[int](), Decoder.extend
    monkeypatch.setattr(
        Decoder,
        "extend",
        lambda self, ids, *rest: (passes.append(ids.shape[1]), extend(self, ids, *rest))[1],
    )
    text = "Hello, hello! The cats ate; the café sells books."
    completion = made(choices_grammar([text]))
    assert (completion.text, completion.finish_reason) == (text, "stop")
    assert completion.ids == TOKENIZER.encode(text)
    assert passes == [len(PROMPT), len(completion.ids)]


def test_a_neighbour_without_a_constraint_is_untouched() -> None:
    def run(requests: list[Request]) -> list[Generation]:
        scheduler = Scheduler(Decoder(MODELS[0]), [EOS], 4, 128, grammars=GRAMMARS)
        generations = [generation for request in requests for generation in scheduler.submit(request)]
        while scheduler.step():
            pass
        return generations

    free = Request(PROMPT, params(None, seed=4, max_tokens=30), 1)
    others = [Request(PROMPT, params(schema(SCHEMA), seed=i), i) for i in range(3)]
    together, alone = run([others[0], free, *others[1:]]), run([free])
    assert together[1].completion().ids == alone[0].completion().ids
    expected = alone[0].completion()
    assert together[1].completion().logps == pytest.approx(expected.logps, abs=1e-4)
    # Where nothing constrains, the distribution is the model's own.
    assert together[1].completion().sampled_logps == pytest.approx(expected.logps, abs=1e-4)


def test_the_sampled_probabilities_are_those_of_what_is_allowed() -> None:
    """Of two possible first tokens, by hand."""
    a, b = TOKENIZER.encode("a")[0], TOKENIZER.encode("b")[0]
    (completion,) = engine_of(MODELS[0]).generate(
        [PROMPT], params(regex("[ab]"), temperature=0.0, top_logprobs=VOCAB_SIZE)
    )
    raw = dict(completion.top_logps[0])
    pair = torch.tensor([raw[a], raw[b]]).log_softmax(0)
    assert completion.ids == [a if raw[a] > raw[b] else b]
    assert completion.sampled_logps == pytest.approx([float(pair.max())], abs=1e-4)
    assert completion.logps == pytest.approx([max(raw[a], raw[b])], abs=1e-5)


def test_bans_that_leave_nothing_end_that_request_alone() -> None:
    scheduler = Scheduler(Decoder(MODELS[0]), [EOS], 4, 128, grammars=GRAMMARS)
    b = TOKENIZER.encode("b")[0]
    settings_ = [
        params(regex("ab")),
        params(regex("ab"), banned=((b,),)),
        params(regex("ab"), logit_bias={b: -100.0}),
        params(regex("ab"), min_tokens=5),
        params(regex("ab"), logit_bias={EOS: 100.0}),
        params(None, max_tokens=3),
    ]
    generations = [scheduler.submit(Request(PROMPT, one))[0] for one in settings_]
    while scheduler.step():
        pass
    good, banned, biased, least, only, free = generations
    assert TOKENIZER.decode(good.completion().ids) == "ab" and good.reason == "stop"
    assert len(free.completion().ids) == 3
    for generation, message in [
        (banned, "after 1 tokens the constraint, bans"), (biased, "after 1 tokens the constraint, bans"),
        (least, "complete after 2 tokens and cannot go on to min_tokens 5"), (only, "after 0 tokens"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message) as error:
            generation.completion()
        assert "\n" not in str(error.value)


def test_min_tokens_and_bias_within_what_is_possible() -> None:
    assert len(made(regex("a*"), min_tokens=6, max_tokens=40, logit_bias={EOS: 99.0}).ids) == 6
    a, b = (TOKENIZER.encode(text)[0] for text in "ab")
    assert made(regex("[ab]{4}"), logit_bias={b: 60.0, a: -60.0}).text == "bbbb"


def test_penalties_count_what_was_forced() -> None:
    """`hello` is forced twice, then `h` competes with `x`: without the penalty it would win."""
    h, x = TOKENIZER.encode("h")[0], TOKENIZER.encode("x")[0]
    grammar = regex("hhhhhhh(h|x)")
    for penalty, last in ((0.0, "h"), (2.0, "x")):
        completion = made(grammar, temperature=0.0, logit_bias={}, frequency_penalty=penalty)
        raw = engine_of(MODELS[0]).generate(
            [[*PROMPT, *[h] * 7]], params(None, max_tokens=1, top_logprobs=VOCAB_SIZE)
        )[0]
        scores = dict(raw.top_logps[0])
        wins = "h" if scores[h] - 7 * penalty > scores[x] else "x"
        assert completion.text[-1] == wins
        if penalty:
            assert wins == last or scores[h] - scores[x] > 14


def test_complete_at_the_last_token_is_complete() -> None:
    whole = len(TOKENIZER.encode("the cats"))
    assert made(choices_grammar(["the cats"]), max_tokens=whole).finish_reason == "stop"
    cut = made(choices_grammar(["the cats"]), max_tokens=whole - 1)
    assert (cut.finish_reason, len(cut.ids)) == ("length", whole - 1)
    full = made(choices_grammar(["the cats ate"]), prompt=[7] * 126)
    assert (full.finish_reason, len(full.ids)) == ("context", 2)


def test_a_stop_string_ends_a_text_only_where_it_is_complete() -> None:
    """`,` stands inside the list, where the text before it is no list; after the list it would be an end."""
    wanted = params(regex(r"\[1,2\](,3)?"), stop=(",", "1,2"), logit_bias={EOS: -100.0})
    engine = engine_of(MODELS[0])
    (completion,) = complete_ids(engine, TOKENIZER, [PROMPT], wanted)
    assert (completion.text, completion.finish_reason) == ("[1,2]", "stop")
    assert "".join(stream_ids(engine, TOKENIZER, PROMPT, wanted)) == "[1,2]"
    assert made(regex(r"\[1,2\],3"), stop=(",",)).text == "[1,2],3"


def test_all_ends_of_a_chat(tokenizer: Tokenizer, chain_model: ChainModel) -> None:
    """The model ends its turn after every token; it may where the answer is complete."""
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    chat = LocalChat(Engine(chain_model({}), [tokenizer.eos_id], grammars=grammars), tokenizer)
    answer = chat.reply([{"role": "user", "content": "?"}], params(regex("[0-9]{3,}"), temperature=0.0))
    assert re.fullmatch("[0-9]{3}", answer.text) and answer.finish_reason == "stop"
    assert answer.sampled_logps[0] == pytest.approx(answer.sampled_logps[1])


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (regex("a["), 'regex: .*"a\\[".*unclosed character class'),
        (regex("(?=a)b"), "look-around.* not supported"),
        (regex(r"(a)\1"), "backreferences are not supported"),
        (regex(r"[^\s\S]"), "regex: allows no text"),
        (schema({"type": "foo"}), "json_schema: Invalid type: foo"),
        (schema({"enum": []}), "json_schema: Unsatisfiable schema"),
        (schema({"type": "array", "uniqueItems": True}), 'Unimplemented keys: \\["uniqueItems"\\]'),
        (Grammar("json_schema", "{"), "json_schema: not valid JSON"),
        (Grammar("json_schema", "[1]"), "json_schema: must be an object"),
        (Grammar("lark", 'start: "a" b'), 'grammar: .*unknown name: "b"'),
        (Grammar("lark", 'start "a"'), "grammar: 1\\(7\\): Expected token"),
        (Grammar("lark", "start: x\nx: x"), "grammar: allows no text"),
        (Grammar("lark", ""), "grammar: Empty grammar"),
    ],
)
def test_what_cannot_be_compiled_is_said_at_once(grammar: Grammar, message: str) -> None:
    scheduler = Scheduler(Decoder(MODELS[0]), [EOS], 2, 64, grammars=GRAMMARS)
    other = scheduler.submit(Request(PROMPT, params(None, max_tokens=4)))[0]
    scheduler.step()
    with pytest.raises(UserError, match=message) as error:
        scheduler.submit(Request(PROMPT, params(grammar)))
    assert "\n" not in str(error.value)
    while scheduler.step():
        pass
    assert len(other.completion().ids) == 4


def test_an_engine_without_grammars_says_so() -> None:
    with pytest.raises(UserError, match="without Grammars"):
        Engine(MODELS[0], [EOS]).generate([PROMPT], params(regex("a")))


def test_choices() -> None:
    texts = ["A", "AB", 'q"\\n\n', "ABé🙂", "a.b", "[x]"]
    grammar = choices_grammar(texts)
    assert choices_of(grammar) == texts and choices_of(regex("a")) is None
    found = {made(grammar, seed=seed, temperature=3.0).text for seed in range(60)}
    assert found == set(texts)
    for wrong in ([], ["a", "a"], ["a", ""]):
        with pytest.raises(UserError, match="choices: "):
            choices_grammar(wrong)


def test_whole_texts_are_judged() -> None:
    for text, whole in {"AB": True, "A": False, "ABC": False, "": False}.items():
        assert GRAMMARS.accepts(regex("AB"), text) is whole


def test_tokens_stream_with_what_was_forced() -> None:
    engine = engine_of(MODELS[0])
    wanted = replace(params(schema(SCHEMA), seed=2), max_tokens=70)
    streamed = [event for event in engine.stream(PROMPT, wanted) if isinstance(event, Token)]
    assert [token.id for token in streamed] == engine.generate([PROMPT], wanted)[0].ids


def test_a_damaged_model_is_an_error_also_in_what_is_forced() -> None:
    broken = random_model(VOCAB_SIZE)
    ids = TOKENIZER.encode("the cats")
    with torch.no_grad():
        broken.model.embed_tokens.weight[ids[0]] = torch.nan
        broken.lm_head.weight = torch.nn.Parameter(broken.lm_head.weight.nan_to_num())
    with pytest.raises(UserError, match="not numbers"):
        engine_of(broken).generate([PROMPT], params(choices_grammar(["the cats"])))


def test_the_same_grammar_is_compiled_once() -> None:
    grammars = Grammars(TOKENIZER, VOCAB_SIZE)
    first = grammars.start(regex("a+"))
    before = grammars.masks
    for i in range(80):
        grammars.start(regex("a+"))
        assert grammars.masks == before + i  # the only mask of a compilation
        grammars.start(regex(f"a{i}"))
    assert not first.accepting and grammars.mask_seconds > 0


@pytest.mark.parametrize("kind", foreign.KINDS)
def test_tokenizers_of_other_kinds(kind: str, tmp_path: Path) -> None:
    foreign.KINDS[kind](tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    size = tokenizer.vocab_size + 3
    engine = Engine(random_model(size), [tokenizer.eos_id], grammars=Grammars(tokenizer, size))
    wanted = {
        "type": "array",
        "items": {"enum": ["Brücke", " x🦊", "素早い狐"]},
        "minItems": 2,
        "maxItems": 3,
    }
    for seed, never in itertools.product(range(4), ((), ((size - 1,),))):
        for grammar in (regex(" fox[0-9é狐]{3}"), schema(wanted)):
            one = params(grammar, seed=seed, max_tokens=90, banned=never)
            (completion,) = complete_ids(engine, tokenizer, [tokenizer.encode("The quick")], one)
            assert completion.finish_reason == "stop"
            if grammar.kind == "regex":
                assert re.fullmatch(grammar.text, completion.text)
            else:
                assert is_instance(json.loads(completion.text), wanted)
