"""The sources of a pretraining: read with a line about it, and the run opened on what they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fledge.data.mixture import MixtureSource, tokenise_sources
from fledge.data.sources import BadLines, Source
from fledge.run import Run
from fledge.tokenizer.bpe import Tokenizer
from fledge.train.progress import reading_progress, say


def read_sources(
    console: Console,
    named: Sequence[Source],
    tokenizer: Tokenizer,
    shards: Path,
    validation_share: float,
    skip_bad_lines: bool,
) -> list[MixtureSource]:
    """`tokenise_sources`, shown; says how many lines were skipped."""
    with reading_progress(console) as progress:
        bad = BadLines(skip=skip_bad_lines)
        sources = tokenise_sources(named, tokenizer, shards, validation_share, bad, progress)
    if bad.count:
        say(console, f"{bad.count:,} lines could not be read and were skipped, as {bad.examples[0]}")
    return sources


def begin_run(run: Run, tokenizer: Tokenizer, sources: Sequence[MixtureSource]) -> dict[str, str]:
    """Open a run on these sources; returns their fingerprints. Raises UserError as `Run.begin` does."""
    data = {source.name: source.shards.fingerprint for source in sources}
    run.begin({"the tokenizer": tokenizer.fingerprint(), **{f"source {name!r}": data[name] for name in data}})
    return data
