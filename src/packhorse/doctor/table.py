"""The doctor's one table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from packhorse.doctor.rows import Row, first_broken

STYLES = {"ok": "green", "note": "yellow", "broken": "bold red", "not tried": "dim"}


def summary(console: Console, rows: Sequence[Row], all_rows: bool) -> Row | None:
    """Prints the table, or where all is well and `all_rows` is off a line; returns the row to mend first."""
    broken = first_broken(rows)
    told = [row for row in rows if row.verdict != "ok"]
    if all_rows or broken is not None:
        console.print(rows_table(rows))
    else:
        console.print(f"doctor: {len(rows)} rows looked at, {len(rows) - len(told)} ok", highlight=False)
        if told:
            console.print(rows_table(told))
    if broken is not None:
        words = f"first broken: {broken.name}: {broken.fact}\n  fix: {broken.fix}"
        console.print(words, style="bold red", highlight=False, markup=False, soft_wrap=True)
    return broken


def rows_table(rows: Sequence[Row]) -> Table:
    """A line a row; what is to be done stands under what was found."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        told = Text(row.fact)
        if row.fix:
            told.append(f"\nfix: {row.fix}", style="bold" if row.verdict == "broken" else "")
        table.add_row(row.name, Text(row.verdict, style=STYLES[row.verdict]), told)
    return table
