"""Progress bars: the only place that draws them. Silent unless a caller asks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[..., None]
"""advance(n=1, note="") moves a bar on by n and shows the note behind it."""


@contextmanager
def progress_bar(description: str, total: int, *, shown: bool, unit: str = "", start: int = 0) -> Iterator[Advance]:
    """Draws a bar with count and time left on stderr while the block runs, or nothing unless `shown`."""
    if not shown or total <= start:
        yield lambda n=1, note="": None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn(f"{unit}, left"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as bars:
        task = bars.add_task(description, total=total, completed=start, note="")

        def advance(n: int = 1, note: str | None = None) -> None:
            bars.update(task, advance=n, **({} if note is None else {"note": note}))

        yield advance
