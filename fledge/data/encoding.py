"""Documents as token ids: in chunks, by several threads, in order, with few chunks in memory at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np

from fledge.data.shard_files import DOCUMENT, Rows, Tokens
from fledge.data.sources import BadLines, Source, document_filter, document_hash, read_rows
from fledge.errors import UserError
from fledge.tokenizer.bpe import Tokenizer, check_text
from fledge.tokenizer.chat import encode_chat
from fledge.tokenizer.fast import Encode, Ids, fast_encoder

# Large enough that a thread rarely needs the interpreter's lock, small enough to have many in flight.
CHUNK_CHARACTERS = 2**20
# How much of a source the fast encoder is checked on.
CHECKED_CHARACTERS = 100_000

In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True)
class TextEncoder:
    """Chunks of documents to document rows and tokens; threads may share it."""

    encode: Encode
    separator: int
    dtype: str
    where: str
    """The source, for messages."""

    def __call__(self, chunk: tuple[int, Sequence[str]]) -> tuple[Rows, Tokens]:
        """The documents' rows and their tokens, the separator before each; `chunk` begins with the number of
        its first document in the source. Raises UserError on a lone surrogate.
        """
        first, texts = chunk
        rows = np.empty(len(texts), dtype=DOCUMENT)
        for i, text in enumerate(texts):
            check_text(text, f"{self.where}, document {first + i + 1}")
            rows["text_bytes"][i], rows["hash"][i] = len(text.encode()), document_hash(text)
        ids = self.encode(texts)
        rows["tokens"] = [len(document) + 1 for document in ids]
        starts = np.cumsum(rows["tokens"]) - rows["tokens"]
        tokens = np.empty(int(rows["tokens"].sum()), dtype=self.dtype)
        inside = np.ones(len(tokens), dtype=np.bool_)
        inside[starts] = False
        tokens[starts] = self.separator
        tokens[inside] = np.concatenate(ids)
        return rows, tokens


def pick_encoder(tokenizer: Tokenizer, texts: Sequence[str]) -> Encode:
    """The fast encoder if the tokenizer has one and they agree on the beginning of `texts`; else the
    tokenizer's own.
    """

    def encode(texts: Sequence[str]) -> list[Ids]:
        return [np.array(ids, dtype=np.uint32) for ids in tokenizer.encode_batch(texts)]

    fast = fast_encoder(tokenizer)
    if fast is None:
        return encode
    sample = [text[:CHECKED_CHARACTERS] for text in texts]
    same = all(map(np.array_equal, fast(sample), encode(sample)))
    return fast if same else encode


def beginning(documents: Iterator[str]) -> list[str]:
    """The first documents, until `CHECKED_CHARACTERS` are reached."""
    texts: list[str] = []
    size = 0
    for text in documents:
        texts.append(text)
        size += len(text)
        if size >= CHECKED_CHARACTERS:
            break
    return texts


def in_chunks(documents: Iterable[str], first: int) -> Iterator[tuple[int, list[str]]]:
    """Documents in chunks of about `CHUNK_CHARACTERS`, each with the number of its first."""
    chunk: list[str] = []
    size = 0
    for text in documents:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK_CHARACTERS:
            yield first, chunk
            first, chunk, size = first + len(chunk), [], 0
    if chunk:
        yield first, chunk


def in_order(function: Callable[[In], Out], items: Iterator[In], workers: int) -> Iterator[Out]:
    """`map` on several threads, with at most one item more than threads taken and not yet given back.

    Threads do: encoding, which takes most of the time, lets the others run, and processes would cost their
    start and copies of all texts.
    """
    if workers == 1:
        yield from map(function, items)
        return
    waiting: deque[Future[Out]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            waiting.extend(pool.submit(function, item) for item in islice(items, workers + 1))
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in islice(items, 1))
        finally:
            for future in waiting:
                future.cancel()


def encode_conversations(
    source: Source, tokenizer: Tokenizer, dtype: str, bad: BadLines
) -> Iterator[tuple[Rows, Tokens]]:
    """The conversations of a source one at a time: the separator, then what the chat template writes.

    The text that counts for bytes and hash is what the template writes, special tokens left out. What is no
    conversation goes to `bad`; what the settings of the source leave out, by that text, is left out.
    """
    keeps = document_filter(source)
    for where, row in read_rows(source, bad):
        messages, tools = row.get("messages"), row.get("tools")
        try:
            if not isinstance(messages, list) or not isinstance(tools, list | None):
                raise UserError('it takes a list in the field "messages", and a list or nothing in "tools"')
            chat = encode_chat(tokenizer, messages, tools)
        except UserError as error:
            bad.report(f"{where}: {error}")
            continue
        text, ids = tokenizer.decode(chat.ids, skip_special=True), [tokenizer.eos_id, *chat.ids]
        if not keeps(text):
            continue
        row_of = (len(ids), len(text.encode()), document_hash(text))
        yield np.array([row_of], dtype=DOCUMENT), np.array(ids, dtype=dtype)
