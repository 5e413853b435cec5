"""Mixtures: the sources of a run, their shares, what is held out of them, and accounts that balance."""

from __future__ import annotations

import dataclasses
import glob
import math
import os
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from fledge.config import nearest
from fledge.data.interleave import Mixture
from fledge.data.locations import is_glob
from fledge.data.packing import BestFitRows, Ints, RowSource, StreamRows
from fledge.data.quality import choose_rules
from fledge.data.shards import Shards, tokenise
from fledge.data.sources import BadLines, Source, check_source, held_out_hashes, parse_sources
from fledge.errors import UserError
from fledge.files import read_text
from fledge.tokenizer.bpe import Tokenizer

# A source's validation part beyond this costs more time at every evaluation than it adds precision.
VALIDATION_BYTES = 20_000
Packing = Literal["stream", "best-fit"]

_SOURCE_KEYS = [field.name for field in dataclasses.fields(Source) if field.name != "name"]
_TYPES: dict[str, tuple[type, ...]] = {
    "path": (str,),
    "weight": (int, float),
    "max_epochs": (int, float),
    "field": (str,),
    "min_characters": (int,),
    "max_characters": (int,),
    "contains": (str,),
    "lacks": (str,),
    "rules": (list,),
}


def load_sources(texts: Sequence[str], weights: Sequence[str] = ()) -> list[Source]:
    """What `--data` names: one mixture file (`.toml`), or sources as NAME=PATH:WEIGHT; `weights`
    (NAME=WEIGHT) replace theirs."""
    mixtures = [text for text in texts if text.endswith(".toml")]
    if mixtures and len(texts) > 1:
        raise UserError(f"--data {mixtures[0]}: a mixture file names all sources; give it alone")
    sources = read_mixture(Path(mixtures[0])) if mixtures else parse_sources(tuple(texts))
    given = dict(_parse_weight(text, [source.name for source in sources]) for text in weights)
    sources = [
        dataclasses.replace(source, weight=given.get(source.name, source.weight)) for source in sources
    ]
    if missing := [source.name for source in sources if source.weight is None]:
        with_weight = [source.name for source in sources if source.weight is not None]
        if with_weight:
            raise UserError(
                f"source {missing[0]!r} has no weight while {with_weight[0]!r} has one; "
                "give all a weight or none"
            )
    return sources


def _parse_weight(text: str, names: Sequence[str]) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    if name not in names:
        known = f"the nearest is {nearest(name or text, names)!r}"
        raise UserError(f"--weights {text}: there is no source {name or text!r}; {known}, as in NAME=0.5")
    try:
        weight = float(value)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise UserError(
            f"--weights {text}: the weight must be a number above 0; to leave a source out, "
            "take it out of the mixture"
        )
    return name, weight


def read_mixture(path: Path) -> list[Source]:
    """The sources of a mixture file: a table `[sources.NAME]` each, paths relative to the file.

    Raises UserError, naming file, line and key, for an unknown key, a wrong type, a weight or a limit that
    is not above 0, or a file without sources.
    """
    text = read_text(path)
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    for key in table:
        if key != "sources":
            raise UserError(f"{path}:{_line(text, key)}: unknown table {key!r}; sources are [sources.NAME]")
    entries = table.get("sources")
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"{path}: no sources in it; write a table [sources.NAME] with path = ... for each")
    return [_read_source(path, text, name, entry) for name, entry in entries.items()]


def _read_source(path: Path, text: str, name: str, entry: Any) -> Source:
    at = f"{path}:{_line(text, name)}: source {name!r}"
    if not isinstance(entry, dict):
        raise UserError(f"{at} must be a table: [sources.{name}]")
    for key, value in entry.items():
        if key not in _SOURCE_KEYS:
            raise UserError(f"{at}: unknown key {key!r}; the nearest is {nearest(key, _SOURCE_KEYS)!r}")
        if not isinstance(value, _TYPES[key]) or isinstance(value, bool):
            raise UserError(f"{at}: {key} = {value!r} is of the wrong type; it must be a {_kind(key)}")
        if key in ("weight", "max_epochs", "max_characters") and not 0 < cast(float, value) < math.inf:
            out = "; to leave the source out, delete its table" if key == "weight" else ""
            raise UserError(f"{at}: {key} = {value}: must be above 0{out}")
    if "path" not in entry:
        raise UserError(f"{at}: path is missing; add path = ...")
    values = dict(entry)
    if "rules" in values:
        values["rules"] = tuple(map(str, values["rules"]))
    values["path"] = _beside(path.parent, values["path"])
    values["weight"] = float(values["weight"]) if "weight" in values else None
    source = Source(name=name, **values)
    try:
        check_source(source)
        choose_rules(source.rules or ())
    except UserError as error:
        raise UserError(f"{at}: {error}") from None
    return source


def _beside(folder: Path, path: str) -> str:
    """A source's path as seen from the mixture file's folder."""
    if re.match(r"python(:|$)", path) or not path:
        return path
    if path.startswith("hf:"):
        name = path.removeprefix("hf:")
        return f"hf:{folder / name}" if (folder / name.partition(":")[0]).is_dir() else path
    path = os.path.expanduser(path)
    return (
        path
        if Path(path).is_absolute()
        else str(Path(glob.escape(str(folder)) if is_glob(path) else folder) / path)
    )


def _kind(key: str) -> str:
    return (
        "number"
        if float in _TYPES[key]
        else {str: "text", int: "whole number"}.get(_TYPES[key][0], "list of texts")
    )


def _line(text: str, key: str) -> int:
    pattern = re.compile(rf"""\s*\[?\s*(sources\s*\.\s*)?["']?{re.escape(key)}["']?\s*[\].=]""")
    return next((n for n, line in enumerate(text.splitlines(), start=1) if pattern.match(line)), 1)


@dataclass(frozen=True)
class MixtureSource:
    """One tokenised source of a mixture."""

    source: Source
    shards: Shards
    share: float
    """Of the training rows."""
    training: Ints
    """Its training documents."""
    held_out: Ints
    """Documents that are not trained on, chosen by a hash of their text and in its order."""

    @property
    def name(self) -> str:
        """What the user calls it."""
        return self.source.name

    @property
    def training_tokens(self) -> int:
        """Tokens that may be trained on."""
        return int(self.shards.lengths[self.training].sum())

    @property
    def held_out_tokens(self) -> int:
        """Tokens that are not."""
        return self.shards.tokens - self.training_tokens

    def validation(self, tokenizer: Tokenizer) -> tuple[list[list[int]], int]:
        """Ids of the first held-out documents, without the separator, and their UTF-8 bytes; about
        `VALIDATION_BYTES` in all, so that the last of them may be cut."""
        chosen: list[list[int]] = []
        room = VALIDATION_BYTES
        for document in self.held_out.tolist():
            size, length = int(self.shards.text_bytes[document]), int(self.shards.lengths[document]) - 1
            wanted = length if size <= room else max(1, length * room // size)
            ids = self.shards.read(document, 1, wanted).tolist()
            size = size if wanted == length else sum(len(tokenizer.token_bytes(token)) for token in ids)
            chosen.append(ids)
            room -= size
            if room <= 0 or wanted < length:
                break
        return chosen, VALIDATION_BYTES - room

    def rows(
        self, packing: Packing, row_tokens: int, separator: int, seed: Sequence[int], isolate: bool
    ) -> RowSource:
        """Its training documents as rows."""
        kind = StreamRows if packing == "stream" else BestFitRows
        return kind(self.shards, self.training, row_tokens, separator, seed, isolate)


def tokenise_sources(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    directory: Path,
    validation_share: float,
    bad: BadLines | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[MixtureSource]:
    """Tokenise all sources, or open what was tokenised before; shares are the weights, or the tokens where
    there are none.

    Raises UserError for a source that is empty or too small to hold anything out.
    """
    tokenised = []
    for source in sources:

        def show(documents: int, tokens: int, name: str = source.name) -> None:
            if progress is not None:
                progress(name, documents, tokens)

        tokenised.append(tokenise(source, tokenizer, directory, bad=bad, progress=show))
    # What one source holds out, no other trains on.
    hashes = [shards.hashes[held_out_hashes(shards.hashes, validation_share)] for shards in tokenised]
    everywhere = np.unique(np.concatenate(hashes))
    mixed = []
    for source, shards in zip(sources, tokenised, strict=True):
        held = np.isin(shards.hashes, everywhere)
        training, held_out = np.flatnonzero(~held), np.flatnonzero(held)
        if not len(training) or not len(held_out):
            raise UserError(
                f"{source.path}: too few different documents to train on some and hold out others "
                f"(--validation-share {validation_share})"
            )
        weight = float(shards.lengths[training].sum()) if source.weight is None else source.weight
        held_out = held_out[np.argsort(shards.hashes[held_out], kind="stable")]
        mixed.append(MixtureSource(source, shards, weight, training, held_out))
    total = sum(item.share for item in mixed)
    return [dataclasses.replace(item, share=item.share / total) for item in mixed]


def mix(
    sources: Sequence[MixtureSource],
    packing: Packing,
    row_tokens: int,
    separator: int,
    seed: int,
    isolate: bool,
) -> Mixture:
    """The rows of a run; each source has an order of its own from (seed, its place)."""
    rows = [
        source.rows(packing, row_tokens, separator, [seed, place], isolate)
        for place, source in enumerate(sources)
    ]
    return Mixture(rows, [source.share for source in sources], hidden=isolate or packing == "best-fit")


def check_size(sources: Sequence[MixtureSource], batch_tokens: int, planned_tokens: int | None) -> int | None:
    """Refuse a mixture smaller than one batch, and a plan that would see a source more often than its
    maximum of epochs; returns the most tokens that all maxima allow (None: there are none).
    """
    have = sum(source.training_tokens for source in sources)
    if have < batch_tokens:
        raise UserError(
            f"the mixture has {have:,} training tokens, fewer than one batch of {batch_tokens:,}; "
            "add text, or lower --batch-tokens"
        )
    limits = {
        source.name: source.source.max_epochs * source.training_tokens / source.share
        for source in sources
        if source.source.max_epochs is not None
    }
    if not limits:
        return None
    tightest = min(limits, key=lambda name: limits[name])
    most = int(limits[tightest]) // batch_tokens * batch_tokens  # a plan is of whole batches
    if planned_tokens is not None and planned_tokens > limits[tightest]:
        source = next(source for source in sources if source.name == tightest)
        epochs = planned_tokens * source.share / source.training_tokens
        raise UserError(
            f"source {tightest!r} would be seen {epochs:.2f} times, more than its max_epochs "
            f"{source.source.max_epochs:g}; with these weights at most --tokens {most}, or lower its weight"
        )
    return most
