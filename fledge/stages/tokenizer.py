"""`fledge tokenizer`: learn a byte-level BPE vocabulary from text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fledge.data.mixture import load_sources
from fledge.data.sources import Source, read_documents
from fledge.errors import UserError
from fledge.files import new_directory
from fledge.tokenizer.bpe import FILES, Tokenizer, train_bpe

# Compression is measured on the first text of each source, which is enough for two digits.
SAMPLE_CHARACTERS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Config:
    """Learn a byte-level BPE tokenizer from text."""

    data: tuple[str, ...]
    """A mixture file (.toml), or sources as NAME=PATH:WEIGHT: files, folders or globs of text, .jsonl..."""
    vocab_size: int = 8192
    """Tokens in all: 256 bytes, 9 special tokens, and what is learned."""
    out: Path = Path("runs/tokenizer")
    """Directory to write."""
    overwrite: bool = False
    """Replace the tokenizer in that directory."""


def main(config: Config) -> None:
    """Measure the sources, train on them, write the directory, and print what came out."""
    sources = load_sources(config.data)
    if config.overwrite:
        _check_replaceable(config.out)
    with new_directory(config.out, config.overwrite) as directory:
        with Console(stderr=True).status("Learning a vocabulary"):
            texts = [SourceText.measure(source) for source in sources]
            tokenizer = train_bpe(training_text(texts), config.vocab_size)
        tokenizer.save(directory)
    _print_result(config, texts, tokenizer)


@dataclass(frozen=True)
class SourceText:
    """A source, how much is in it, and its first documents."""

    source: Source
    documents: int
    bytes: int
    sample: list[str]

    @classmethod
    def measure(cls, source: Source) -> SourceText:
        """Read the source once. Raises UserError if there is no text in it."""
        documents = size = 0
        sample: list[str] = []
        room = SAMPLE_CHARACTERS
        for document in read_documents(source):
            documents += 1
            size += len(document.encode())
            if room > 0:
                sample.append(document[:room])
                room -= len(sample[-1])
        if not size:
            raise UserError(f"{source.path}: no text in it")
        return cls(source, documents, size, sample)


def training_text(texts: Sequence[SourceText]) -> Iterator[str]:
    """All documents once; or, with weights, about as much text in which each source has its weight's share.

    BPE counts pairs of tokens, so a source counts more by coming more often, and less by coming in part:
    documents are then left out evenly.
    """
    total_bytes = sum(text.bytes for text in texts)
    total_weight = sum(text.source.weight or 0.0 for text in texts)
    for text in texts:
        weight = text.source.weight
        wanted_bytes = text.bytes if weight is None else round(weight / total_weight * total_bytes)
        credit = 0
        for document in read_documents(text.source):
            credit += wanted_bytes
            while credit >= text.bytes:
                credit -= text.bytes
                yield document


def _check_replaceable(out: Path) -> None:
    """Overwriting removes the whole directory, so it must hold nothing but a tokenizer."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: is a file; --out names a directory")
    others = sorted(path.name for path in out.iterdir() if path.name not in FILES)
    if others:
        raise UserError(f"{out}: holds more than a tokenizer ({others[0]}); choose another name for --out")


def _print_result(config: Config, texts: Sequence[SourceText], tokenizer: Tokenizer) -> None:
    size = f"{tokenizer.vocab_size:,}"
    if tokenizer.vocab_size < config.vocab_size:
        size += f" ({config.vocab_size:,} asked for, but no more pairs of tokens occur twice)"
    table = Table("source")
    for heading in ("documents", "bytes", "bytes per token"):
        table.add_column(heading, justify="right")
    for text in texts:
        tokens = sum(map(len, tokenizer.encode_batch(text.sample)))
        ratio = sum(len(document.encode()) for document in text.sample) / tokens
        table.add_row(escape(text.source.name), f"{text.documents:,}", f"{text.bytes:,}", f"{ratio:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"vocabulary: {size}\nsaved in: {config.out}", markup=False, highlight=False, soft_wrap=True
    )
