"""Byte-level BPE: training, encoding, and Hugging Face's tokenizer files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from fledge.errors import UserError
from fledge.files import write_json, write_text
from fledge.tokenizer.chat import CHAT_TEMPLATE, end_of_turn
from fledge.tokenizer.files import (
    BYTE_TOKENS,
    named_tokens,
    read_backend,
    read_text,
    steps,
    without_added_tokens,
    without_prefix,
)
from fledge.tokenizer.files import FILES as FILES

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
        data = json.loads(backend.to_str())
        self._has_byte_tokens = bool(data["model"].get("byte_fallback"))
        self._config = {key: value for key, value in config.items() if key != "chat_template"}
        self.chat_template = chat_template
        added = {
            token_id: token
            for token_id, token in backend.get_added_tokens_decoder().items()
            if not (self._has_byte_tokens and token.content in BYTE_TOKENS)
        }
        self.special_tokens: dict[str, int] = {token.content: token_id for token_id, token in added.items()}
        self.special_ids = frozenset(added)
        # Without those of them that are read in an answer (`<tool_call>`).
        self.control_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        plain = without_added_tokens(data, self.special_tokens)
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(plain))
        self._only_first = any(
            step.get("prepend_scheme") == "first" for step in steps(data["pre_tokenizer"])
        )  # of a text with special tokens
        inner = without_prefix(plain)
        self._inner = self._plain if inner is None else tokenizers.Tokenizer.from_str(json.dumps(inner))
        eos_token = self.special_tokens_map.get("eos_token", END_OF_TEXT)
        eos_id = backend.token_to_id(eos_token)
        if eos_id is None:
            raise UserError(f"the tokenizer has no token {eos_token!r}; name its eos_token")
        self.eos_id: int = eos_id

    @cached_property
    def end_of_turn_id(self) -> int | None:
        """The token that ends the assistant's turn: the chat template's, else `<|im_end|>`."""
        found = end_of_turn(self) if self.chat_template is not None else None
        token_id: int | None = self._backend.token_to_id(END_OF_TURN)
        return token_id if found is None else found

    @cached_property
    def prefix_ids(self) -> tuple[int, ...]:
        """The ids that a text to be continued starts with, before those of `encode`: mostly nothing or BOS.

        What the post-processor of tokenizer.json puts there, as in transformers 5. Chats have none: their
        template writes what they start with.
        """
        whole = self._backend.encode("a").ids
        text = self._backend.encode("a", add_special_tokens=False).ids
        return next((tuple(whole[:i]) for i in range(len(whole)) if whole[i : i + len(text)] == text), ())

    @property
    def start_id(self) -> int:
        """What stands before a text that is scored: BOS where it wants one, else the end of another text."""
        return self.prefix_ids[-1] if self.prefix_ids else self.eos_id

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included: the smallest embedding that holds every id."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values())

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The tokens with a role (`eos_token`, `bos_token`, ...) by its name, as templates see them."""
        return named_tokens(self._config)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; never a special token's id. Raises UserError on a lone surrogate."""
        return self.encode_piece(text, "start")

    def encode_piece(self, text: str, after: Literal["start", "special", "text"]) -> list[int]:
        """`encode` for a piece of a longer text, by what stands before it.

        Tokenizers made by SentencePiece put a space in front of a text, or also behind a special token.
        """
        check_text(text)
        begins = after == "start" or (after == "special" and not self._only_first)
        encoder = self._plain if begins else self._inner
        ids: list[int] = encoder.encode(text, add_special_tokens=False).ids
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
        to_bytes = _bytes_of_piece if self._has_byte_tokens else _bytes_of_visible
        return {i: to_bytes(token) for token, i in vocab.items() if i not in self.special_ids}

    def fingerprint(self) -> str:
        """SHA-256 of all that decides the ids of a text or a chat."""
        digest = hashlib.sha256(self._backend.to_str().encode())
        digest.update(f"\0{self.chat_template}".encode())
        if self.prefix_ids:
            digest.update(f"\0{self.prefix_ids}".encode())
        return digest.hexdigest()

    def with_chat(self, chat_template: str) -> Tokenizer:
        """A copy with that template and with those of our special tokens that it lacks, at the end of the
        ids; a text's ids stay the same, unless it has their text."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        controls = (token for token in CONTROL_TOKENS if token != END_OF_TEXT)  # the base has its own
        backend.add_special_tokens([token for token in controls if token not in self.special_tokens])
        markup = (token for token in MARKUP_TOKENS if token not in self.special_tokens)
        backend.add_tokens([AddedToken(token, normalized=False) for token in markup])
        # What is loaded then is tokenizer.json as it is, with nothing that a class of its own would change.
        config = {key: value for key, value in self._config.items() if key != "added_tokens_decoder"}
        return Tokenizer(backend, {**config, "tokenizer_class": "PreTrainedTokenizerFast"}, chat_template)

    def save(self, directory: Path, model_max_length: int | None = None) -> None:
        """Write tokenizer.json and tokenizer_config.json; each file is replaced whole."""
        config = dict(self._config)
        if str(config.get("tokenizer_class")).removesuffix("Fast") == "LlamaTokenizer":
            # transformers' class of that name writes spaces its own way, whatever tokenizer.json says.
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
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
        """Read a tokenizer in Hugging Face's layout, ours or another's (see `read_backend` for the kinds).

        Raises UserError that names the file when one is missing, broken, or of another kind.
        """
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory; name one with a tokenizer.json")
        backend, config = read_backend(directory)
        config_path = directory / "tokenizer_config.json"
        template_path = directory / "chat_template.jinja"
        template = read_text(template_path) if template_path.exists() else config.get("chat_template")
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


def _bytes_of_visible(token: str) -> bytes:
    """The bytes of a token of a byte-level tokenizer."""
    if BYTE_OF_CHAR.keys() >= set(token):
        return bytes(BYTE_OF_CHAR[char] for char in token)
    return token.encode()  # a stray token of another's vocabulary, which decodes to itself


def _bytes_of_piece(token: str) -> bytes:
    """The bytes of a token that SentencePiece made."""
    if token in BYTE_TOKENS:
        return bytes([int(token[1:-1], 16)])
    return token.replace("\u2581", " ").encode()
