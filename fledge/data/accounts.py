"""Accounts of a run: where the tokens of each source went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fledge.data.interleave import Mixture
from fledge.data.mixture import MixtureSource


@dataclass(frozen=True)
class Account:
    """Where the tokens of a source went: tokenised = trained + dropped + held_out + unused."""

    documents: int
    bytes: int
    """UTF-8 bytes of its text."""
    disk_bytes: int
    """Of its files, as they lay on the disk when they were tokenised."""
    tokenised: int
    held_out: int
    trained: int
    """Different tokens that were targets at least once."""
    dropped: int
    """Training tokens that no row holds: none, by either packing."""
    unused: int
    """Training tokens that the run did not come to."""
    seen: int
    """Targets, repetitions included."""
    share: float
    """Of all targets."""
    epochs: float
    skipped_lines: int


def accounts(sources: Sequence[MixtureSource], mixture: Mixture, rows: int) -> dict[str, Account]:
    """The account of every source after the first `rows` rows."""
    seen = mixture.targets(rows)
    found = {}
    for item, row_source, targets in zip(sources, mixture.sources, seen, strict=True):
        trained = min(targets, row_source.tokens)
        found[item.name] = Account(
            documents=len(item.shards),
            bytes=int(item.shards.text_bytes.sum()),
            disk_bytes=item.shards.disk_bytes,
            tokenised=item.shards.tokens,
            held_out=item.held_out_tokens,
            trained=trained,
            dropped=item.training_tokens - row_source.tokens,
            unused=row_source.tokens - trained,
            seen=targets,
            share=targets / max(1, sum(seen)),
            epochs=round(targets / item.training_tokens, 4),
            skipped_lines=item.shards.skipped_lines,
        )
    return found
