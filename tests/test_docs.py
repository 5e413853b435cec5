"""The documentation is whole: a page and a test for every verb, a text under every setting."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from fledge.cli import VERBS, command
from fledge.config import field_texts

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def test_the_flag_reference_is_what_the_code_gives() -> None:
    reference = runpy.run_path(str(ROOT / "docs" / "generate.py"))["reference"]
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == reference(), "run `make docs`"


def test_the_verbs_are_the_stage_files() -> None:
    stages = {path.stem for path in (ROOT / "fledge" / "stages").glob("*.py")} - {"__init__"}
    assert stages == {verb.split()[0] for verb in VERBS}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_page_and_a_test(verb: str) -> None:
    stage = verb.split()[0]
    page = ROOT / "docs" / "stages" / f"{stage}.md"
    assert page.read_text(encoding="utf-8").startswith(f"# fledge {stage}\n")
    assert f"stages/{stage}.md" in (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert (ROOT / "tests" / "stages" / f"test_{stage}.py").exists()


@pytest.mark.parametrize("verb", VERBS)
def test_every_setting_has_a_text(verb: str) -> None:
    config_class, _ = command(verb)
    assert config_class.__doc__
    without = [name for name, text in field_texts(config_class).items() if not text]
    assert not without


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page}: {target}"
