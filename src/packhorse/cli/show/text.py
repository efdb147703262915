"""How commands print: a label and its text per line, plain lines, a command as it would be typed."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from packhorse.run_folder.folder import relative

WHOLE_LINE: Final = 100_000


class WholeLines(Console):
    """Console of a pipe or a file: no line is folded or cut to a width, and none ends in the spaces of a column."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, width=WHOLE_LINE)

    def print(self, *objects: Any, **options: Any) -> None:  # noqa: ANN401
        """Print as `Console.print` does."""
        with self.capture() as captured:
            super().print(*objects, **options)
        self.file.write(re.sub(r" +$", "", captured.get(), flags=re.MULTILINE))


def open_console(*, stderr: bool = False) -> Console:
    """Return the console of standard output or standard error; `COLUMNS` sets a width even for a pipe or a file."""
    console = Console(stderr=stderr)
    return console if console.is_terminal or "COLUMNS" in os.environ else WholeLines(stderr=stderr)


def pairs(lines: Sequence[tuple[str, str]]) -> Table:
    """Return a table with a label and a text per line, folded to the width of the terminal."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in lines:
        table.add_row(label, Text(text))
    return table


def plain_table(*columns: str, right: Sequence[str] = (), whole: Sequence[str] = ()) -> Table:
    """Return an empty table without lines; its columns fold, except those in `whole` and, aligned right, in `right`."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in columns:
        is_right = heading in right
        no_wrap = is_right or heading in whole
        table.add_column(heading, overflow="fold", justify="right" if is_right else "left", no_wrap=no_wrap)
    return table


def print_plain(text: str, console: Console | None = None) -> None:
    """Print text unchanged: no markup, no highlighting, no line breaks, so that it can be copied."""
    (console or open_console()).print(text, markup=False, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:  # noqa: ANN401
    """Print a value as JSON."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def shown(argv: Sequence[str]) -> str:
    """Return a command as it would be typed in the current folder."""
    return shlex.join(relative(word) for word in argv)
