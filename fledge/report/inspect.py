"""The page of `fledge inspect`: one self-contained HTML file without scripts, made from its figures alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fledge.files import write_text
from fledge.report.page import environment

# A token of this surprisal has the full tint: one chance in about a thousand.
FULL_TINT_BITS = 10.0
# How a line break is shown; the page breaks the line behind it.
LINE_BREAK = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"


def write_inspect_page(path: Path, found: Mapping[str, Any]) -> None:
    """Write the page of what `fledge inspect --json` holds."""
    tokens = [_token(token) for token in found["tokens"]]
    known = [token for token in tokens if token["bits"] is not None]
    context = {
        "model": found["model"],
        "tokens": tokens,
        "known": known,
        "made": sum(token["made"] for token in tokens),
        "mean_bits": sum(token["bits"] for token in known) / len(known) if known else None,
        "first": sum(token["rank"] == 1 for token in known),
        "next": {"bars": _bars(found["next"]["top"], None), "entropy": found["next"]["entropy_bits"]},
        "layers": _layers(found["lens"], tokens) if "lens" in found else [],
        "full_tint_bits": FULL_TINT_BITS,
    }
    write_text(path, environment().get_template("inspect.html").render(context))


def _token(token: Mapping[str, Any]) -> dict[str, Any]:
    bits = None if token["logp"] is None else max(0.0, -token["logp"] / math.log(2))
    return {
        **token,
        "bits": bits,
        "tint": 0.0 if bits is None else min(1.0, bits / FULL_TINT_BITS),
        "share": None if bits is None else share(token["logp"]),
        "bars": _bars(token["top"], None if bits is None else token),
        "breaks": LINE_BREAK in token["text"],
    }


def _layers(lens: list[Mapping[str, Any]], tokens: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the grid, the last layer first: what each layer would predict after every token."""
    following = [*tokens[1:], None]
    return [
        {
            "name": "embedding" if row["layer"] == 0 else str(row["layer"]),
            "title": "the embedding alone" if row["layer"] == 0 else f"layer {row['layer']}",
            "cells": [
                {
                    **cell,
                    "best": cell["top"][0],
                    "right": actual is not None and cell["top"][0]["id"] == actual["id"],
                    "tint": math.exp(cell["top"][0]["logp"]),
                    "share": None if cell["logp"] is None else share(cell["logp"]),
                    "bars": _bars(cell["top"], actual and {**actual, "logp": cell["logp"]}),
                }
                for cell, actual in zip(row["after"], following, strict=True)
            ],
        }
        for row in reversed(lens)
    ]


def _bars(top: list[Mapping[str, Any]], came: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The candidates; below them the token that came, where it is none of them."""
    shown = list(top)
    if came is not None and all(candidate["id"] != came["id"] for candidate in top):
        shown.append(came)
    return [
        {
            "text": spaced(candidate["text"]),
            "share": share(candidate["logp"]),
            "width": f"{100 * math.exp(candidate['logp']):.1f}",
            "came": came is not None and candidate["id"] == came["id"],
        }
        for candidate in shown
    ]


def share(logp: float) -> str:
    """A probability as a share: `62.1%`, `0.04%`, `3e-06`."""
    probability = math.exp(logp)
    if probability < 0.0001:
        return f"{probability:.0e}"
    return f"{probability:.2%}" if probability < 0.01 else f"{probability:.1%}"


def spaced(text: str) -> str:
    """A token with its spaces seen."""
    return text.replace(" ", "\N{OPEN BOX}")
