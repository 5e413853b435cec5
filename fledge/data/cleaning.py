"""Cleaning: from sources as they were found to sources that are worth training on, with a report.

Each document goes through the steps in this order: quality rules, language, personal data, exact duplicates,
near duplicates, texts of evaluations. What a step leaves out is counted, and some of it is kept to be read.
"""

from __future__ import annotations

import dataclasses
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from fledge.config import nearest
from fledge.data.cleaning_accounts import (
    KEPT_CHARACTERS,
    Account,
    Removed,
    byte_size,
    file_name,
    source_of,
    summarise,
    text_writer,
)
from fledge.data.cleaning_report import page
from fledge.data.decontamination import Evaluations
from fledge.data.duplicates import Repeats, shingles, text_hash
from fledge.data.language import LanguageFilter
from fledge.data.privacy import check_kinds, mask
from fledge.data.quality import DEFAULT_RULES, RULES, Rule, choose_rules, judge
from fledge.data.sources import BadLines, Source, has_conversations, read_documents
from fledge.data.words import word_hashes, words_of
from fledge.errors import UserError
from fledge.files import new_directory, write_json, write_text

EXAMPLES = 5
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Cleaning:
    """What to do to the documents."""

    rules: tuple[str, ...] = DEFAULT_RULES
    """Quality rules and sets of rules; `no-NAME` takes one out; `none` for none."""
    rules_by_source: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Rules of single sources, instead of `rules`."""
    languages: tuple[str, ...] = ()
    """Two-letter codes of the languages to keep; () keeps all."""
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
    evaluations: tuple[str, ...] = ()
    """Files of evaluations; documents that share 13 words in a row with one are left out."""
    seed: int = 0
    """Of the MinHash signatures, and of which examples are shown."""


@dataclass(frozen=True)
class _LeftOut:
    """Why a document is left out."""

    step: str
    reason: str
    text: str
    """What was left of it until then."""
    original: int | None = None
    """The kept document that it repeats."""


def prepare(
    sources: Sequence[Source],
    cleaning: Cleaning,
    out: Path,
    bad: BadLines | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Clean sources into `out`: NAME.jsonl.zst each, mixture.toml, summary.json and report.html.

    Documents are read one by one; what is remembered of one that is kept is its hash (some 130 bytes) and
    its MinHash signature, or if it is short a hash of its shingles (see `Repeats`). The directory is there
    whole or not at all. `progress` is told the source, its documents and its bytes so far. A source of which
    nothing is left has no file and is not in the mixture. Returns the summary.

    Raises UserError for settings and sources that cannot be, for bad content, or if nothing is left.
    """
    if out.exists() and not overwrite:
        raise UserError(f"{out}: exists already; choose another name or pass --overwrite")
    steps = _Steps(sources, cleaning)
    bad = BadLines() if bad is None else bad
    started = time.monotonic()
    accounts: dict[str, Account] = {}
    with new_directory(out, overwrite) as directory:
        for source in sources:
            accounts[source.name] = steps.clean(source, directory, bad, progress)
        _require_something(accounts)
        summary: dict[str, Any] = summarise(
            dataclasses.asdict(cleaning), accounts, steps.first_kept, directory
        )
        summary |= steps.facts(time.monotonic() - started)
        left = [source for source in sources if accounts[source.name].documents_out]
        write_text(directory / "mixture.toml", _mixture(left))
        write_json(directory / "summary.json", summary)
        write_text(directory / "report.html", page(summary))
    return summary


class _Steps:
    """The steps with what they remember from one document to the next."""

    def __init__(self, sources: Sequence[Source], cleaning: Cleaning) -> None:
        _check(sources, cleaning)
        self.cleaning = cleaning
        general = choose_rules(cleaning.rules)
        own = {source.name: source.rules for source in sources if source.rules is not None}
        chosen = {name: choose_rules(rules) for name, rules in {**own, **cleaning.rules_by_source}.items()}
        self.rules: dict[str, tuple[Rule, ...]] = {s.name: chosen.get(s.name, general) for s in sources}
        self.language = (
            LanguageFilter(cleaning.languages, cleaning.min_language_probability)
            if cleaning.languages
            else None
        )
        self.exact: dict[int, int] = {}
        self.near = Repeats(cleaning.seed, cleaning.jaccard) if cleaning.near_duplicates else None
        self.evaluations = Evaluations(cleaning.evaluations, cleaning.mask) if cleaning.evaluations else None
        self.kept = 0
        self.first_kept: dict[str, int] = {}
        """The number of the first document that was kept of each source."""
        self.random = random.Random(cleaning.seed)

    def clean(self, source: Source, directory: Path, bad: BadLines, progress: Progress | None) -> Account:
        account = Account(source.name)
        self.first_kept[source.name] = self.kept
        skipped = bad.count
        path = directory / file_name(source.name)
        with text_writer(path) as write:
            for number, document in enumerate(read_documents(source, bad), start=1):
                account.documents_in += 1
                account.bytes_in += byte_size(document)
                left = self._examine(document, account)
                if isinstance(left, str):
                    account.documents_out += 1
                    account.bytes_out += byte_size(left)
                    write(left)
                else:
                    self._leave_out(left, document, account)
                if progress and not number % 100:
                    progress(source.name, number, account.bytes_in)
        if progress:
            progress(source.name, account.documents_in, account.bytes_in)
        if not account.documents_out:
            path.unlink()
        account.skipped_lines = bad.count - skipped
        return account

    def _examine(self, document: str, account: Account) -> str | _LeftOut:
        """The text that is left of a document, or why it is left out."""
        judged = judge(document, self.rules[account.name])
        for cut in judged.cut:
            removed = account.removed.setdefault(cut.rule, Removed())
            removed.lines += len(cut.lines)
            removed.bytes += cut.bytes
            count = f"{len(cut.lines)} line" + "s" * (len(cut.lines) != 1)
            self._remember(removed, count, "\n".join(cut.lines), account.documents_in)
        text = judged.text
        if judged.rule is not None:
            return _LeftOut(judged.rule, judged.reason, text)
        if self.language is not None and (reason := self.language.reason(text)):
            return _LeftOut("language", reason, text)
        text = self._mask(text, account)
        key = text_hash(text)
        if self.cleaning.exact_duplicates and key in self.exact:
            return _LeftOut("exact-duplicate", "the same text", text, self.exact[key])
        words = words_of(text) if self.near is not None or self.evaluations is not None else []
        hashes = word_hashes(words)
        near_key = None
        if self.near is not None:
            near_key = self.near.key(shingles(text, hashes, self.cleaning.shingle_words), len(words))
            if found := self.near.find(near_key):
                original, reason = found
                return _LeftOut("near-duplicate", reason, text, original)
        if self.evaluations is not None and (reason := self.evaluations.find(words, hashes)):
            return _LeftOut("evaluation", reason, text)
        # Only what is kept can be repeated: a document that was left out stands for no other.
        if self.cleaning.exact_duplicates:
            self.exact[key] = self.kept
        if self.near is not None and near_key is not None:
            self.near.add(near_key, self.kept)
        self.kept += 1
        return text

    def _leave_out(self, out: _LeftOut, document: str, account: Account) -> None:
        removed = account.removed.setdefault(out.step, Removed())
        removed.documents += 1
        removed.bytes += byte_size(out.text)
        if out.original is not None:
            of = source_of(self.first_kept, out.original)
            removed.originals[of] = removed.originals.get(of, 0) + 1
        self._remember(removed, out.reason, out.text or document, account.documents_in, out.original)

    def facts(self, seconds: float) -> dict[str, Any]:
        """What the summary says of the run beside its accounts."""
        return {
            "seconds": seconds,
            "near_duplicate_index_bytes": self.near.memory_bytes if self.near is not None else 0,
            "rules": {name: [rule.name for rule in rules] for name, rules in self.rules.items()},
        }

    def _mask(self, text: str, account: Account) -> str:
        masked = mask(text, self.cleaning.mask)
        if masked.counts:
            account.masked_documents += 1
            account.masked_bytes += byte_size(text) - byte_size(masked.text)
            for kind, count in masked.counts.items():
                account.masked[kind] = account.masked.get(kind, 0) + count
        return masked.text

    def _remember(
        self, removed: Removed, reason: str, text: str, number: int, original: int | None = None
    ) -> None:
        """Keep a few examples of all, each with the same chance (Vitter 1985: reservoir sampling)."""
        removed.seen += 1
        place = len(removed.examples) if removed.seen <= EXAMPLES else self.random.randrange(removed.seen)
        if place < EXAMPLES:
            example = {"document": number, "reason": reason, "text": text[:KEPT_CHARACTERS], "of": original}
            removed.examples[place : place + 1] = [example]


# --- checks and files -----------------------------------------------------------------------------


def _check(sources: Sequence[Source], cleaning: Cleaning) -> None:
    if not sources:
        raise UserError("--data: name at least one source to clean")
    names = [source.name for source in sources]
    lowered: dict[str, str] = {}
    for name in names:
        if not re.fullmatch(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]{0,199}", name):
            raise UserError(f"source {name!r}: its name becomes a file's name; give another: NAME=PATH")
        if name.lower() in lowered:  # one file on disks that do not tell the two apart
            raise UserError(f"sources {lowered[name.lower()]!r} and {name!r}: name them apart: NAME=PATH")
        lowered[name.lower()] = name
    for name in cleaning.rules_by_source:
        if name not in names:
            raise UserError(
                f"rules for {name!r}: there is no such source; the nearest is {nearest(name, names)!r}"
            )
    if not 0 <= cleaning.min_language_probability <= 1:
        raise UserError(
            f"--min-language-probability {cleaning.min_language_probability}: must be from 0 to 1"
        )
    if not 0 < cleaning.jaccard <= 1:
        raise UserError(f"--jaccard {cleaning.jaccard}: must be above 0 and at most 1")
    if cleaning.shingle_words < 1:
        raise UserError(f"--shingle-words {cleaning.shingle_words}: must be at least 1")
    check_kinds(cleaning.mask)
    for source in sources:
        if has_conversations(source):
            raise UserError(
                f'source {source.name!r}: {source.path} holds conversations (rows with "messages"); they are '
                "not cleaned: leave it out here, and name it beside the cleaned sources when you train"
            )


def _require_something(accounts: Mapping[str, Account]) -> None:
    if any(account.documents_out for account in accounts.values()):
        return
    counts: dict[str, int] = {}
    for account in accounts.values():
        for step, removed in account.removed.items():
            counts[step] = counts.get(step, 0) + removed.documents
    if not counts:
        raise UserError("the sources have no documents")
    most = max(counts, key=lambda step: counts[step])
    switch = f"; --rules no-{most} switches it off" if most in RULES else ""
    raise UserError(
        f"nothing is left of {sum(counts.values()):,} documents; {most} left out {counts[most]:,}{switch}"
    )


def _mixture(sources: Sequence[Source]) -> str:
    tables = {}
    for source in sources:
        values = {"path": file_name(source.name), "weight": source.weight, "max_epochs": source.max_epochs}
        tables[source.name] = {key: value for key, value in values.items() if value is not None}
    return tomli_w.dumps({"sources": tables})
