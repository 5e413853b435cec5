"""Writes docs/cli.md, the reference of all flags, from the stages' `Config` classes: `make docs`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

from fledge.cli import VERBS, command
from fledge.config import describe, field_texts

INTRODUCTION = """\
# Command line

<!-- Made by docs/generate.py (`make docs`) from the code; not edited by hand. -->

`fledge VERB [--flags]` runs one stage; `fledge --help` lists the verbs, `fledge VERB --help` its flags.
These work with every verb:

| flag | meaning |
|---|---|
| `--config FILE.toml` | Take settings from a TOML file (`learning_rate` for `--learning-rate`); flags win. |
| `--debug` | Show where an error came from. |
| `--help` | List the verb's flags. |

A flag that takes several values takes them at once or repeated: `--data a b` is `--data a --data b`.
A value that starts with `--` is written `--flag=VALUE`. A switch `--flag` is taken back by `--no-flag`.

Exit codes: 0 done; 2 a mistake to mend, said in one line; 130 interrupted by Ctrl-C."""


def reference() -> str:
    """Return the whole page as Markdown."""
    return "\n\n".join([INTRODUCTION, *(section(verb, summary) for verb, summary in VERBS.items())]) + "\n"


def section(verb: str, summary: str) -> str:
    """Return one verb's part: what it does and a table of its flags."""
    config_class, _ = command(verb)
    hints = get_type_hints(config_class)
    texts = field_texts(config_class)
    rows = []
    for field in dataclasses.fields(config_class):
        flag = "--" + field.name.rstrip("_").replace("_", "-")
        cells = [f"`{flag}`", describe(hints[field.name]), default(field), texts[field.name]]
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    table = "\n".join(["| flag | value | default | meaning |", "|---|---|---|---|", *rows])
    page = f"stages/{verb.split()[0]}.md"
    return f"## {verb}\n\n`fledge {verb}`: {summary}. More: [{page}]({page}).\n\n{table}"


def default(field: dataclasses.Field[Any]) -> str:
    """Return a field's default as Markdown; "required" where it has none."""
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        return "required"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    return f"`{value}`" if value not in (None, "") else ""


if __name__ == "__main__":
    (Path(__file__).parent / "cli.md").write_text(reference(), encoding="utf-8")
