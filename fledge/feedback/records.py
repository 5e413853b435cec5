"""What the store gives back: plain values, safe to keep after the database is closed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fledge.feedback.forms import Answer, Kind, Message, ProjectSettings

Role = Literal["admin", "labeler"]
ItemState = Literal["waiting", "ready", "failed"]
"""waiting: its outputs are not made yet; ready: it can be labelled; failed: no model could answer it."""


@dataclass(frozen=True)
class Project:
    """A project as it stands now (instructions and a few other settings can be edited)."""

    id: int
    settings: ProjectSettings


@dataclass(frozen=True)
class Output:
    """One answer of a model to a prompt. Labelers must never see `model`."""

    text: str
    model: str


@dataclass(frozen=True)
class Item:
    """A prompt with its outputs, in the item's own order."""

    id: int
    project_id: int
    prompt: list[Message]
    state: ItemState
    outputs: tuple[Output, ...] = ()
    gold: str | None = None
    """A reference answer from the prompt file; shown to nobody, used by simulated labels."""
    error: str | None = None
    author_id: int | None = None
    """The labeler who wrote the prompt; None: it came from a file."""
    source: str | None = None
    """Where it came from: the file and line, or the name of an import."""


@dataclass(frozen=True)
class Labeler:
    """A person with a personal link, or a simulated one, or whoever labelled an imported file."""

    id: int
    name: str
    role: Role
    simulated: bool = False
    imported: bool = False
    revoked: bool = False
    purged: bool = False

    @property
    def handle(self) -> str:
        """What exports call the labeler: no name leaves the store."""
        return f"{'simulated' if self.simulated else 'imported' if self.imported else 'labeler'}-{self.id}"


@dataclass(frozen=True)
class Prefill:
    """An answer that a judge gave before the person; in the order shown."""

    answer: Answer
    judge: str


@dataclass(frozen=True)
class Draft:
    """What was autosaved: any JSON object of the page, and the seconds spent so far."""

    body: dict[str, Any]
    seconds: float


@dataclass(frozen=True)
class Assignment:
    """What one labeler sees of one task: everything the page needs and nothing it must hide.

    `outputs` are in the order shown. `order` goes back with the answer: it says that the page showed this
    order, and is recorded. `answer` (in the order shown) is what the labeler said before, if they did;
    `skipped` is their reason when they skipped it.
    """

    task_id: int
    item_id: int
    project_id: int
    kind: Kind
    prompt: list[Message]
    outputs: tuple[str, ...]
    order: tuple[int, ...]
    questions: tuple[str, ...]
    instructions: str
    draft: Draft | None = None
    answer: Answer | None = None
    skipped: str | None = None
    prefill: Prefill | None = None
    flags: tuple[str, ...] = ()
    """What this labeler flagged here."""


@dataclass(frozen=True)
class Done:
    """A task that a labeler has answered or skipped: a line of their history, oldest first."""

    task_id: int
    kind: Kind
    state: Literal["answered", "skipped"]
    at: float
    """Unix time in seconds."""


@dataclass(frozen=True)
class StoredAnswer:
    """A current answer, in the item's order, with how it came to be."""

    event_id: int
    task_id: int
    item_id: int
    kind: Kind
    labeler: Labeler
    outputs: tuple[int, ...]
    """Places in the item of the outputs that the answer speaks of."""
    state: Literal["answered", "skipped"]
    answer: Answer | None
    """None for a skipped task."""
    order: tuple[int, ...]
    seconds: float
    at: float
    reason: str | None = None
    judge: str | None = None
    """The judge whose answer was shown before; None: nothing was pre-filled."""
    changed: bool | None = None
    """Whether the answer differs from the pre-filled one; None: nothing was pre-filled."""
    revisions: int = 0
    """How many earlier answers of the same labeler this one supersedes."""


@dataclass(frozen=True)
class Flag:
    """A task that somebody wants looked at."""

    task_id: int
    item_id: int
    labeler: Labeler
    reason: str
    at: float


@dataclass(frozen=True)
class Progress:
    """How far a project is; for one labeler, `mine_*` and `open_for_me` too."""

    items: dict[ItemState, int]
    slots: int
    """Answers that the ready tasks need in all: tasks times labelers per item."""
    filled: int
    """Slots that are filled (surplus answers do not count)."""
    mine_answered: int = 0
    mine_skipped: int = 0
    open_for_me: int = 0
    """Tasks that this labeler could still get."""
