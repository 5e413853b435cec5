"""`fledge data`: what a mixture of sources holds, and its cleaning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fledge.config import check_at_least
from fledge.data.cleaning import Cleaning
from fledge.data.cleaning import prepare as clean
from fledge.data.mixture import check_size, load_sources, tokenise_sources
from fledge.data.sources import BadLines, Source, list_files, read_documents
from fledge.data.tables import cleaning_table, plan_table, reading_table
from fledge.errors import UserError
from fledge.tokenizer.bpe import Tokenizer
from fledge.train.progress import reading_progress, say
from fledge.train.recipe import parse_count

EXAMPLE_CHARACTERS = 400


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show what a mixture of sources holds and what a run would read of it, before any training."""

    data: tuple[str, ...]
    """A mixture file (.toml), or sources as NAME=PATH:WEIGHT."""
    weights: tuple[str, ...] = ()
    """Other weights of sources than theirs, as NAME=WEIGHT."""
    tokenizer: Path | None = None
    """Directory of a trained tokenizer; without one, only documents and bytes are counted."""
    tokens: str | None = None
    """How many tokens a run would train on, as in 20M: shows the epochs, refuses what passes a maximum."""
    validation_share: float = 0.01
    """Share of each source's documents held out, chosen by a hash of their text."""
    shards: Path = Path("runs/shards")
    """Where tokenised sources are kept, to be used again while they do not change."""
    skip_bad_lines: bool = False
    """Count lines that cannot be read and go on, instead of stopping at the first."""
    examples: int = 0
    """How many documents of each source to show the beginning of."""


def inspect(config: Inspect) -> None:
    """Print the table of the mixture."""
    check_at_least(config, 0, "examples")
    if not 0 < config.validation_share < 1:
        raise UserError(f"--validation-share {config.validation_share}: must be between 0 and 1")
    planned = parse_count(config.tokens, "tokens") if config.tokens else None
    if planned is not None and config.tokenizer is None:
        raise UserError("--tokens needs a --tokenizer to count with")
    sources = load_sources(config.data, config.weights)
    console, notes = Console(), Console(stderr=True)
    bad = BadLines(skip=config.skip_bad_lines)
    if config.tokenizer is None:
        counts = {source.name: _measure(source, bad) for source in sources}
        console.print(reading_table(counts))
    else:
        tokenizer = Tokenizer.load(config.tokenizer)
        with reading_progress(notes) as progress:
            mixed = tokenise_sources(
                sources, tokenizer, config.shards, config.validation_share, bad, progress
            )
        console.print(plan_table(mixed, planned))
        most = check_size(mixed, 1, planned)
        if most is not None and planned is None:
            say(console, f"the maxima of epochs allow a run of at most {most:,} tokens")
        bad.count = sum(item.shards.skipped_lines for item in mixed)
    if bad.count:
        say(console, f"{bad.count:,} lines could not be read and were skipped")
        for example in bad.examples:
            say(console, f"  {example}")
    for source in sources if config.examples else ():
        _show_examples(console, source, config.examples)


def _measure(source: Source, bad: BadLines) -> tuple[int, int, int]:
    """Documents, bytes of text, bytes on disk."""
    documents = text_bytes = 0
    for document in read_documents(source, bad):
        documents += 1
        text_bytes += len(document.encode())
    if not documents:
        raise UserError(f"{source.path}: no text in it")
    return documents, text_bytes, sum(file.bytes for file in list_files(source))


def _show_examples(console: Console, source: Source, count: int) -> None:
    for number, document in zip(range(count), read_documents(source, BadLines(skip=True)), strict=False):
        shown = document[:EXAMPLE_CHARACTERS] + ("..." if len(document) > EXAMPLE_CHARACTERS else "")
        say(console, f"\n--- {source.name}, document {number} ({len(document):,} characters)\n{shown}")


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Clean sources: leave out what is not worth training on, and show what and why in a report."""

    data: tuple[str, ...]
    """A mixture file (.toml), or sources as NAME=PATH:WEIGHT; its `rules` win over --rules."""
    out: Path = Path("runs/clean")
    """New directory: NAME.jsonl.zst for each source, mixture.toml, summary.json, report.html."""
    rules: tuple[str, ...] = ("default",)
    """Quality rules and sets: default, gopher, gopher-repetition, c4, all, none; no-NAME takes one out."""
    languages: tuple[str, ...] = ()
    """Two-letter codes of the languages to keep, as in en de; all by default."""
    min_language_probability: float = 0.5
    """How likely a document must be in one of them."""
    mask: tuple[str, ...] = ()
    """Kinds of personal data to replace by placeholders: email, phone, ip, key."""
    exact_duplicates: bool = True
    """Leave out documents that differ from an earlier one in white space only."""
    near_duplicates: bool = True
    """Leave out documents that are almost the same as an earlier one."""
    jaccard: float = 0.8
    """From which share of common shingles on two documents are almost the same."""
    shingle_words: int = 5
    """Words in a shingle."""
    decontaminate: tuple[str, ...] = ()
    """Files of evaluations; documents that share 13 words in a row with one are left out."""
    skip_bad_lines: bool = False
    """Count lines that cannot be read and go on, instead of stopping at the first."""
    seed: int = 0
    """Of the signatures of near duplicates, and of which examples are shown."""
    overwrite: bool = False
    """Replace an earlier cleaning in --out."""


def prepare(config: Prepare) -> None:
    """Clean the sources, print what was left out, and say what to do next."""
    check_at_least(config, 0, "seed")
    sources = load_sources(config.data)
    if config.overwrite:
        _check_replaceable(config.out)
    console = Console(stderr=True)
    cleaning = Cleaning(
        rules=config.rules,
        languages=config.languages,
        min_language_probability=config.min_language_probability,
        mask=config.mask,
        exact_duplicates=config.exact_duplicates,
        near_duplicates=config.near_duplicates,
        jaccard=config.jaccard,
        shingle_words=config.shingle_words,
        evaluations=config.decontaminate,
        seed=config.seed,
    )
    bad = BadLines(skip=config.skip_bad_lines)
    with reading_progress(console, "cleaning", "bytes") as progress:
        summary = clean(sources, cleaning, config.out, bad, overwrite=config.overwrite, progress=progress)
    Console().print(cleaning_table(summary))
    for name in summary["emptied"]:
        say(console, f"nothing is left of source {name!r}: it is not in the new mixture")
    if bad.count:
        say(console, f"{bad.count:,} lines could not be read and were skipped, as {bad.examples[0]}")
    say(console, f"report:  {config.out / 'report.html'}\nmixture: {config.out / 'mixture.toml'}")


def _check_replaceable(out: Path) -> None:
    """Overwriting removes the whole directory, so it must hold nothing but a cleaning."""
    if out.exists() and not (
        out.is_dir() and {"mixture.toml", "summary.json"} <= {p.name for p in out.iterdir()}
    ):
        raise UserError(f"{out}: holds no cleaned sources, so --overwrite leaves it; choose another --out")


ACTIONS = {"inspect": (Inspect, inspect), "prepare": (Prepare, prepare)}
