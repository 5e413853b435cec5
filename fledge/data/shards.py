"""Tokenised sources on disk: streamed into shards of bounded size, memory-mapped from then on.

A source's directory holds pairs of files, `shard_00000.tokens` (the ids of its documents end to end) and
`shard_00000.npy` (a row of `DOCUMENT` for each of them), and `index.json`, written last. A shard is complete
when both its files are there, so an interrupted run goes on after the last pair.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fledge import __version__
from fledge.data.encoding import (
    TextEncoder,
    beginning,
    encode_conversations,
    in_chunks,
    in_order,
    pick_encoder,
)
from fledge.data.shard_files import (
    TOKEN_TYPES,
    Rows,
    ShardWriter,
    Tokens,
    locked,
    map_tokens,
    read_rows,
    token_type,
)
from fledge.data.sources import (
    BadLines,
    Source,
    SourceFile,
    document_hash,
    has_conversations,
    list_files,
    read_documents,
    source_version,
)
from fledge.data.streams import EXAMPLES
from fledge.errors import UserError
from fledge.files import open_binary, read_json, remove_leftovers, write_json
from fledge.tokenizer.bpe import Tokenizer

INDEX = "index.json"
FORMAT = 3  # also of what a document is: another reader of texts is another format
# How much of each end of a file tells it from others of its name, size and time of change.
END_BYTES = 2**16


@dataclass
class Shards:
    """A tokenised source on disk, memory-mapped.

    Every document begins with the separator (`tokenizer.eos_id`), conversations too, which are then as the
    chat template writes them.
    """

    name: str
    directory: Path
    lengths: npt.NDArray[np.int64]
    """Tokens of each document, the separator included."""
    text_bytes: npt.NDArray[np.int64]
    """UTF-8 bytes of each document."""
    hashes: npt.NDArray[np.uint64]
    """BLAKE2b of each document's text, 8 bytes, big endian: what `held_out` decides by."""
    fingerprint: str
    """SHA-256 over all documents and tokens, however they were cut into shards."""
    skipped_lines: int
    """Lines of the source that could not be read."""
    skipped_examples: list[str]
    """What was wrong with the first of them."""
    disk_bytes: int
    """Of the source's files when it was tokenised; 0 where there are none."""
    dtype: str
    _first: npt.NDArray[np.int64] = field(repr=False)
    """Number of the first document of each shard."""
    _starts: npt.NDArray[np.int64] = field(repr=False)
    """Where each document begins in its shard."""
    _maps: dict[int, Tokens] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Tokens of all documents, separators included."""
        return int(self.lengths.sum())

    def read(self, document: int, start: int, length: int) -> Tokens:
        """At most `length` tokens of a document from its token `start` on; read-only, of `dtype`."""
        shard = int(np.searchsorted(self._first, document, side="right")) - 1
        tokens = self._maps.get(shard)
        if tokens is None:
            tokens = self._maps[shard] = map_tokens(self.directory, shard, self.dtype)
        begin, size = int(self._starts[document]), int(self.lengths[document])
        return np.asarray(tokens[begin + min(start, size) : begin + min(start + length, size)])

    @classmethod
    def open(cls, name: str, directory: Path) -> Shards:
        """Open a complete directory. Reads the documents' rows, no tokens.

        Raises UserError if it is not complete, or damaged as far as sizes and counts tell.
        """
        index = read_json(directory / INDEX)
        damaged = UserError(f"{directory}: damaged or of another version; delete it, and it is made anew")
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise damaged
        try:
            shards, dtype = index["shards"], index["dtype"]
            if dtype not in TOKEN_TYPES:
                raise damaged
            found = [read_rows(directory, shard, dtype) for shard in range(len(shards))]
            counts = [None if rows is None else [len(rows), int(rows["tokens"].sum())] for rows in found]
            fingerprint, disk_bytes = str(index["fingerprint"]), int(index["disk_bytes"])
            skipped = int(index["skipped_lines"])
            examples = [str(example) for example in index["skipped_examples"]]
        except (KeyError, TypeError, ValueError):
            raise damaged from None
        if not found or counts != shards or bool(skipped) != bool(examples):
            raise damaged
        rows = np.concatenate([rows for rows in found if rows is not None])
        firsts = np.concatenate([[0], np.cumsum([documents for documents, _ in shards])])
        shard_starts = np.concatenate([[0], np.cumsum([tokens for _, tokens in shards])])
        lengths = np.ascontiguousarray(rows["tokens"], dtype=np.int64)
        starts = np.cumsum(lengths) - lengths - np.repeat(shard_starts[:-1], np.diff(firsts))
        return cls(
            name=name,
            directory=directory,
            lengths=lengths,
            text_bytes=np.ascontiguousarray(rows["text_bytes"], dtype=np.int64),
            hashes=np.ascontiguousarray(rows["hash"], dtype=np.uint64),
            fingerprint=fingerprint,
            skipped_lines=skipped,
            skipped_examples=examples,
            disk_bytes=disk_bytes,
            dtype=dtype,
            _first=firsts[:-1],
            _starts=starts,
        )


def tokenise(
    source: Source,
    tokenizer: Tokenizer,
    directory: Path,
    *,
    bad: BadLines | None = None,
    workers: int | None = None,
    shard_tokens: int = 2**25,
    progress: Callable[[int, int], None] | None = None,
) -> Shards:
    """Tokenise a source into a directory of its own in `directory`, or open it if that was done before.

    The directory's name has a hash of the tokenizer, of the source's settings and of its files' names, sizes,
    times of change and ends: when one of them changes, the source is tokenised anew beside. What was skipped
    then is added to `bad` whenever the directory is opened. An interrupted run goes on after its last
    complete shard (a shard closes at `shard_tokens`). Memory holds a few chunks of 1 MB of text for each of
    `workers` threads (default: the cores there are) and 24 bytes a document. If another process is at the
    same source, this one waits for it. `progress` gets documents and tokens so far.

    Raises UserError if there is no document, a bad line (unless `bad` skips it), a file that changes
    meanwhile, or no room on the disk.
    """
    bad = BadLines(advice="") if bad is None else bad
    files = list_files(source)
    target = directory / f"{_safe(source.name)}-{_key(source, tokenizer, files)[:16]}"
    if shards := _open_complete(source, target, bad):
        return shards
    with locked(target):
        if shards := _open_complete(source, target, bad):  # another process was at it
            return shards
        counted = BadLines(skip=bad.skip, advice=bad.advice)
        (target / INDEX).unlink(missing_ok=True)
        remove_leftovers(target)
        with ShardWriter(target, token_type(tokenizer.vocab_size), shard_tokens) as writer:
            chunks = _chunks(source, tokenizer, writer, counted, workers or _cores())
            with closing(chunks):
                for rows, tokens in chunks:
                    writer.add(rows, tokens)
                    if progress is not None:
                        progress(writer.documents, writer.tokens)
            writer.close_shard()
        if not writer.documents:
            skipped = (
                f" ({counted.count:,} lines were skipped, as {counted.examples[0]})" if counted.count else ""
            )
            raise UserError(f"{source.path}: no text in it{skipped}")
        if list_files(source) != files:
            raise UserError(f"{source.path}: changed while it was read; run the same command again")
        _write_index(source, tokenizer, writer, counted, sum(file.bytes for file in files))
        return _report(Shards.open(source.name, target), bad)


def _report(shards: Shards, bad: BadLines) -> Shards:
    """Add to `bad` what was skipped when the shards were made."""
    bad.count += shards.skipped_lines
    bad.examples = (bad.examples + shards.skipped_examples)[:EXAMPLES]
    return shards


def _open_complete(source: Source, target: Path, bad: BadLines) -> Shards | None:
    """What is there, if it is complete; None if it is to be made (again)."""
    if not (target / INDEX).exists():
        return None
    try:
        shards = Shards.open(source.name, target)
    except UserError:
        if os.access(target, os.W_OK):
            return None
        raise
    # With bad lines left out earlier, who wants none left out gets the error that reading gives.
    return None if shards.skipped_lines and not bad.skip else _report(shards, bad)


def _chunks(
    source: Source, tokenizer: Tokenizer, writer: ShardWriter, bad: BadLines, workers: int
) -> Generator[tuple[Rows, Tokens]]:
    """What is left to write, in order, from where the complete shards end."""
    if has_conversations(source):
        writer.clear()
        yield from encode_conversations(source, tokenizer, writer.dtype, bad)
        return
    done = writer.resume()
    first = beginning(documents := read_documents(source, bad))
    documents = chain(first, documents)
    if not _pass_over(done, documents):
        # The source is not what it was when the shards were made, although its files look the same.
        writer.clear()
        bad.count, done = 0, done[:0]
        bad.examples.clear()
        documents = read_documents(source, bad)
    encoder = TextEncoder(pick_encoder(tokenizer, first), tokenizer.eos_id, writer.dtype, source.path)
    yield from in_order(encoder, in_chunks(documents, len(done)), workers)


def _pass_over(hashes: npt.NDArray[np.uint64], documents: Iterator[str]) -> bool:
    """Take documents that are done from `documents`; False if they are not the same."""
    for expected in hashes.tolist():
        text = next(documents, None)
        if text is None or document_hash(text) != expected:
            return False
    return True


def _write_index(
    source: Source, tokenizer: Tokenizer, writer: ShardWriter, skipped: BadLines, disk_bytes: int
) -> None:
    index = {
        "format": FORMAT,
        "source": asdict(source),
        "tokenizer": tokenizer.fingerprint(),
        "separator": tokenizer.eos_id,
        "dtype": writer.dtype,
        "documents": writer.documents,
        "tokens": writer.tokens,
        "text_bytes": writer.text_bytes,
        "disk_bytes": disk_bytes,
        "skipped_lines": skipped.count,
        "skipped_examples": skipped.examples,
        "fingerprint": writer.fingerprint.hexdigest(),
        "shards": writer.shards,
    }
    try:
        write_json(writer.directory / INDEX, index)
    except OSError as error:
        raise UserError(f"{writer.directory}: cannot be written: {error.strerror}") from None


def _key(source: Source, tokenizer: Tokenizer, files: list[SourceFile]) -> str:
    """A hash of all that decides the tokens, as far as it can be told without reading all of the source."""
    elsewhere = ("name", "path", "weight", "max_epochs", "rules")
    settings = {key: value for key, value in asdict(source).items() if key not in elsewhere}
    base = os.path.commonpath([file.path.parent for file in files]) if files else ""
    named = [
        [os.path.relpath(file.path, base), file.bytes, file.modified_ns, _ends(file.path)] for file in files
    ]
    # Texts that come with Python or from a hub have no files to tell them by.
    origin = [] if files else [source.path, source_version(source), __version__]
    parts = [FORMAT, tokenizer.fingerprint(), tokenizer.eos_id, settings, named, origin]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _ends(path: Path) -> str:
    """A hash of the first and the last `END_BYTES` of a file: copies and unpacked archives often share name,
    size and time with another file."""
    with open_binary(path) as file:
        try:
            digest = hashlib.sha256(file.read(END_BYTES))
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - END_BYTES))
            digest.update(file.read(END_BYTES))
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)[:100]


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
