"""Text over ids: pieces joined are the text, stop strings never show, chats end at their turn."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.engine.engine import Engine
from fledge.engine.text import (
    LocalChat,
    TextCompletion,
    TextStream,
    complete,
    complete_ids,
    load_engine,
    stream_ids,
    terminal_safe,
)
from fledge.errors import UserError
from fledge.model.checkpoint import save_model
from fledge.model.transformer import CausalLM
from fledge.tokenizer.bpe import SPECIAL_TOKENS, Tokenizer, train_bpe
from fledge.types import Message, SamplingParams

ChainModel = Callable[[Mapping[int, int]], CausalLM]

# Few characters, of one to four bytes, so that stop strings are met and half-met all the time.
LETTERS = "ab é漢🙂"
TEXTS = st.text(LETTERS, max_size=30) | st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=3)

# Module level, because a hypothesis test cannot take a fixture that is made anew for each example.
TOKENIZER = train_bpe(["The café sells naïve 漢字 books. ab ab aé 🙂🙂 "] * 3, 300)
BYTES = {TOKENIZER.token_bytes(i): i for i in range(256)}


def byte_ids(text: str) -> list[int]:
    """The most broken-up ids of a text: one a byte."""
    return [BYTES[bytes([byte])] for byte in text.encode()]


def streamed(ids: list[int], stop: list[str]) -> tuple[list[str], TextStream]:
    text = TextStream(TOKENIZER, stop)
    pieces = [text.push(token) for token in ids]
    pieces.append(text.finish())
    assert "".join(pieces) == text.text
    return pieces, text


def expected_text(text: str, stop: list[str]) -> str:
    """Character by character: the text before the longest stop string that is complete first."""
    for end in range(len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))]
    return text


@given(TEXTS)
def test_pieces_joined_are_the_text(text: str) -> None:
    for ids in (TOKENIZER.encode(text), byte_ids(text)):
        pieces, stream = streamed(ids, [])
        assert "".join(pieces) == text
        assert stream.num_ids == len(ids)
        assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=30))
def test_any_ids_are_what_the_tokenizer_decodes(ids: list[int]) -> None:
    pieces, _ = streamed(ids, [])
    assert "".join(pieces) == TOKENIZER.decode(ids, skip_special=True)


@given(st.lists(st.sampled_from(sorted(BYTES.values())), max_size=20))
def test_invalid_bytes_become_what_python_makes_of_them(ids: list[int]) -> None:
    pieces, _ = streamed(ids, [])
    assert "".join(pieces) == b"".join(map(TOKENIZER.token_bytes, ids)).decode(errors="replace")


@given(TEXTS, STOPS)
def test_the_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    expected = expected_text(text, stop)
    for ids in (TOKENIZER.encode(text), byte_ids(text)):
        _, stream = streamed(ids, stop)
        assert stream.text == expected
        assert stream.stopped == (expected != text or any(text.endswith(s) for s in stop))
        # The ids are the fewest whose text begins with what was kept.
        whole = [len(b"".join(map(TOKENIZER.token_bytes, ids[:n]))) for n in range(len(ids) + 1)]
        if stream.stopped:
            assert stream.num_ids == next(n for n, size in enumerate(whole) if size >= len(expected.encode()))
        else:
            assert stream.num_ids == len(ids)


@given(TEXTS, STOPS, st.integers(0, 12))
def test_no_stop_string_is_looked_for_in_the_first_tokens(text: str, stop: list[str], least: int) -> None:
    ids = byte_ids(text)
    stream = TextStream(TOKENIZER, stop, least)
    pieces = [stream.push(token) for token in ids]
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text
    # Characters that are whole within the first tokens; a character cut there belongs to what follows.
    first = text.encode()[:least].decode(errors="ignore")
    assert stream.text == first + expected_text(text[len(first) :], stop)
    assert stream.num_ids >= min(least, len(ids))


def test_text_that_may_be_a_stop_string_is_held() -> None:
    text = TextStream(TOKENIZER, ["abc", "b!"])
    pushed = [text.push(token) for token in byte_ids("xabxabc")]
    assert pushed == ["x", "", "", "abx", "", "", ""]
    assert (text.stopped, text.text, text.finish(), text.push(5)) == (True, "xabx", "", "")
    text = TextStream(TOKENIZER, ["abc"])
    assert [text.push(token) for token in byte_ids("xab")] == ["x", "", ""]
    assert (text.finish(), text.text, text.stopped) == ("ab", "xab", False)


def test_control_tokens_have_no_text_and_markup_has() -> None:
    ids = TOKENIZER.encode_special("a<|im_start|><tool_call>b</tool_call><|im_end|>")
    assert len(ids) == 6
    pieces, _ = streamed(ids, [])
    assert "".join(pieces) == "a<tool_call>b</tool_call>"
    assert set(SPECIAL_TOKENS) >= {"<tool_call>", "<|im_start|>"}


def last(stream: object) -> tuple[str, TextCompletion]:
    pieces = []
    while True:
        try:
            pieces.append(next(stream))  # type: ignore[call-overload]
        except StopIteration as end:
            return "".join(pieces), end.value


@pytest.mark.parametrize("stop", [(), ("e",), ("\ufffd",), (" ", "the")])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_batched_and_streamed_texts_are_the_same(
    stop: tuple[str, ...], seed: int, model: CausalLM, tokenizer: Tokenizer
) -> None:
    engine = Engine(model, [tokenizer.eos_id])
    params = SamplingParams(max_tokens=24, seed=seed, stop=stop, top_logprobs=1)
    prompts = ["The cats", "", "Hello, 漢字", "x"]
    made = complete(engine, tokenizer, prompts, params)
    ids = [tokenizer.encode("The cats"), [tokenizer.eos_id], *map(tokenizer.encode, prompts[2:])]
    assert made == complete_ids(engine, tokenizer, ids, params)
    text, first = last(stream_ids(engine, tokenizer, ids[0], params))
    assert (text, first.text, first.ids, first.finish_reason) == (
        made[0].text, made[0].text, made[0].ids, made[0].finish_reason
    )  # fmt: skip
    assert first.logps == pytest.approx(made[0].logps, abs=1e-4)
    for completion in made:
        assert not any(s in completion.text for s in stop)
        assert len(completion.ids) == len(completion.logps) == len(completion.sampled_logps)
        assert [len(top) for top in completion.top_logps] == [1] * len(completion.ids)
        whole = tokenizer.decode(completion.ids, skip_special=True)
        assert whole.startswith(completion.text.rstrip("\ufffd"))
        if completion.finish_reason == "length":
            assert len(completion.ids) == 24


def chain(tokenizer: Tokenizer, text: str, after: str = "\n") -> dict[int, int]:
    """Bytes of `text` (all different) in a row, from the byte `after` on."""
    ids = [tokenizer.encode(after)[0], *(i for char in text for i in tokenizer.encode(char))]
    return dict(itertools.pairwise(ids))


@pytest.fixture
def chat(chain_model: ChainModel, tokenizer: Tokenizer) -> LocalChat:
    return LocalChat(Engine(chain_model(chain(tokenizer, "Ok, yes!")), [tokenizer.eos_id]), tokenizer)


GREEDY = SamplingParams(temperature=0.0, max_tokens=20)
QUESTION = [Message(role="user", content="Well?")]


def test_an_answer_ends_with_its_turn(chat: LocalChat) -> None:
    made = chat.reply(QUESTION, GREEDY)
    assert (made.text, made.finish_reason) == ("Ok, yes!", "stop")
    assert chat.tokenizer.decode(made.ids) == "Ok, yes!"  # no end-of-turn token
    assert "".join(chat.stream(QUESTION, GREEDY)) == made.text
    assert last(chat.stream_reply(QUESTION, GREEDY)) == ("Ok, yes!", made)
    several = chat.replies([QUESTION, [Message(role="system", content="Be brief."), *QUESTION]], GREEDY)
    assert several == [made, made]


def test_an_answer_ends_at_a_stop_string(chat: LocalChat) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20, stop=(", y",))
    made = chat.reply(QUESTION, params)
    assert (made.text, made.finish_reason, len(made.ids)) == ("Ok", "stop", 2)
    assert list(chat.stream(QUESTION, params)) == ["O", "k"]
    made = chat.reply(QUESTION, SamplingParams(temperature=0.0, max_tokens=3))
    assert (made.text, made.finish_reason) == ("Ok,", "length")


def test_a_prompt_ends_where_the_answer_begins(chat: LocalChat) -> None:
    assert chat.tokenizer.decode(chat.prompt(QUESTION)).endswith("Well?<|im_end|>\n<|im_start|>assistant\n")


def test_no_chat_without_a_template(model: CausalLM) -> None:
    plain = train_bpe(["ab"], 265)
    plain.chat_template = None
    with pytest.raises(UserError, match=r"no chat template.*fledge generate.*fledge sft"):
        LocalChat(Engine(model, []), plain)


def test_a_model_directory_gives_an_engine(
    chain_model: ChainModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save_model(tmp_path, chain_model(chain(tokenizer, "Ok!")), tokenizer, {"stage": "sft"}, [5, 6])
    engine, loaded = load_engine(tmp_path, batch_size=7)
    assert (engine.eos_ids, engine.batch_size) == ((5, 6), 7)
    assert complete(engine, loaded, ["a\n"], SamplingParams(temperature=0.0, max_tokens=3))[0].text == "Ok!"
    for name in ("generation_config.json", "config.json"):
        text = (tmp_path / name).read_text().replace("eos_token_id", "other")
        (tmp_path / name).write_text(text)
    assert load_engine(tmp_path)[0].eos_ids == (tokenizer.eos_id,)
    train_bpe(["".join(map(chr, range(0x4E00, 0x4F00)))] * 2, 600).save(tmp_path)
    with pytest.raises(UserError, match="the tokenizer has"):
        load_engine(tmp_path)


@given(st.text(max_size=40))
def test_no_control_character_reaches_a_terminal(text: str) -> None:
    safe = terminal_safe(text)
    assert not any((c < " " and c not in "\n\t") or "\x7f" <= c <= "\x9f" for c in safe)
    assert safe == "".join(c for c in text if c in "\n\t" or not (c < " " or "\x7f" <= c <= "\x9f"))


def test_escape_sequences_lose_their_power() -> None:
    assert terminal_safe("a\x1b[2Jb\r\x07\x9b31m\tc\n") == "a[2Jb31m\tc\n"
