"""A labelling server on loopback, in this process, and what its tests put into it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fledge.feedback.app import make_app
from fledge.feedback.forms import Kind, ProjectSettings
from fledge.feedback.people import add_labeler
from fledge.feedback.records import Output
from fledge.feedback.site import Site
from fledge.feedback.store import Store, add_item, add_project

from ..on_a_port import on_a_port

OUTPUTS = ("Paris.", "It is Paris, I think.", "The capital of France is **Paris**.", "London.")


@dataclass
class Labelling:
    """A project with people in it; `url` only while it is served."""

    store: Store
    project_id: int
    tokens: dict[str, str]
    ids: dict[str, int]
    url: str = ""

    def link(self, name: str) -> str:
        return f"{self.url}/s/{self.tokens[name]}"

    def answers(self, name: str) -> list[dict[str, Any]]:
        """What the store holds of a person: answers and skips in the order in which they came."""
        with self.store.reading() as connection:
            from fledge.feedback.state import answers_of

            rows = answers_of(connection, self.project_id, labeler_id=self.ids[name])
        return [vars(row) for row in sorted(rows, key=lambda row: row.event_id)]


def labelling(
    folder: Path,
    *kinds: Kind,
    prompts: Sequence[Any] = ("What is the capital of France?",),
    outputs: Sequence[str] = OUTPUTS,
    people: Sequence[str] = ("ann", "bob"),
    **settings: Any,
) -> Labelling:
    """A project of these kinds: every prompt has the same outputs, of models m0, m1, ..."""
    store = Store(str(folder / "labels.db"))
    project = ProjectSettings("Capitals", kinds, **{"outputs_per_prompt": max(2, len(outputs)), **settings})
    project_id = add_project(store, project)
    for prompt in prompts:
        given = [Output(text, f"secret-model-{i}") for i, text in enumerate(outputs)]
        add_item(store, project_id, prompt, outputs=None if kinds == ("demonstration",) else given)
    made = Labelling(store, project_id, {}, {})
    for name in (*people, "admin"):
        labeler, made.tokens[name] = add_labeler(store, name, "admin" if name == "admin" else "labeler")
        made.ids[name] = labeler.id
    return made


@contextmanager
def served(made: Labelling, **site: Any) -> Iterator[Labelling]:
    """The project behind a real server, on a free port of loopback."""
    try:
        with on_a_port(make_app(Site(made.store, made.project_id, **site))) as made.url:
            yield made
    finally:
        made.store.close()
