"""Constraints: which tokens may come next so that a text stays the beginning of a valid one.

`llguidance` does the parsing (regular expressions by derivatives, an Earley parser above them); here are its
tokenizer, made of ours, a cache of compiled grammars, and the rule for ends: the ids that end a completion
are possible exactly where the grammar accepts, and never as a part of the text.

Shape suffixes: W = ceil(V / 32) words of 32 bits, V vocabulary.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable
from functools import cached_property
from typing import Protocol

import torch
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from torch import Tensor

from fledge.errors import UserError
from fledge.tokenizer.bpe import Tokenizer
from fledge.types import Grammar

# Compiled grammars that are kept for the next request.
KEPT_GRAMMARS = 64
# JSON is written as `json.dumps` does: white space that is free invites a weak model to write nothing else.
JSON_SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# What a user calls each kind.
NAMES = {"choices": "choices", "regex": "regex", "json_schema": "json_schema", "lark": "grammar"}


class Constraint(Protocol):
    """Where a completion stands in its grammar. The engine drives it, with the ids in their order."""

    def start(self, end_ids: Collection[int] = ()) -> Constraint:
        """One at the beginning of a text that `end_ids` may end."""
        ...

    def mask(self, words_W: Tensor) -> None:
        """Set bit v % 32 of word v // 32 (int32, on the CPU) if id v may come next, clear the others.
        Raises UserError if the grammar got too complex to say."""
        ...

    def advance(self, token_id: int) -> None:
        """An id was made. Raises UserError if it was not possible."""
        ...

    def fork(self) -> Constraint:
        """An independent copy."""
        ...

    def rollback(self, tokens: int) -> None:
        """Take the last ids back."""
        ...

    def forced(self) -> list[int]:
        """The ids that come next because nothing else can, in the tokenizer's own way to write them."""
        ...

    @property
    def accepting(self) -> bool:
        """Whether the text is complete."""
        ...

    @property
    def finished(self) -> bool:
        """Whether it is complete and nothing can follow."""
        ...


class Grammars:
    """Compiles `Grammar`s for one tokenizer and a model of `vocab_size` ids. From any thread."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.masks = 0  # made so far, and the time that they took
        self.mask_seconds = 0.0
        self._compiled: OrderedDict[Grammar, GrammarConstraint] = OrderedDict()
        self._lock = threading.Lock()

    def start(self, grammar: Grammar, end_ids: Collection[int] = ()) -> Constraint:
        """At the beginning of a text that `end_ids` may end. Raises UserError, in one line, for a grammar
        that cannot be compiled or allows no text."""
        with self._lock:
            compiled = self._compiled.pop(grammar, None) or self._compile(grammar)
            self._compiled[grammar] = compiled
            if len(self._compiled) > KEPT_GRAMMARS:
                self._compiled.popitem(last=False)
            return compiled.start(end_ids)

    def accepts(self, grammar: Grammar, text: str) -> bool:
        """Whether a whole text is complete by a grammar."""
        constraint = self.start(grammar)
        try:
            for token_id in self.tokenizer.encode_piece(text, "text"):
                constraint.advance(token_id)
        except UserError:
            return False
        return constraint.accepting

    @cached_property
    def _ll_tokenizer(self) -> LLTokenizer:
        return LLTokenizer(TokenizerWrapper(_Vocabulary(self.tokenizer, self.vocab_size)))

    def _compile(self, grammar: Grammar) -> GrammarConstraint:
        source = _source(grammar)
        is_wrong, messages = LLMatcher.validate_grammar_with_warnings(source, self._ll_tokenizer)
        if is_wrong:
            raise UserError(f"{NAMES[grammar.kind]}: {_one_line(messages[0])}")
        matcher = LLMatcher(self._ll_tokenizer, source, log_level=0)
        compiled = GrammarConstraint(self, matcher, NAMES[grammar.kind])
        first = compiled.start()
        words_W = torch.zeros(-(-self.vocab_size // 32), dtype=torch.int32)
        try:
            first.mask(words_W)
            possible = first.accepting or bool(words_W.any())
        except UserError:
            if not first.is_stuck:
                raise
            possible = False
        if not possible:
            raise UserError(f"{NAMES[grammar.kind]}: allows no text that these tokens can write; loosen it")
        return compiled


class GrammarConstraint:
    """A `Constraint` by an `LLMatcher`."""

    def __init__(
        self, grammars: Grammars, matcher: LLMatcher, name: str, end_ids: Collection[int] = ()
    ) -> None:
        self._grammars, self._matcher, self._name = grammars, matcher, name
        self._end_ids = tuple(end_ids)

    def start(self, end_ids: Collection[int] = ()) -> GrammarConstraint:
        """See `Constraint`."""
        copy = GrammarConstraint(self._grammars, self._matcher.deep_copy(), self._name, end_ids)
        copy._matcher.reset()
        return copy

    def mask(self, words_W: Tensor) -> None:
        """See `Constraint`."""
        started = time.perf_counter()
        accepting = self.accepting
        self._matcher.unsafe_compute_mask_ptr(words_W.data_ptr(), words_W.numel() * 4)
        if self._matcher.is_error():
            raise self._failure()
        words = words_W.numpy().view("uint32")
        for token_id in (self._grammars.tokenizer.eos_id, *self._end_ids):
            words[token_id // 32] &= ~(1 << token_id % 32) & 0xFFFFFFFF
        if accepting:
            for token_id in self._end_ids:
                words[token_id // 32] |= 1 << token_id % 32
        self._grammars.masks += 1
        self._grammars.mask_seconds += time.perf_counter() - started

    def advance(self, token_id: int) -> None:
        """See `Constraint`."""
        if token_id == self._grammars.tokenizer.eos_id or not self._matcher.consume_token(token_id):
            raise self._failure()

    def fork(self) -> GrammarConstraint:
        """See `Constraint`."""
        return GrammarConstraint(self._grammars, self._matcher.deep_copy(), self._name, self._end_ids)

    def rollback(self, tokens: int) -> None:
        """See `Constraint`."""
        if not self._matcher.rollback(tokens):
            raise self._failure()

    def forced(self) -> list[int]:
        """See `Constraint`."""
        ids = self._matcher.compute_ff_tokens()
        ends = {self._grammars.tokenizer.eos_id, *self._end_ids}
        return ids[: next((i for i, token_id in enumerate(ids) if token_id in ends), len(ids))]

    @property
    def accepting(self) -> bool:
        """See `Constraint`."""
        return self._matcher.is_accepting()

    @property
    def finished(self) -> bool:
        """See `Constraint`."""
        return self._matcher.is_accepting() and self._matcher.is_stopped()

    @property
    def is_stuck(self) -> bool:
        """Whether nothing can follow, by the last `mask`."""
        return "NoExtension" in f"{self._matcher.stop_reason()} {self._matcher.get_error()}"

    def _failure(self) -> UserError:
        reason = self._matcher.stop_reason()
        if reason in ("LexerTooComplex", "ParserTooComplex"):
            return UserError(f"{self._name}: became too complex in the middle of a text; simplify it")
        return UserError(f"{self._name}: no token can follow ({_one_line(self._matcher.get_error())})")


def choices_grammar(choices: Iterable[str]) -> Grammar:
    """One of these texts. Raises UserError if there are none, or one is there twice or empty."""
    texts = list(choices)
    if not texts:
        raise UserError("choices: there are none; give at least one text")
    for i, text in enumerate(texts):
        if not text or text in texts[:i]:
            raise UserError(f"choices: {text!r} is {'there twice' if text else 'empty'}; leave it out")
    return Grammar("choices", json.dumps(texts, ensure_ascii=False))


def choices_of(grammar: Grammar | None) -> list[str] | None:
    """The texts of a grammar that has nothing else."""
    if grammar is None or grammar.kind != "choices":
        return None
    texts: list[str] = json.loads(grammar.text)
    return texts


def _source(grammar: Grammar) -> str:
    """In llguidance's form."""
    if grammar.kind == "lark":
        return LLMatcher.grammar_from_lark(grammar.text)
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "choices":
        # One expression: as terminals of their own, a choice that begins another could hide it.
        texts = ("".join(f"\\x{{{ord(c):x}}}" for c in text) for text in choices_of(grammar) or ())
        return LLMatcher.grammar_from_regex("|".join(texts))
    try:
        schema = json.loads(grammar.text)
    except ValueError as error:
        raise UserError(f"json_schema: not valid JSON ({error})") from None
    if not isinstance(schema, dict):
        raise UserError(f"json_schema: must be an object such as {{}}, not {grammar.text.strip()[:40]}")
    try:
        return LLMatcher.grammar_from_json_schema(schema, defaults=JSON_SPACES)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(f"json_schema: {_one_line(str(error))}") from None


def _one_line(message: str) -> str:
    """What a message of several lines says: its place, and its last sentence if that is the error itself."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if not lines:
        return "unknown error"
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return f"{lines[0].removesuffix(': regex parse error:')}: {errors[0]}" if errors else lines[0]


class _Vocabulary:
    """Our tokenizer as llguidance's `TokenizerWrapper` asks for it; plain text never gives special tokens."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        names = {token_id: name for name, token_id in tokenizer.special_tokens.items()}
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, None
        self.special_token_ids = sorted(names)
        # Ids that the model has and the tokenizer lacks have no bytes: they are never possible.
        self.tokens = [
            names[i].encode() if i in names else tokenizer.token_bytes(i) for i in range(vocab_size)
        ]
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode_piece(text.decode(), "text")
