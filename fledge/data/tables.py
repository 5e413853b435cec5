"""The table of a mixture, as the LLaMA paper prints it (Touvron et al. 2023, table 1): before a run what it
would read, after it what it read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from fledge.data.accounts import Account
from fledge.data.mixture import MixtureSource


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("source", min_width=6, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def short(count: float) -> str:
    """A count in three digits or so: `950`, `19.0k`, `1.25M`."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.{2 if count < 10 * scale else 1}f}{unit}"
    return f"{count:.0f}"


def size(count: float) -> str:
    """Bytes in the largest decimal unit that fits: `1.2 GB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"


def plan_table(sources: Sequence[MixtureSource], planned_tokens: int | None) -> Table:
    """What a run of so many tokens would read; without a plan the epochs are left open."""
    columns = ("documents", "text", "on disk", "tokens", "held out", "share", "epochs")
    table = _table("what it will read", columns)
    totals = [0.0] * 5
    for item in sources:
        figures = (
            len(item.shards),
            int(item.shards.text_bytes.sum()),
            item.shards.disk_bytes,
            item.shards.tokens,
            item.held_out_tokens,
        )
        totals = [total + figure for total, figure in zip(totals, figures, strict=True)]
        epochs = "?"
        if planned_tokens is not None:
            epochs = f"{planned_tokens * item.share / item.training_tokens:.2f}"
        if item.source.max_epochs is not None:
            epochs += f" of {item.source.max_epochs:g}"
        table.add_row(escape(item.name), *_shown(figures), f"{item.share:.1%}", epochs)
    if len(sources) > 1:
        table.add_section()
        table.add_row("all", *_shown(totals), "100%", "")
    return table


def _shown(figures: Sequence[float]) -> tuple[str, ...]:
    documents, text, disk, tokens, held_out = figures
    return short(documents), size(text), size(disk), short(tokens), short(held_out)


def account_table(accounts: Mapping[str, Account]) -> Table:
    """What a run read: tokenised = trained + dropped + held out + unused, for every source."""
    columns = ("tokenised", "trained", "dropped", "held out", "unused", "read", "share", "epochs")
    table = _table("what it read, in tokens", columns)
    for name, account in accounts.items():
        counts = (
            account.tokenised,
            account.trained,
            account.dropped,
            account.held_out,
            account.unused,
            account.seen,
        )
        table.add_row(escape(name), *map(short, counts), f"{account.share:.1%}", f"{account.epochs:.2f}")
    return table


def cleaning_table(summary: Mapping[str, Any]) -> Table:
    """What a cleaning left of each source, and which steps took most, from its summary."""
    table = _table("what is left", ("documents", "of", "text", "of", "masked"))
    table.add_column("left out by")
    for name, account in summary["sources"].items():
        removed = sorted(account["removed"].items(), key=lambda item: -item[1]["bytes"])
        taken = [f"{step} {short(found['documents'] or found['lines'])}" for step, found in removed[:3]]
        table.add_row(
            escape(name),
            short(account["documents_out"]),
            short(account["documents_in"]),
            size(account["bytes_out"]),
            size(account["bytes_in"]),
            short(sum(account["masked"].values())),
            "\n".join(taken) + ("\n..." if len(removed) > 3 else ""),
        )
    return table


def reading_table(counts: Mapping[str, tuple[int, int, int]]) -> Table:
    """Documents, bytes of text and bytes on disk of sources that were read but not tokenised."""
    table = _table("what is in it", ("documents", "text", "on disk"))
    for name, (documents, text_bytes, disk_bytes) in counts.items():
        table.add_row(escape(name), short(documents), size(text_bytes), size(disk_bytes))
    return table
