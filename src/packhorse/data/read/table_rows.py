"""Rows of CSV and TSV. A line that is no UTF-8 or wrongly quoted costs its own row, never the one beside it."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from packhorse.data.read.broken import WHOLE_ROW, broken_row, shown
from packhorse.data.read.mistakes import RowMistakes
from packhorse.data.read.row import Row
from packhorse.data.read.streams import LARGEST_ROW_BYTES, line_blocks
from packhorse.errors import Mistake, UserError

LONGEST_NAME: Final = 100
"""Characters of a column's name; a longer one is a row's text."""
LINES_SHOWN: Final = 5


def read_table(path: Path, delimiter: str, has_header: bool, mistakes: RowMistakes) -> Iterator[Row]:
    """Yield the rows of a file whose cells are parted by `delimiter`; a cell that begins with a quote is quoted.

    Without a header line the cells are called 1, 2, 3, ….

    Raises:
        UserError: The header is none, or the rows cannot be told apart any more.
    """
    # A text column may be longer than the module's default limit of 131,072 characters.
    csv.field_size_limit(LARGEST_ROW_BYTES)
    lines = _Lines(path)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    names = _header(lines, reader, delimiter) if has_header else None
    name = str(path)
    while True:
        start = lines.begin_row()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            mistakes.add(_misquoted(lines, start, error))
            continue
        if lines.bad is not None:
            mistakes.add(broken_row(f"{name}:{start}", "the row is no UTF-8", lines.bad, lines.row()))
        elif cells:
            if names is None:
                names = [str(number) for number in range(1, len(cells) + 1)]
            if len(cells) == len(names):
                yield Row(f"{name}:{start}", dict(zip(names, cells)))
            else:
                mistakes.add(_uneven(f"{name}:{start}", cells, names, lines.row()))


class _Lines:
    """The lines of a file with their ends, as the csv module asks for them.

    Attributes:
        path: File of the lines.
        bad: Why a line of this row is no UTF-8; None while all are.
        num_lines_of_row: Lines read for this row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bad: UnicodeDecodeError | None = None
        self._lines = _split(path)
        self._num_lines = 0
        self._begin: list[str] = []
        self.num_lines_of_row = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self._num_lines += 1
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            # The line is still shown to the csv module, which else would join what stands before and after it.
            self.bad = error
            text = line.decode(errors="replace")
        self.num_lines_of_row += 1
        if self.num_lines_of_row <= LINES_SHOWN:
            self._begin.append(text)
        return text

    def begin_row(self) -> int:
        """Return the number of the line at which the next row begins."""
        self._begin.clear()
        self.bad, self.num_lines_of_row = None, 0
        return self._num_lines + 1

    def row(self) -> str:
        """Return the beginning of the lines that were read for this row."""
        return "".join(self._begin)


def _split(path: Path) -> Iterator[bytes]:
    for _, block in line_blocks(path):
        for line in block.split(b"\n"):
            yield line + b"\n"


def _header(lines: _Lines, reader: Iterator[list[str]], delimiter: str) -> list[str]:
    lines.begin_row()
    try:
        names = next((cells for cells in reader if cells), [])
    except csv.Error as error:
        raise UserError.of([_misquoted(lines, 1, error)]) from error
    if lines.bad is not None:
        raise UserError.of([broken_row(f"{lines.path}:1", "the header is no UTF-8", lines.bad, lines.row())])
    odd = next((cell for cell in names if _is_number(cell) or len(cell) > LONGEST_NAME), None)
    twice = next((cell for at, cell in enumerate(names) if cell in names[:at]), None)
    by_number = 'say which column is what: columns: {question: "1", answer: "2"}'
    if odd is not None:
        raise UserError(
            f"the first line names a column {shown(odd)}, which looks like a row's own value.",
            f"the first line of a .{'csv' if delimiter == ',' else 'tsv'} file names the columns, and is no row.",
            f"add a line of names at the top; or, as the file has none, {by_number} in data.sources[].",
            f"{lines.path}:1",
        )
    if twice is not None:
        raise UserError(
            f"the header names two columns {shown(twice) or 'nothing'}.",
            "of two cells with one name, one would be lost.",
            f"give each column its own name; or, if the line is a row, {by_number} in data.sources[].",
            f"{lines.path}:1",
        )
    return names


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _misquoted(lines: _Lines, start: int, error: csv.Error) -> Mistake:
    said = ValueError(str(error).split(" - ")[0])
    found = broken_row(f"{lines.path}:{start}", "the row is wrongly quoted", said, lines.row())
    # A row of one line ends with it. A longer one may have swallowed others, and nobody knows where the next begins.
    if lines.num_lines_of_row > 1 or "unexpected end" in str(error):
        fix = "double each quote inside a cell, and close each quoted cell."
        raise UserError.of([Mistake(found.fact, found.why, fix, found.where)]) from error
    return found


def _uneven(where: str, cells: list[str], names: list[str], row: str) -> Mistake:
    return Mistake(
        f"the row has {len(cells)} cells and the first line {len(names)} ({shown(', '.join(names))}); "
        f"it begins {shown(row)}",
        WHOLE_ROW,
        "put a cell that holds delimiters or line breaks in double quotes.",
        where,
    )
