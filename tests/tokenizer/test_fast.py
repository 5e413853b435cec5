"""The fast encoder: the ids of `tokenizers` for every text, or none at all."""

from __future__ import annotations

import json
import string
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from fledge.errors import UserError
from fledge.tokenizer.bpe import BYTE_OF_CHAR, SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, train_bpe
from fledge.tokenizer.fast import (
    GPT2_PATTERN,
    LLAMA3_PATTERN,
    SEPARATOR,
    WHITE_SPACE_CHARACTERS,
    fast_encoder,
)

CHAR_OF_BYTE = {byte: char for char, byte in BYTE_OF_CHAR.items()}
Model = dict[str, Any]


def library_texts() -> list[str]:
    """Text that every Python carries: code, prose, and other scripts."""
    folder = Path(json.__file__).parent.parent
    names = ["argparse.py", "html/entities.py", "encodings/punycode.py", "pydoc_data/topics.py", "this.py"]
    return [(folder / name).read_text(encoding="utf-8")[:60_000] for name in names]


TEXTS = [
    *library_texts(),
    "Der Weg führt über die Brücke; grüße Jürgen. Быстрая лиса. 素早い狐 素早い犬 🦊🦊 שלום עולם e\u0301\n"
    * 20,
    "\tif x:\r\n\t\treturn  'don't'\r\n\r\n   \n  1984 12345 '9'\u00a0\u2003x \u0085y\u200d\u2028" * 20,
]


def gpt2_style(tokenizer: Tokenizer) -> Tokenizer:
    """The same merges behind GPT-2's pre-tokenizer."""
    return changed(tokenizer, pre_tokenizer={"type": "ByteLevel", **BYTE_LEVEL, "use_regex": True})


BYTE_LEVEL = {"add_prefix_space": False, "trim_offsets": True}


def split_by(regex: str, **changes: object) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", **BYTE_LEVEL, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [{**split, **changes}, byte_level]}


def changed(tokenizer: Tokenizer, model: Model | None = None, **parts: object) -> Tokenizer:
    """A tokenizer with other parts in its tokenizer.json."""
    data = json.loads(tokenizer._backend.to_str())
    data.update(parts)
    data["model"].update(model or {})
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(data)), {}, None)


def renumbered(tokenizer: Tokenizer) -> Tokenizer:
    """Ids in the opposite order: GPT-2's order of ids is a habit, not a rule."""
    model = json.loads(tokenizer._backend.to_str())["model"]
    vocab = {token: len(model["vocab"]) - 1 - i for token, i in model["vocab"].items()}
    return changed(tokenizer, {"vocab": vocab})


def with_all_splits(tokenizer: Tokenizer) -> Tokenizer:
    """Every way to cut a token in two is a merge, as in tokenizers that were made from tiktoken files."""
    model = json.loads(tokenizer._backend.to_str())["model"]
    merges = [
        [token[:i], token[i:]]
        for token in sorted(model["vocab"], key=model["vocab"].__getitem__)
        for i in range(1, len(token))
        if token[:i] in model["vocab"] and token[i:] in model["vocab"]
    ]
    assert len(merges) > len(model["merges"])
    return changed(tokenizer, {"merges": merges, "ignore_merges": True})


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "ours": lambda: train_bpe(TEXTS, 2000),
    "ours, small": lambda: train_bpe(TEXTS, 300),
    "bytes only": lambda: train_bpe([], 300),
    "gpt-2": lambda: gpt2_style(train_bpe(TEXTS, 1500)),
    "gpt-2's pattern in a split": lambda: changed(
        train_bpe(TEXTS, 900), pre_tokenizer=split_by(GPT2_PATTERN)
    ),
    "llama 3": lambda: with_all_splits(
        changed(train_bpe(TEXTS, 1200), pre_tokenizer=split_by(LLAMA3_PATTERN))
    ),
    "other order of ids": lambda: renumbered(train_bpe(TEXTS, 800)),
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return KINDS[request.param]()


def check_same(tokenizer: Tokenizer, texts: list[str]) -> None:
    encode = fast_encoder(tokenizer)
    assert encode is not None
    assert [ids.tolist() for ids in encode(texts)] == tokenizer.encode_batch(texts)


ODD = "\n\t\r\x00.,-_='\"09²½٣éß\u017fKµ\u0301\u0085\u00a0\u2028\u200d\ufeff漢字🦊\U000e0001"
WORDS = ["'ll", "'RE", "\r\n", "  ", "the", " the", "1984", "\n\n\n", "۱۲", "ﬁ", "İ", SEPARATOR, SEPARATOR[0]]
pieces = st.sampled_from([*SPECIAL_TOKENS, *WORDS, *ODD, *"aeinost ETAN"])
texts = st.lists(st.text() | st.lists(pieces, max_size=30).map("".join), max_size=4)


@given(texts=texts)
@example(["", "", SEPARATOR, f"a{SEPARATOR}b", " "])
@example(["ends in space ", " begins with it", "\n", "\n"])
def test_ids_are_those_of_tokenizers(tokenizer: Tokenizer, texts: list[str]) -> None:
    check_same(tokenizer, texts)


def test_ids_of_real_text(tokenizer: Tokenizer) -> None:
    check_same(tokenizer, TEXTS)


def character_contexts(characters: Iterator[str]) -> Iterator[str]:
    """Each character where its kind (letter, number, space, line break, case of 's) decides the split."""
    for c in characters:
        yield f"a{c}a 1{c}1 .{c}. {c}{c} '{c} x'{c}e  {c}\n{c}\n\n 'l{c}"


def pairs_tokenizer(pattern: str) -> Tokenizer:
    """Every pair of bytes is a token, so the ids tell the borders of the pieces."""
    vocab = {CHAR_OF_BYTE[byte]: byte for byte in range(256)}
    merges = [(CHAR_OF_BYTE[a], CHAR_OF_BYTE[b]) for a in range(256) for b in range(256)]
    vocab |= {a + b: 256 + i for i, (a, b) in enumerate(merges)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|endoftext|>")])
    return Tokenizer(backend, {}, None)


PATTERNS = {"ours": SPLIT_PATTERN, "gpt-2": GPT2_PATTERN, "llama 3": LLAMA3_PATTERN}


@pytest.mark.parametrize("step", [1999, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_both_libraries_know_the_same_characters(pattern: str, step: int) -> None:
    """Their Unicode tables differ in principle; a new letter is a letter to both or to neither."""
    planes = [
        *range(0, 0x32000, step),
        *range(0x32000, sys.maxunicode + 1, 1999),
        *range(0xE0000, 0xE0200, step),
    ]
    every = (chr(c) for c in planes if not 0xD800 <= c < 0xE000)
    tokenizer = pairs_tokenizer(pattern)
    encode = fast_encoder(tokenizer)
    assert encode is not None
    contexts = list(character_contexts(every))
    for start in range(0, len(contexts), 10_000):
        batch = contexts[start : start + 10_000]
        assert [ids.tolist() for ids in encode(batch)] == tokenizer.encode_batch(batch)


MANY = 1_000_000


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("a" * MANY, id="letter"),
        pytest.param(" " * (MANY // 4), id="spaces"),
        pytest.param("\t" * (MANY // 4) + "x", id="tabs and a letter"),
        pytest.param("\n" * (MANY // 4) + "x", id="line breaks"),
        pytest.param("x" + " \n" * (MANY // 8), id="blank lines"),
        pytest.param("-" * (MANY // 4) + "\n" * (MANY // 4), id="a rule"),
        pytest.param(
            "a" * 9 + " " * (2 * WHITE_SPACE_CHARACTERS - 1) + "x", id="the longest run that passes"
        ),
        pytest.param("\u3000" * (MANY // 8) + "。", id="wide spaces"),
    ],
)
def test_long_runs(text: str) -> None:
    """One megabyte of the same: neither quadratic time (it would take hours) nor an overflowing stack."""
    check_same(KINDS["ours, small"](), [text, "and more"])


# Which tokenizers have one.

letters = st.sampled_from("abc")


@st.composite
def random_merges(draw: st.DrawFn) -> list[tuple[str, str]]:
    """Merges in any order that names only tokens there are, so also such as never happen."""
    tokens = ["a", "b", "c"]
    merges: list[tuple[str, str]] = []
    for _ in range(draw(st.integers(1, 8))):
        pair = (draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens)))
        if pair not in merges:
            merges.append(pair)
            if "".join(pair) not in tokens:
                tokens.append("".join(pair))
    return draw(st.permutations(merges)) if draw(st.booleans()) else merges


def with_merges(merges: list[tuple[str, str]]) -> Tokenizer:
    vocab = {CHAR_OF_BYTE[byte]: byte for byte in range(256)}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    return changed(train_bpe([], 300), {"vocab": vocab, "merges": merges}, added_tokens=END)


END = [
    {
        "id": 5000,
        "content": "<|endoftext|>",
        "special": True,
        **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
    }
]


@given(merges=random_merges(), texts=st.lists(st.text(letters, max_size=20), min_size=1, max_size=10))
def test_whatever_the_merges_the_ids_are_right_or_refused(
    merges: list[tuple[str, str]], texts: list[str]
) -> None:
    tokenizer = with_merges(merges)
    if fast_encoder(tokenizer) is not None:
        check_same(tokenizer, texts)


def test_a_merge_that_never_happens_is_refused() -> None:
    # In "abc" the first merge makes a, bc, so the third never happens: tokenizers leaves it at that, while
    # merging by the result's rank would join a and bc.
    unreachable = with_merges([("b", "c"), ("a", "b"), ("ab", "c")])
    assert len(unreachable.encode("abc")) == 2
    assert fast_encoder(unreachable) is None
    reachable = with_merges([("a", "b"), ("b", "c"), ("ab", "c")])
    assert len(reachable.encode("abc")) == 1
    check_same(reachable, ["abc", "bcabc", "aabbcc"])


def test_a_token_that_is_made_twice_is_refused() -> None:
    """The second way has a later rank than the first: one rank for the result cannot say so."""
    assert fast_encoder(with_merges([("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc")])) is None


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": split_by(SPLIT_PATTERN.replace(r"\p{N}", r"\p{N}{1,2}"))},
        {"pre_tokenizer": split_by(SPLIT_PATTERN, behavior="Removed")},
        {"pre_tokenizer": split_by(SPLIT_PATTERN, invert=True)},
        {"pre_tokenizer": split_by(SPLIT_PATTERN, pattern={"String": " "})},
        {"pre_tokenizer": {"type": "ByteLevel", **BYTE_LEVEL, "use_regex": False}},
        {"pre_tokenizer": {"type": "ByteLevel", **BYTE_LEVEL, "use_regex": True, "add_prefix_space": True}},
        {"model": {"dropout": 0.1}},
        {"model": {"byte_fallback": True}},
        {"model": {"end_of_word_suffix": "</w>"}},
    ],
    ids=str,
)
def test_what_tiktoken_cannot_do_is_refused(parts: dict[str, Any]) -> None:
    tokenizer = train_bpe([], 300)
    assert fast_encoder(tokenizer) is not None
    assert fast_encoder(changed(tokenizer, **parts)) is None


def test_a_vocabulary_without_some_byte_is_refused() -> None:
    model = json.loads(train_bpe([], 300)._backend.to_str())["model"]
    del model["vocab"][CHAR_OF_BYTE[0xFF]]
    assert fast_encoder(changed(train_bpe([], 300), model)) is None


def test_words_that_no_merges_lead_to() -> None:
    """They are out of reach, unless `ignore_merges` takes whole words from the vocabulary."""
    vocab = json.loads(train_bpe([], 300)._backend.to_str())["model"]["vocab"] | {"word": 4000}
    plain = changed(train_bpe([], 300), {"vocab": vocab})
    check_same(plain, ["word", "a word"])
    ignoring = changed(train_bpe([], 300), {"vocab": vocab, "ignore_merges": True})
    assert ignoring.encode("word") == [4000]
    assert fast_encoder(ignoring) is None


def test_special_tokens_are_text() -> None:
    tokenizer = train_bpe(TEXTS, 500)
    encode = fast_encoder(tokenizer)
    assert encode is not None
    ids = encode(["".join(SPECIAL_TOKENS)])[0].tolist()
    assert tokenizer.special_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == "".join(SPECIAL_TOKENS)


@pytest.mark.parametrize("half", ["\ud800", "ab\udfff"])
def test_half_a_surrogate_pair_is_named(half: str) -> None:
    encode = fast_encoder(train_bpe([], 300))
    assert encode is not None
    with pytest.raises(UserError, match=r"text 1: character .* half of a surrogate pair"):
        encode(["fine", half])


def test_threads_may_share_it() -> None:
    tokenizer = train_bpe(TEXTS, 1000)
    encode = fast_encoder(tokenizer)
    assert encode is not None
    expected = tokenizer.encode_batch(TEXTS)
    with ThreadPoolExecutor(4) as pool:
        for done in pool.map(encode, [TEXTS] * 8):
            assert [ids.tolist() for ids in done] == expected


def test_nothing_is_encoded_as_nothing() -> None:
    encode = fast_encoder(train_bpe([], 300))
    assert encode is not None
    assert encode([]) == []
    assert [len(ids) for ids in encode(["", string.ascii_letters, ""])] == [0, 52, 0]
