"""How verbs print: a label and its text on a line, a command as it would be typed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from packhorse.run_folder.folder import relative


def pairs(lines: Sequence[tuple[str, str]]) -> Table:
    """A label and a text a line, folded to the width of the terminal."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in lines:
        table.add_row(label, Text(text))
    return table


def shown(argv: Sequence[str]) -> str:
    """A command as it would be typed here."""
    return shlex.join(relative(word) for word in argv)
