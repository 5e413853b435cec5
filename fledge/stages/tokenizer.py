"""`fledge tokenizer`: learn a byte-level BPE vocabulary from text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fledge.data.sources import Source, parse_sources, read_documents
from fledge.errors import UserError
from fledge.files import new_directory
from fledge.tokenizer.bpe import FILES, Tokenizer, train_bpe

# Compression is measured on the first text of each source, which is enough for two digits.
SAMPLE_CHARACTERS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Config:
    """Learn a byte-level BPE tokenizer from text."""

    data: tuple[str, ...]
    """Text files, `.jsonl` files with "text", or folders of them, as for pretrain: `name=path:weight`;
    weights do not matter here."""
    vocab_size: int = 8192
    """Tokens in all: 256 bytes, 9 special tokens, and what is learned."""
    out: Path = Path("runs/tokenizer")
    """Directory to write."""
    overwrite: bool = False
    """Replace the tokenizer in that directory."""


def main(config: Config) -> None:
    """Read the text once, train, write the directory, and print what came out."""
    sources = parse_sources(config.data)
    if config.overwrite:
        _check_replaceable(config.out)
    text = TrainingText(sources)
    with new_directory(config.out, config.overwrite) as directory:
        with Console(stderr=True).status("Learning a vocabulary"):
            tokenizer = train_bpe(text, config.vocab_size)
        if not text.documents:
            raise UserError(f"--data {' '.join(config.data)}: no text in it")
        tokenizer.save(directory)
    _print_result(config, text, tokenizer)


@dataclass
class TrainingText:
    """The documents of all sources, counted as they pass; a sample of each source is kept."""

    sources: Sequence[Source]
    documents: int = 0
    bytes: int = 0
    samples: dict[str, list[str]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[str]:
        for source in self.sources:
            sample = self.samples.setdefault(source.name, [])
            room = SAMPLE_CHARACTERS
            for document in read_documents(source.path):
                self.documents += 1
                self.bytes += len(document.encode("utf-8", "surrogatepass"))
                if room > 0:
                    sample.append(document[:room])
                    room -= len(sample[-1])
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


def _print_result(config: Config, text: TrainingText, tokenizer: Tokenizer) -> None:
    size = f"{tokenizer.vocab_size:,}"
    if tokenizer.vocab_size < config.vocab_size:
        size += f" ({config.vocab_size:,} asked for, but no more pairs of tokens occur twice)"
    table = Table(title="Tokenizer", show_header=False, title_justify="left")
    table.add_row("training text", f"{text.documents:,} documents, {text.bytes:,} bytes")
    table.add_row("vocabulary", size)
    for name, sample in text.samples.items():
        tokens = sum(map(len, tokenizer.encode_batch(sample)))
        ratio = sum(len(document.encode()) for document in sample) / max(tokens, 1)
        table.add_row(f"bytes per token, {name}", f"{ratio:.2f}")
    table.add_row("saved in", str(config.out))
    Console().print(table)
