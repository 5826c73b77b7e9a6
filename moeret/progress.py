"""What a long job tells people on standard error, and only if a caller asks: the only place that does."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

Advance = Callable[..., None]
"""advance(n=1, note=None) moves a bar on by n and shows the note, or still the one before, behind it."""

_LINE_EVERY = 30.0
"""Seconds between a bar's lines where there is no terminal to draw it on, as in a log."""


def announce(text: str, *, shown: bool) -> None:
    """Says what comes next."""
    if shown:
        _print(Console(stderr=True), text)


@contextmanager
def progress_bar(description: str, total: int, *, shown: bool, unit: str = "", start: int = 0) -> Iterator[Advance]:
    """Draws a bar with count, rate and time left while the block runs, or prints a line now and then without a terminal."""
    console = Console(stderr=True)
    if not shown or total <= start:
        yield lambda n=1, note=None: None
    elif console.is_terminal:
        with _bar(console, description, total, unit, start) as advance:
            yield advance
    else:
        lines = _Lines(console, description, total, unit, start)
        try:
            yield lines.advance
        finally:
            lines.print()


@contextmanager
def _bar(console: Console, description: str, total: int, unit: str, start: int) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn(f"{unit},"),
        _Rate(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
        _Note(table_column=Column(no_wrap=False)),  # the column that gives way on a narrow terminal
    )
    with Progress(*columns, console=console, refresh_per_second=4) as bars:
        task = bars.add_task(description, total=total, completed=start, note="")

        def advance(n: int = 1, note: str | None = None) -> None:
            bars.update(task, advance=n, **({} if note is None else {"note": note}))

        yield advance


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        """How much is done in a second."""
        speed = task.finished_speed or task.speed
        return Text(f"{_short(speed)}/s," if speed else "")


class _Note(ProgressColumn):
    def render(self, task: Task) -> Text:
        """What was said last, cut where the line ends."""
        return Text(task.fields["note"], no_wrap=True, overflow="ellipsis")


def _short(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


class _Lines:
    """How far a job is, line by line."""

    def __init__(self, console: Console, description: str, total: int, unit: str, start: int):
        self._console, self._what, self._total, self._unit = console, description, total, unit
        self._start = self._done = start
        self._began = self._printed = time.monotonic()
        self._note, self._moving = "", threading.Lock()

    def advance(self, n: int = 1, note: str | None = None) -> None:
        """Moves on by n, in any thread."""
        with self._moving:
            self._done, self._note = self._done + n, self._note if note is None else note
            if time.monotonic() - self._printed >= _LINE_EVERY:
                self.print()

    def print(self) -> None:
        """Says how far it is."""
        self._printed = now = time.monotonic()
        rate = (self._done - self._start) / max(now - self._began, 1e-9)
        parts = [f"{self._what}: {self._done:,} of {self._total:,} {self._unit}"]
        if rate:
            left = timedelta(seconds=round((self._total - self._done) / rate))
            parts += [f"{_short(rate)}/s", *([f"{left} left"] if self._done < self._total else [])]
        _print(self._console, ", ".join([*parts, self._note] if self._note else parts))


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
