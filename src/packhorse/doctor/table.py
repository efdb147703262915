"""Rows of the doctor's table, and the table itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

EXIT_BROKEN: Final = 1
RowStatus = Literal["ok", "note", "broken", "not tried"]
STYLES: Final[dict[RowStatus, str]] = {"ok": "green", "note": "yellow", "broken": "bold red", "not tried": "dim"}


@dataclass(frozen=True)
class Row:
    """Result of one check.

    Attributes:
        status: `broken`: training would fail, or learn nothing; `note`: it may be slow, or fail later.
        fact: Finding, with the names of the nodes.
        fix: Smallest change that fixes it; empty if none is needed.
        name: Name of the check.
    """

    status: RowStatus
    fact: str
    fix: str = ""
    name: str = ""


ok, not_tried = partial(Row, "ok"), partial(Row, "not tried")
note, broken = partial(Row, "note"), partial(Row, "broken")


def first_broken(rows: Sequence[Row]) -> Row | None:
    """Return the row to fix first: a row may depend on those above it."""
    return next((row for row in rows if row.status == "broken"), None)


def print_table(console: Console, rows: Sequence[Row], all_rows: bool) -> Row | None:
    """Print the rows; if none is broken and not `all_rows`, only a count and the notes.

    Returns:
        The row to fix first; None if none is broken.
    """
    broken = first_broken(rows)
    not_ok = [row for row in rows if row.status != "ok"]
    if all_rows or broken is not None:
        console.print(_rich_table(rows))
    else:
        console.print(f"doctor: {len(rows)} checks, {len(rows) - len(not_ok)} ok", highlight=False)
        if not_ok:
            console.print(_rich_table(not_ok))
    if broken is not None:
        words = f"first broken: {broken.name}: {broken.fact}\n  fix: {broken.fix}"
        console.print(words, style="bold red", highlight=False, markup=False, soft_wrap=True)
    return broken


def _rich_table(rows: Sequence[Row]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        text = Text(row.fact)
        if row.fix:
            text.append(f"\nfix: {row.fix}", style="bold" if row.status == "broken" else "")
        table.add_row(row.name, Text(row.status, style=STYLES[row.status]), text)
    return table
