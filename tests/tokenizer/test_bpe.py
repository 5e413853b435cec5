from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fledge.errors import UserError
from fledge.tokenizer.bpe import SMALLEST_VOCAB_SIZE, SPECIAL_TOKENS, Tokenizer, train_bpe

TEXTS = [
    "The quick brown fox jumps over the lazy dog. It's 1984, isn't it?\n\n" * 3,
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))\r\n" * 3,
    "Der Weg führt über die Brücke; grüße Jürgen. Быстрая лиса. 素早い狐 素早い犬 🦊🦊 שלום עולם\n" * 3,
]

# Any Unicode text, and text dense in what a tokenizer may trip over.
unicode_text = st.text() | st.lists(
    st.sampled_from(
        [*SPECIAL_TOKENS, "<|", "|>", "<", " ", "\n", "\r\n", "\x00", "é", "e\u0301", "🦊", "the", "'ll"]
    )
).map("".join)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, 400)


@given(text=unicode_text)
@example("\U0010ffff\ufffe\u0085\u2028\u200d")
@settings(deadline=None)
def test_every_text_comes_back_exactly(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special=True) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.special_ids.isdisjoint(ids)


@given(texts=st.lists(unicode_text, max_size=5))
@settings(deadline=None, max_examples=30)
def test_a_batch_is_its_texts(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_all_bytes_are_tokens_and_specials_come_last(tokenizer: Tokenizer) -> None:
    assert sorted(tokenizer.token_bytes(i) for i in range(256)) == [bytes([byte]) for byte in range(256)]
    first = tokenizer.vocab_size - len(SPECIAL_TOKENS)
    assert [tokenizer.encode_special(token) for token in SPECIAL_TOKENS] == [
        [first + i] for i in range(len(SPECIAL_TOKENS))
    ]
    assert tokenizer.eos_id == first
    assert tokenizer.end_of_turn_id == first + 2
    assert tokenizer.token_bytes(tokenizer.eos_id) == b""
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""


def test_merges_are_learned(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 400
    assert tokenizer.decode(tokenizer.encode("the the")[:1]) == "the"
    # Hand-made: in "ab ab ab ac" the pair (a, b) is the only one that occurs more than twice.
    small = train_bpe(["ab", "ab", "ab", "ac"], SMALLEST_VOCAB_SIZE + 1)
    assert small.token_bytes(256) == b"ab"


def test_digits_stand_alone_and_text_is_not_normalised(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("1984" * 5)) == 20
    assert tokenizer.encode("é") != tokenizer.encode("e\u0301")


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
def test_special_tokens_only_where_text_is_trusted(tokenizer: Tokenizer, special: str) -> None:
    plain, trusted = tokenizer.encode(f"a{special}b"), tokenizer.encode_special(f"a{special}b")
    assert tokenizer.special_ids.isdisjoint(plain)
    assert len(tokenizer.special_ids.intersection(trusted)) == 1
    assert tokenizer.decode(plain) == tokenizer.decode(trusted) == f"a{special}b"


def test_decode_leaves_out_control_tokens_and_keeps_markup(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_special("<|im_start|>hi<tool_call>x</tool_call><|im_end|><|endoftext|>")
    assert tokenizer.decode(ids, skip_special=True) == "hi<tool_call>x</tool_call>"


@pytest.mark.parametrize(("text", "position"), [("\ud800", 0), ("ab\udfff", 2), ("🦊\udc00\ud83e", 1)])
def test_lone_surrogates_are_named(tokenizer: Tokenizer, text: str, position: int) -> None:
    for encode in (tokenizer.encode, tokenizer.encode_special):
        with pytest.raises(UserError, match=f"character {position} is .*surrogate"):
            encode(text)
    with pytest.raises(UserError, match=f"text 1: character {position} is"):
        tokenizer.encode_batch(["fine", text])
    with pytest.raises(UserError, match=f"document 2: character {position} is"):
        train_bpe(["fine", text], 300)


def test_smallest_size() -> None:
    assert SMALLEST_VOCAB_SIZE == 256 + 9
    with pytest.raises(UserError, match="264 is too small; it takes at least 265"):
        train_bpe(TEXTS, SMALLEST_VOCAB_SIZE - 1)
    bytes_only = train_bpe(TEXTS, SMALLEST_VOCAB_SIZE)
    assert bytes_only.vocab_size == SMALLEST_VOCAB_SIZE
    assert len(bytes_only.encode("grüße")) == len("grüße".encode())


@pytest.mark.parametrize("texts", [[], [""], ["abc"]])
def test_the_size_is_the_true_one_when_text_has_too_few_merges(texts: list[str]) -> None:
    tokenizer = train_bpe(texts, 1000)
    assert tokenizer.vocab_size == SMALLEST_VOCAB_SIZE
    assert tokenizer.eos_id == 256
    assert tokenizer.decode(tokenizer.encode("déjà vu")) == "déjà vu"


def test_training_is_deterministic(tokenizer: Tokenizer) -> None:
    again = train_bpe(iter(TEXTS), 400)
    assert again.fingerprint() == tokenizer.fingerprint()
    code = (
        "import sys, json; from fledge.tokenizer.bpe import train_bpe;"
        "print(train_bpe(json.load(sys.stdin), 400).fingerprint())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(TEXTS), capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == tokenizer.fingerprint()


def test_fingerprint_tells_tokenizers_apart(tokenizer: Tokenizer) -> None:
    assert train_bpe(TEXTS, 401).fingerprint() != tokenizer.fingerprint()
    other_template = train_bpe(TEXTS, 400)
    other_template.chat_template = "{{ messages }}"
    assert other_template.fingerprint() != tokenizer.fingerprint()


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path, model_max_length=512)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert loaded.encode("Hello <|im_end|>\n\n") == tokenizer.encode("Hello <|im_end|>\n\n")
    assert loaded.special_ids == tokenizer.special_ids
    assert (loaded.eos_id, loaded.end_of_turn_id) == (tokenizer.eos_id, tokenizer.end_of_turn_id)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": tokenizer.chat_template,
    }
    again = tmp_path / "again"
    again.mkdir()
    loaded.save(again)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()
    assert sorted(path.name for path in again.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_other_places_of_the_chat_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    edit(config, chat_template=[{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}])
    assert Tokenizer.load(tmp_path).chat_template == "d"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    loaded = Tokenizer.load(tmp_path)
    assert loaded.chat_template == "from the file"
    loaded.chat_template = "new"
    loaded.save(tmp_path)
    assert Tokenizer.load(tmp_path).chat_template == "new"
    edit(config, chat_template=None)
    assert Tokenizer.load(tmp_path).chat_template is None


def test_eos_token_of_the_config(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    for value in ("<|im_end|>", {"content": "<|im_end|>", "lstrip": False}):
        edit(config, eos_token=value)
        assert Tokenizer.load(tmp_path).eos_id == tokenizer.end_of_turn_id
    edit(config, eos_token=None)
    assert Tokenizer.load(tmp_path).eos_id == tokenizer.eos_id
    edit(config, eos_token="</s>")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: .*no token '</s>'"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "no such file"),
        ("tokenizer.json", b"{", "not a tokenizer"),
        ("tokenizer.json", b"[]", "not a tokenizer"),
        ("tokenizer.json", b"\xff", "not valid UTF-8"),
        (
            "tokenizer.json",
            b'{"model": {"type": "WordLevel", "vocab": {}, "unk_token": "u"}}',
            "byte-level BPE",
        ),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "byte-level BPE"),
        ("tokenizer_config.json", None, "no such file"),
        ("tokenizer_config.json", b"{,}", "not valid JSON"),
        ("tokenizer_config.json", b"[]", "not a JSON object"),
        ("tokenizer_config.json", b'{"chat_template": 3}', "chat_template"),
        (
            "tokenizer_config.json",
            b'{"chat_template": [{"name": "default", "template": 3}]}',
            "chat_template",
        ),
    ],
)
def test_bad_files_are_named(
    tokenizer: Tokenizer, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    tokenizer.save(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / name) + ":")
    assert "\n" not in str(caught.value)


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        Tokenizer.load(tmp_path / "nothing")


def test_special_tokens_in_the_vocabulary_of_others_stay_out_of_reach(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Tokenizers may keep special tokens among the words, where a merge or whole-word match gives them."""
    tokenizer.save(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["model"]["vocab"]["<|"] = 400
    data["model"]["merges"].append(["<", "|"])
    data["model"]["ignore_merges"] = True
    data["model"]["unk_token"] = "<|endoftext|>"
    for added in data["added_tokens"]:
        data["model"]["vocab"][added["content"]] = added["id"]
    added = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    data["added_tokens"].append({"id": 400, "content": "<|", **added})
    data["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    foreign = Tokenizer.load(tmp_path)
    raw = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for special in ("<|", *SPECIAL_TOKENS):
        assert raw.encode(special).ids == [foreign.special_tokens[special]]
        assert foreign.special_ids.isdisjoint(foreign.encode(special))
        assert foreign.decode(foreign.encode(special)) == special


def test_truncation_and_padding_of_others_are_ignored(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    raw = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    raw.enable_truncation(4)
    raw.enable_padding(length=8)
    raw.save(str(tmp_path / "tokenizer.json"))
    foreign = Tokenizer.load(tmp_path)
    assert foreign.encode("The quick brown fox.") == tokenizer.encode("The quick brown fox.")
    assert foreign.encode("a") == tokenizer.encode("a")


def test_a_full_disk_leaves_the_old_files(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def write_half(path: Path, text: str, **_: object) -> None:
        path.write_bytes(text.encode()[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="No space"):
        train_bpe(TEXTS, 300).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
