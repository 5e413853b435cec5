"""Tokenizers of others: the same ids as in transformers, exact bytes, and no special token out of a text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fledge.errors import UserError
from fledge.tokenizer.adapt import fit_for_chats
from fledge.tokenizer.bpe import MARKUP_TOKENS, SPECIAL_TOKENS, Tokenizer
from fledge.tokenizer.chat import encode_chat
from fledge.tokenizer.fast import LLAMA3_PATTERN

from ..foreign import KINDS, TEXTS, gpt2, sentencepiece, trained, write

GPT2_REAL = Path(__file__).parents[3] / "shared/data/tokenizer/gpt2"

SENTENCEPIECE = ("prepend", "always", "first", "unigram")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, tuple[str, ...], Tokenizer]]:
    out = {}
    for kind, make in KINDS.items():
        directory = tmp_path_factory.mktemp(kind)
        special = make(directory)
        out[kind] = (directory, special, Tokenizer.load(directory))
    return out


@pytest.fixture(scope="module")
def peers(made: dict[str, tuple[Path, tuple[str, ...], Tokenizer]]) -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    return {
        kind: transformers.GPT2Tokenizer.from_pretrained(directory)
        if kind == "gpt2"
        else transformers.AutoTokenizer.from_pretrained(directory)
        for kind, (directory, _, _) in made.items()
    }


words = st.sampled_from(
    [
        *("the", " the", "fox", "It's", "I'LL", "1984", " ", "  ", "\n", "\r\n", "\t", "▁", "é", "e\u0301"),
        *("🦊", "\0", "<", "<0x0A>", "<s>", "</s>", "<unk>", "<|eot_id|>", "<|endoftext|>", "素早い"),
    ]
)
texts = st.text(max_size=30) | st.lists(words, max_size=12).map("".join)
kinds = st.sampled_from(list(KINDS))


@given(kind=kinds, text=texts)
def test_text_never_becomes_a_special_token_and_comes_back(made: Any, kind: str, text: str) -> None:
    tokenizer = made[kind][2]
    ids = tokenizer.encode(text)
    assert tokenizer.special_ids.isdisjoint(ids)
    assert all(tokenizer.token_bytes(i) for i in ids)
    read = b"".join(map(tokenizer.token_bytes, ids)).decode()
    if kind not in SENTENCEPIECE:
        assert read == tokenizer.decode(ids) == text
        return
    assume("▁" not in text)  # SentencePiece's space: texts with it cannot come back
    assume(not (kind == "unigram" and "<0x0A>" in text))  # the library's Unigram reads it as the byte
    assert read.removeprefix(" ") == text.removeprefix(" ")
    assert tokenizer.decode(ids) == read.removeprefix(" ")


@given(kind=kinds, text=texts)
def test_pieces_make_the_whole(made: Any, kind: str, text: str) -> None:
    """A piece inside a text has no space of its own in front."""
    tokenizer = made[kind][2]
    inner = tokenizer.encode_piece(text, "text")
    assume("▁" not in text and not (kind == "unigram" and "<0x0A>" in text))
    assert b"".join(map(tokenizer.token_bytes, inner)).decode() == text


def test_bytes_by_hand(made: Any) -> None:
    tokenizer = made["prepend"][2]
    ids = tokenizer.encode("the\n🦊")
    assert [tokenizer.token_bytes(i) for i in ids][-5:] == [b"\n", b"\xf0", b"\x9f", b"\xa6", b"\x8a"]
    assert tokenizer.token_bytes(ids[0]).startswith(b" ")
    assert [tokenizer.token_bytes(i) for i in range(3)] == [b"", b"", b""]
    assert tokenizer.token_bytes(3 + ord("\n")) == b"\n"


def test_what_a_text_starts_with(made: Any) -> None:
    found = {kind: tokenizer.prefix_ids for kind, (_, _, tokenizer) in made.items()}
    bos = made["llama3"][2].special_tokens["<|begin_of_text|>"]
    sentencepiece_ones = dict.fromkeys(("prepend", "always", "first"), (1,))
    assert found == {"llama3": (bos,), "gpt2": (), "unigram": (), **sentencepiece_ones}


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["llama3", "prepend", "gpt2"])
@pytest.mark.parametrize("flag", [True, False])
def test_what_add_bos_token_means(kind: str, flag: bool, tmp_path: Path) -> None:
    """With a tokenizer.json nothing, in transformers 5; GPT-2's files have no other place for it."""
    transformers = pytest.importorskip("transformers")
    KINDS[kind](tmp_path)
    path = tmp_path / "tokenizer_config.json"
    raw = json.loads(path.read_text()) if path.exists() else {"tokenizer_class": "GPT2Tokenizer"}
    path.write_text(json.dumps({**raw, "add_bos_token": flag}))
    ours, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("the")["input_ids"] == [*ours.prefix_ids, *ours.encode("the")]
    assert bool(ours.prefix_ids) == (flag or kind != "gpt2")
    (tmp_path / "again").mkdir()
    ours.save(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again("the")["input_ids"] == theirs("the")["input_ids"]
    assert Tokenizer.load(tmp_path / "again").prefix_ids == ours.prefix_ids


def test_the_end_of_a_turn_is_the_templates(made: Any) -> None:
    ends = {kind: made[kind][2].end_of_turn_id for kind in ("llama3", "prepend", "first", "gpt2")}
    assert ends["llama3"] == made["llama3"][2].special_tokens["<|eot_id|>"]
    assert (ends["prepend"], ends["first"], ends["gpt2"]) == (2, 2, None)


@pytest.mark.peers
@given(kind=kinds, text=texts)
def test_the_same_ids(made: Any, peers: Any, kind: str, text: str) -> None:
    _, special, tokenizer = made[kind]
    theirs = peers[kind]
    assume(not re.search("|".join(map(re.escape, special)), text))
    ids = tokenizer.encode(text)
    assert theirs(text)["input_ids"] == [*tokenizer.prefix_ids, *ids]
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids
    assert theirs.decode(ids) == tokenizer.decode(ids)
    assert tokenizer.encode_batch([text]) == [ids]


@pytest.mark.peers
@given(kind=kinds, data=st.data())
def test_the_same_ids_around_special_tokens(made: Any, peers: Any, kind: str, data: st.DataObject) -> None:
    _, special, tokenizer = made[kind]
    parts = data.draw(st.lists(texts | st.sampled_from(special), max_size=6))
    text = "".join(parts)
    ids = tokenizer.encode_special(text)
    assert peers[kind](text, add_special_tokens=False)["input_ids"] == ids
    for skip in (True, False):
        assert peers[kind].decode(ids, skip_special_tokens=skip) == tokenizer.decode(ids, skip)


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["llama3", "prepend", "always", "first"])
@given(contents=st.lists(st.sampled_from(["the fox", "It's 1984", " é", "b"]), min_size=1, max_size=4))
def test_the_same_chats(made: Any, peers: Any, kind: str, contents: list[str]) -> None:
    roles = ["user", "assistant"] * 2
    messages: list[Any] = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    theirs = peers[kind].apply_chat_template(messages, return_dict=True)["input_ids"]
    assert encode_chat(made[kind][2], messages).ids == theirs


@pytest.mark.peers
@pytest.mark.parametrize("kind", KINDS)
def test_fitted_for_chats_and_read_by_transformers(made: Any, kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = made[kind][2]
    fitted = fit_for_chats(tokenizer)
    assert list(fitted.added) == ["<|im_start|>", "<|im_end|>", *MARKUP_TOKENS]
    assert list(fitted.added.values()) == list(range(tokenizer.vocab_size, tokenizer.vocab_size + 8))
    fitted.tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path)
    assert len(theirs) == ours.vocab_size == tokenizer.vocab_size + 8
    assert ours.end_of_turn_id == fitted.added["<|im_end|>"]
    for text in (*TEXTS, "", " the", "a  b"):
        assert ours.encode(text) == tokenizer.encode(text)
        assert theirs(text)["input_ids"] == [*ours.prefix_ids, *ours.encode(text)]
    messages: list[Any] = [
        *({"role": "system", "content": "Be brief."}, {"role": "user", "content": "It's a fox? "}),
        *({"role": "assistant", "content": "the fox"}, {"role": "user", "content": " 1984"}),
        # No unknown character first: their mask would begin at the line break, which Unigram fuses with it.
        {"role": "assistant", "content": "It's é 🦊"},
    ]
    encoded = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    chat = encode_chat(ours, messages)
    assert (chat.ids, chat.mask) == (encoded["input_ids"], [on == 1 for on in encoded["assistant_masks"]])
    assert tuple(chat.ids[: len(ours.prefix_ids)]) == ours.prefix_ids
    assert sum(chat.mask) > 4


def test_a_template_that_marks_answers_is_kept(made: Any) -> None:
    tokenizer = Tokenizer.load(made["llama3"][0])
    template = tokenizer.chat_template
    assert "chat template does not mark" in fit_for_chats(tokenizer).note
    assert template is not None
    marked = (
        "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message.role + "
        "'<|end_header_id|>' }}{% if message.role == 'assistant' %}{% generation %}{{ message.content + "
        "'<|eot_id|>' }}{% endgeneration %}{% else %}{{ message.content + '<|eot_id|>' }}{% endif %}"
        "{% endfor %}"
    )
    tokenizer.chat_template = marked
    fitted = fit_for_chats(tokenizer)
    assert fitted.tokenizer is tokenizer and not fitted.added and not fitted.note
    # The end of the turn must be learned too, or nothing would stop the model.
    tokenizer = Tokenizer.load(made["llama3"][0])
    tokenizer.chat_template = marked.replace("'<|eot_id|>' }}{% endgeneration %}", "'' }}{% endgeneration %}")
    assert fit_for_chats(tokenizer).added


def test_only_what_is_missing_is_added(made: Any) -> None:
    once = fit_for_chats(made["gpt2"][2]).tokenizer
    assert fit_for_chats(once).tokenizer is once
    once.chat_template = None
    again = fit_for_chats(once)
    assert not again.added and again.tokenizer.fingerprint() != once.fingerprint()
    assert "it has no chat template" in again.note
    assert set(again.tokenizer.special_tokens) == set(SPECIAL_TOKENS)


@pytest.mark.peers
def test_gpt2_itself(tmp_path: Path) -> None:
    if not (GPT2_REAL / "encoder.json").exists():
        pytest.skip("GPT-2's encoder.json and vocab.bpe are not on this machine")
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer.load(GPT2_REAL)
    assert (ours.vocab_size, ours.eos_id) == (50257, 50256)
    theirs = transformers.GPT2Tokenizer(
        vocab=str(GPT2_REAL / "encoder.json"), merges=str(GPT2_REAL / "vocab.bpe")
    )
    assert ours.encode("Hello world") == [15496, 995]  # from transformers' documentation
    ours.save(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"] == again(text)["input_ids"]


def edit(path: Path, change: Callable[[Any], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_what_the_config_adds_and_older_files(tmp_path: Path) -> None:
    sentencepiece(tmp_path, "prepend")
    config = tmp_path / "tokenizer_config.json"
    size = Tokenizer.load(tmp_path).vocab_size

    def add(data: dict[str, Any]) -> None:
        data["added_tokens_decoder"] = {
            "1": {"content": "<s>", "special": True},
            str(size): {"content": "<call>", "special": False, "normalized": False},
        }
        del data["eos_token"]

    edit(config, add)
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}, "bos_token": "?"}')
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.special_tokens["<call>"], tokenizer.eos_id) == (size, 2)
    assert tokenizer.special_tokens_map["bos_token"] == "<s>"  # the newer file's
    edit(config, lambda data: data["added_tokens_decoder"].update({"7": {"content": "<other>"}}))
    with pytest.raises(UserError, match=r"'<other>' should have the id 7"):
        Tokenizer.load(tmp_path)
    edit(config, lambda data: data.update(added_tokens_decoder=[1]))
    with pytest.raises(UserError, match=r"tokenizer_config\.json: added_tokens_decoder"):
        Tokenizer.load(tmp_path)


def test_a_word_with_a_role_is_special(tmp_path: Path) -> None:
    """Though tokenizer.json says nothing of it."""
    backend = trained(LLAMA3_PATTERN, 400)
    write(tmp_path, backend, eos_token="the")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode_special("the") == [tokenizer.eos_id]
    assert tokenizer.eos_id not in tokenizer.encode("the the")
    assert tokenizer.decode(tokenizer.encode("the the")) == "the the"


def test_unusable_ones_are_named(tmp_path: Path) -> None:
    sentencepiece(tmp_path, "prepend")
    path = tmp_path / "tokenizer.json"
    edit(path, lambda data: data["model"]["vocab"].pop("<0x7F>"))
    with pytest.raises(UserError, match=r"tokenizer\.json: has no token <0x7F>"):
        Tokenizer.load(tmp_path)
    edit(path, lambda data: data["model"].update(byte_fallback=False))
    with pytest.raises(UserError, match="fledge reads no other kind"):
        Tokenizer.load(tmp_path)
    path.unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError, match=r"tokenizer\.model is not read"):
        Tokenizer.load(tmp_path)
    gpt2(tmp_path)
    edit(tmp_path / "tokenizer_config.json", lambda data: data.update(tokenizer_class="Qwen2TokenizerFast"))
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file, which a Qwen2Tokenizer here needs"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "merges.txt").write_text("#version: 0.2\nno such merge at all\n")
    with pytest.raises(UserError, match=r"vocab\.json, merges\.txt: not GPT-2's files"):
        Tokenizer.load(tmp_path)
