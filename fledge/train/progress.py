"""The line a user watches while a model trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn
from rich.text import Text


def clock(seconds: float) -> str:
    """Seconds as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def say(console: Console, text: str) -> None:
    """Print a line as it is: paths are neither wrapped nor read as markup."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def reading_progress(
    console: Console, doing: str = "tokenising", unit: str = "tokens", quiet_seconds: float = 10.0
) -> Iterator[Callable[[str, int, int], None]]:
    """A line about the source that is being read, given (name, documents, size in `unit`); every ten seconds
    a line where there is no terminal."""
    printed_at = time.monotonic()
    with console.status("reading the sources") as status:

        def show(name: str, documents: int, size: int) -> None:
            nonlocal printed_at
            text = f"{doing} {name}: {documents:,} documents, {size:,} {unit}"
            now = time.monotonic()
            if console.is_terminal:
                status.update(escape(text))
            elif now - printed_at >= quiet_seconds:
                printed_at = now
                say(console, text)

        yield show


class _Figures(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields.get("figures", ""), style="cyan")


class TrainingProgress:
    """A bar with loss, tokens/s and time left on a terminal; a line every ten seconds elsewhere."""

    def __init__(self, label: str, console: Console, quiet_seconds: float = 10.0) -> None:
        self.label, self.console, self.quiet_seconds = label, console, quiet_seconds
        self.bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), _Figures())
            self.bar = Progress(*columns, console=console)
            self.task = self.bar.add_task(label, total=None)
        self.printed_at = time.monotonic()

    def __enter__(self) -> TrainingProgress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()

    def show(
        self,
        step: int,
        total: int | None,
        loss: float | None,
        tokens_per_second: float,
        seconds_left: float | None,
    ) -> None:
        """Report a finished step."""
        left = "measuring" if seconds_left is None else f"{clock(seconds_left)} left"
        shown = "-" if loss is None else f"{loss:.3f}"
        figures = f"loss {shown}  {tokens_per_second:,.0f} tokens/s  {left}"
        if self.bar:
            self.bar.update(self.task, completed=step, total=total, figures=figures)
            return
        now = time.monotonic()
        if now - self.printed_at >= self.quiet_seconds or step == total:
            self.printed_at = now
            self.note(f"{self.label}  step {step:,}/{'?' if total is None else f'{total:,}'}  {figures}")

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        say(self.bar.console if self.bar else self.console, text)
