"""Progress of a pass over rows, on standard error, so that a redirected result holds only the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def row_progress(doing: str) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal while the block runs; yield the function that takes the number of rows done."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} rows"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda rows: bar.update(task, completed=rows)
