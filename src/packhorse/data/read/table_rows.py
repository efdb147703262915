"""Read rows of CSV and TSV files. A line that is not UTF-8 or is quoted wrongly costs its own row, never the next."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Final

from packhorse.data.read.listing import form_of
from packhorse.data.read.row import WHOLE_ROW, Row, RowMistakes, broken_row, shown
from packhorse.data.read.streams import LARGEST_ROW_BYTES, line_blocks
from packhorse.errors import Mistake, UserError

LONGEST_NAME: Final = 100
"""Characters of a column's name; a longer one is a value of a row."""
LINES_SHOWN: Final = 5
DELIMITERS: Final = (",", ";", "\t", "|")
SAMPLE_ROWS: Final = 20


def find_delimiter(path: Path, usual: str) -> str:
    """Return the character that separates cells: the usual one, unless only another one divides the first rows equally.

    Where the comma is the decimal sign, Excel writes a .csv with semicolons.

    Raises:
        UserError: The file cannot be read.
    """
    _, block = next(line_blocks(path), (1, b""))
    lines = block.decode(errors="replace").split("\n")
    found = (each for each in (usual, *DELIMITERS) if _divides_equally(lines, each))
    return next(found, usual)


def _divides_equally(lines: list[str], delimiter: str) -> bool:
    rows = csv.reader((f"{line}\n" for line in lines), delimiter=delimiter, strict=True)
    try:
        widths = {len(cells) for cells in islice(filter(None, rows), SAMPLE_ROWS)}
    except csv.Error:
        return False
    return len(widths) == 1 and min(widths) > 1


def read_table(path: Path, delimiter: str, has_header: bool, mistakes: RowMistakes) -> Iterator[Row]:
    """Yield the rows of a file with cells separated by `delimiter`; a cell that begins with a quote is quoted.

    Without a header line the cells are named 1, 2, 3, ….

    Raises:
        UserError: The header is not one, or a wrong quote makes it unclear where the next row begins.
    """
    # A text column may be longer than the module's default limit of 131,072 characters.
    csv.field_size_limit(LARGEST_ROW_BYTES)
    lines = _Lines(path)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    names = _header(lines, reader) if has_header else None
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
            mistakes.add(broken_row(f"{name}:{start}", "the row is not UTF-8", lines.bad, lines.row()))
        elif cells:
            if names is None:
                names = [str(number) for number in range(1, len(cells) + 1)]
            if len(cells) == len(names):
                yield Row(f"{name}:{start}", dict(zip(names, cells)))
            else:
                mistakes.add(_uneven(f"{name}:{start}", cells, names, lines.row()))


class _Lines:
    """Lines of a file with their line ends, as the csv module needs them.

    Attributes:
        path: File of the lines.
        bad: Error of a line of the current row that is not UTF-8; None if all lines are.
        num_lines_of_row: Lines read for the current row.
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
            # The csv module still gets the line; without it, it would join the lines before and after.
            self.bad = error
            text = line.decode(errors="replace")
        self.num_lines_of_row += 1
        if self.num_lines_of_row <= LINES_SHOWN:
            self._begin.append(text)
        return text

    def begin_row(self) -> int:
        """Start a new row and return the number of its first line."""
        self._begin.clear()
        self.bad, self.num_lines_of_row = None, 0
        return self._num_lines + 1

    def row(self) -> str:
        """Return the first lines that were read for the current row."""
        return "".join(self._begin)


def _split(path: Path) -> Iterator[bytes]:
    for _, block in line_blocks(path):
        for line in block.split(b"\n"):
            yield line + b"\n"


def _header(lines: _Lines, reader: Iterator[list[str]]) -> list[str]:
    lines.begin_row()
    try:
        names = next((cells for cells in reader if cells), [])
    except csv.Error as error:
        raise UserError.of([_misquoted(lines, 1, error)]) from error
    if lines.bad is not None:
        raise UserError.of([broken_row(f"{lines.path}:1", "the header is not UTF-8", lines.bad, lines.row())])
    odd = next((cell for cell in names if _is_number(cell) or len(cell) > LONGEST_NAME), None)
    twice = next((cell for at, cell in enumerate(names) if cell in names[:at]), None)
    by_number = 'say which column is which: columns: {question: "1", answer: "2"}'
    if odd is not None:
        raise UserError(
            f"the first line has a column named {shown(odd)}, which looks like a value of a row.",
            f"the first line of a {form_of(lines.path)[0]} file has the names of the columns.",
            f"add a line of names at the top; if the file has no names, {by_number} in data.sources[].",
            f"{lines.path}:1",
        )
    if twice is not None:
        raise UserError(
            f"the header has two columns named {shown(twice) or 'nothing'}.",
            "of two cells with one name, one would be lost.",
            f"give each column its own name; if the line is a row, {by_number} in data.sources[].",
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
    cause = ValueError(str(error).split(" - ")[0])
    mistake = broken_row(f"{lines.path}:{start}", "the row is quoted wrongly", cause, lines.row())
    # A row of one line ends with it. A longer one may have swallowed others, so the start of the next row is unknown.
    if lines.num_lines_of_row > 1 or "unexpected end" in str(error):
        fix = "double each quote inside a cell, and close each quoted cell."
        raise UserError.of([Mistake(mistake.fact, mistake.why, fix, mistake.where)]) from error
    return mistake


def _uneven(where: str, cells: list[str], names: list[str], row: str) -> Mistake:
    return Mistake(
        f"the row has {len(cells)} cells and the first line {len(names)} ({shown(', '.join(names))}); "
        f"it begins {shown(row)}",
        WHOLE_ROW,
        "put cells that hold delimiters or line breaks in double quotes; if another character separates the cells, set "
        'data.sources[].delimiter, e.g. delimiter: ";".',
        where,
    )
