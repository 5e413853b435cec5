"""Every example in configs/ is a working configuration of the verb it is named after."""

from __future__ import annotations

from pathlib import Path

import pytest

from fledge.cli import VERBS, command
from fledge.config import from_toml

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))


def test_each_verb_with_settings_has_an_example() -> None:
    assert {path.stem for path in CONFIGS} == {verb.replace(" ", "-") for verb in VERBS} - {"doctor"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_example_is_read(path: Path) -> None:
    from_toml(command(path.stem.replace("-", " "))[0], path)
