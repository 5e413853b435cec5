"""Byte-level BPE: training, encoding, and Hugging Face's tokenizer files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from fledge.errors import UserError
from fledge.files import read_json, write_json, write_text
from fledge.tokenizer.chat import CHAT_TEMPLATE

END_OF_TEXT = "<|endoftext|>"
END_OF_TURN = "<|im_end|>"

# The first three only ever steer; the others are also read by whoever takes an answer apart, so they are
# added without the `special` flag (as Qwen does) and stay when special tokens are left out of a text.
CONTROL_TOKENS = (END_OF_TEXT, "<|im_start|>", END_OF_TURN)
MARKUP_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
SPECIAL_TOKENS = CONTROL_TOKENS + MARKUP_TOKENS
SMALLEST_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

# What `save` writes.
FILES = ("tokenizer.json", "tokenizer_config.json")

# Qwen2's pre-tokenizer: contractions, words with one leading mark or space, single digits, runs of
# punctuation with the line breaks after them, line breaks, other white space.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)


class Tokenizer:
    """Text to token ids and back.

    What it adds to `tokenizers.Tokenizer` is a second encoder, without added tokens: `encode` never
    gives a special token, whatever the text says. `train_bpe` and `Tokenizer.load` make one.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, config: dict[str, Any], chat_template: str | None
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._plain = _without_added_tokens(backend)
        self._config = {key: value for key, value in config.items() if key != "chat_template"}
        self.chat_template = chat_template
        self.special_tokens: dict[str, int] = {
            token.content: token_id for token_id, token in backend.get_added_tokens_decoder().items()
        }
        self.special_ids = frozenset(self.special_tokens.values())
        eos_token = self.special_tokens_map.get("eos_token", END_OF_TEXT)
        eos_id = backend.token_to_id(eos_token)
        if eos_id is None:
            raise UserError(f"the tokenizer has no token {eos_token!r}; name its eos_token")
        self.eos_id: int = eos_id
        self.end_of_turn_id: int | None = backend.token_to_id(END_OF_TURN)

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included: the smallest embedding that holds every id."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values())

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The tokens with a role (`eos_token`, `bos_token`, ...) by its name, as templates see them."""
        tokens = {}
        for name, value in self._config.items():
            if name.endswith("_token") and value:
                content = value.get("content") if isinstance(value, dict) else value
                if isinstance(content, str):
                    tokens[name] = content
        return tokens

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; never a special token's id. Raises UserError on a lone surrogate."""
        check_text(text)
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts, on all cores."""
        for index, text in enumerate(texts):
            check_text(text, f"text {index}")
        return [e.ids for e in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_special(self, text: str) -> list[int]:
        """Ids of text that is trusted: a special token's text becomes that token."""
        check_text(text)
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD.

        `skip_special` leaves out control tokens (`<|im_end|>`) and keeps markup (`<tool_call>`).
        """
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token: b"" for special tokens and for ids without a token."""
        return self._bytes_of_ids.get(token_id, b"")

    @cached_property
    def _bytes_of_ids(self) -> dict[int, bytes]:
        vocab = self._plain.get_vocab(with_added_tokens=False)
        return {
            token_id: bytes(BYTE_OF_CHAR[char] for char in token)
            if BYTE_OF_CHAR.keys() >= set(token)
            else token.encode()  # a stray token of another's vocabulary, which decodes to itself
            for token, token_id in vocab.items()
        }

    def fingerprint(self) -> str:
        """SHA-256 of all that decides the ids of a text or a chat."""
        digest = hashlib.sha256(self._backend.to_str().encode())
        digest.update(f"\0{self.chat_template}".encode())
        return digest.hexdigest()

    def save(self, directory: Path, model_max_length: int | None = None) -> None:
        """Write tokenizer.json and tokenizer_config.json; each file is replaced whole."""
        config = dict(self._config)
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        write_text(directory / "tokenizer.json", self._backend.to_str(pretty=True))
        write_json(directory / "tokenizer_config.json", config)
        # An older template file would win over the template in the config.
        (directory / "chat_template.jinja").unlink(missing_ok=True)

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Read a tokenizer of byte-level BPE kind in Hugging Face's layout, ours or another's.

        Raises UserError that names the file when one is missing, broken, or of another kind.
        """
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory; name one with a tokenizer.json")
        backend = _read_backend(directory / "tokenizer.json")
        config_path = directory / "tokenizer_config.json"
        config = _read_config(config_path)
        template_path = directory / "chat_template.jinja"
        template = _read_text(template_path) if template_path.exists() else config.get("chat_template")
        if template is not None and not isinstance(template, str):
            raise UserError(f"{config_path}: chat_template is not a string; get the file again")
        try:
            return cls(backend, config, template)
        except UserError as error:
            raise UserError(f"{config_path}: {error}") from None


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train on `texts`, read once. The same texts always give the same tokenizer.

    Ids: the 256 bytes (in GPT-2's order), the merges in the order they were learned, the special tokens
    last. So id order is merge order, as exports expect, and the plain vocabulary holds no special token.
    `vocab_size` counts all of them; the result's may be smaller when no pair of tokens occurs twice any
    more. Raises UserError below 256 + the special tokens, and on a lone surrogate.
    """
    if vocab_size < SMALLEST_VOCAB_SIZE:
        raise UserError(
            f"vocab_size {vocab_size} is too small; it takes at least {SMALLEST_VOCAB_SIZE} "
            f"(256 bytes and {len(SPECIAL_TOKENS)} special tokens)"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        min_frequency=2,  # a pair seen once says nothing about other text
        initial_alphabet=list(BYTE_OF_CHAR),
        show_progress=False,
    )
    backend.train_from_iterator(_checked(texts), trainer)
    backend.add_special_tokens(list(CONTROL_TOKENS))
    backend.add_tokens([AddedToken(token, normalized=False) for token in MARKUP_TOKENS])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    return Tokenizer(backend, config, CHAT_TEMPLATE)


def check_text(text: str, where: str = "text") -> None:
    """Raise UserError if `text` has a lone surrogate, which no UTF-8 can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: character {error.start} is {text[error.start]!a}, half of a surrogate pair and "
            "not valid Unicode; mend or remove it"
        ) from None


def _checked(texts: Iterable[str]) -> Iterator[str]:
    for number, text in enumerate(texts, 1):
        check_text(text, f"document {number}")
        yield text


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: bytes with a visible character stand for themselves, the others from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(visible))
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHAR = _byte_of_char()


def _without_added_tokens(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same encoder without added tokens, not even as words of the model's own vocabulary."""
    data = json.loads(backend.to_str())
    added = {token["content"] for token in data["added_tokens"]}
    model = data["model"]
    if added & model["vocab"].keys():
        # Some tokenizers keep their special tokens in the vocabulary as well. A merge, or the token for
        # what is unknown, could then still lead to one.
        model["vocab"] = {token: i for token, i in model["vocab"].items() if token not in added}
        model["merges"] = [m for m in model["merges"] if added.isdisjoint((*m, "".join(m)))]
        if model.get("unk_token") in added:
            model["unk_token"] = None
    data.update(added_tokens=[], post_processor=None)
    return tokenizers.Tokenizer.from_str(json.dumps(data))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a tokenizer is {' and '.join(FILES)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid UTF-8 (byte {error.start}); get the file again") from None


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    text = _read_text(path)
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # `tokenizers` raises bare Exception
        raise UserError(f"{path}: not a tokenizer ({error}); get the file again") from None
    data = json.loads(backend.to_str())
    pre_tokenizer = data["pre_tokenizer"] or {}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if data["model"]["type"] != "BPE" or all(step.get("type") != "ByteLevel" for step in steps):
        raise UserError(f"{path}: not a byte-level BPE tokenizer; fledge reads no other kind")
    return backend


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a JSON object; get the file again")
    if isinstance(templates := config.get("chat_template"), list):  # several, by name
        config["chat_template"] = next(
            (
                item.get("template")
                for item in templates
                if isinstance(item, dict) and item.get("name") == "default"
            ),
            None,
        )
    return config
