"""Which project of which store a command means, and whether its settings fit one that is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fledge.errors import UserError
from fledge.feedback.forms import ProjectSettings, check_settings
from fledge.feedback.records import Project
from fledge.feedback.store import Store, list_projects

# What a project was begun with: its tasks are made of it.
FIXED = {
    "kinds": "--task",
    "outputs_per_prompt": "--outputs",
    "pairs_per_prompt": "--pairs",
    "questions": "--questions",
}


def changed_settings(
    name: str, old: ProjectSettings | None, given: Mapping[str, Any], seed: int
) -> ProjectSettings:
    """The settings that were given, over those of a project that is there or the defaults. UserError where
    one would change what can't change any more."""
    settings = check_settings(replace(old or ProjectSettings(name, seed=seed), **given))
    for field, flag in FIXED.items() if old else ():
        before = getattr(old, field)
        if before != getattr(settings, field):
            shown = ", ".join(before) if isinstance(before, tuple) else before
            raise UserError(
                f"{flag}: project {name} has {shown} already; leave it out, or choose a --project"
            )
    return settings


def existing(store: str) -> str:
    """The same address; UserError for a file that is not there, which opening would make."""
    file = store.removeprefix("sqlite:///")
    if "://" not in file and not Path(file).exists():
        raise UserError(f"--store {store}: no such file")
    return store


def find_project(store: Store, name: str) -> Project:
    """A project by its name, or the only one; UserError that lists what there is."""
    known = list_projects(store)
    found = [project for project in known if project.settings.name == name or (not name and len(known) == 1)]
    if not found:
        names = ", ".join(project.settings.name for project in known) or "none"
        raise UserError(
            f"--project {name}: the store has {names}" if name else f"--project is needed: {names}"
        )
    return found[0]
