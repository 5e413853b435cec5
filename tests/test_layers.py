"""The import rules of pyproject.toml hold: layers, independent stages, no peers in the package."""

from __future__ import annotations

from pathlib import Path

import pytest
from importlinter.cli import lint_imports

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def test_contracts_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = lint_imports(config_filename=str(PYPROJECT), cache_dir=str(tmp_path))
    assert code == 0, capsys.readouterr().out
