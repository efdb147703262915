"""Read the rows of one JSON text (an array, or an object that holds one) in pieces, with one row in memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from packhorse.data.read.json_rows import check, not_an_object, read_jsonl, scan
from packhorse.data.read.row import Row, RowMistakes, broken_row, shown
from packhorse.data.read.streams import LARGEST_ROW_BYTES, line_blocks, pieces, too_long
from packhorse.errors import Mistake, UserError

SPACES: Final = re.compile(r"[ \t\r\n]*")
ONE_ROW_PER_LINE: Final = re.compile(r"\{[^\n]*\}[ \t\r]*\n[ \t\r\n]*\{")
ARRAY: Final = re.compile(rb"\s*\[\s*\{")
LISTS_ON_LINES: Final = re.compile(rb"\s*\[[^\n]*\][ \t\r]*\n\s*\[")
ROW_ENDS_LINE: Final = re.compile(r"[ \t]*,[ \t\r]*\n")
LOOK_AHEAD: Final = 64
LONGEST_TOKEN: Final = 16
"""Characters of `-Infinity`, an escaped pair and the like: an error closer to the end may come from a cut-off piece."""


def read_lines_or_array(path: Path, mistakes: RowMistakes) -> Iterator[Row]:
    """Yield the rows of a `.jsonl`: one object per line, or the objects of an array that was saved under that name.

    Raises:
        UserError: The file cannot be read to its end.
    """
    _, begin = next(line_blocks(path), (1, b""))
    is_array = ARRAY.match(begin) is not None and LISTS_ON_LINES.match(begin) is None
    yield from read_json(path, mistakes) if is_array else read_jsonl(path, mistakes)


def read_json(path: Path, mistakes: RowMistakes, key: str | None = None) -> Iterator[Row]:
    """Yield the objects of an array, or of a list of objects in an object, or of each line.

    Args:
        path: File.
        mistakes: Collects the rows that cannot be read.
        key: Key of the list in an object; None takes the only one.

    Raises:
        UserError: The text is neither, has no such list, or is broken in a place after which rows can no longer be
            separated.
    """
    text = _JsonText(path)
    by_line = text.has_one_row_per_line()
    if key is not None and (by_line or text.peek() == "["):
        raise no_keys(f"{path}, which has one object per line" if by_line else f"{path}, which is an array", key)
    if by_line:
        yield from read_jsonl(path, mistakes)
        return
    try:
        if text.peek() == "[":
            text.start_list()
            yield from _rows(text, mistakes)
        elif text.peek() == "{":
            yield from _rows_of_object(text, mistakes, key)
        elif text.peek():
            raise _no_rows(path, f"begins with {text.begin()}")
        if text.peek():
            text.fail("Extra data")
    except (ValueError, RecursionError) as error:
        raise UserError.of([text.broken(error)]) from error


@dataclass(frozen=True, slots=True)
class _Element:
    """A value and its source, `text[begin:end]`."""

    value: Any
    where: str
    text: str
    begin: int
    end: int


class _JsonText:
    """A JSON text and the current position in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pieces = _decoded(path)
        self._text = ""
        self._at = 0
        self._line = 1
        self._ended = False
        self._undecodable: UnicodeDecodeError | None = None
        self._row = 0
        self._row_line = 0
        self._is_alone = True

    def has_one_row_per_line(self) -> bool:
        """Return whether an object ends the first line and another follows: one JSON text would have a comma there."""
        return bool(self.peek()) and ONE_ROW_PER_LINE.match(self._text, self._at) is not None

    def begin(self) -> str:
        """Return the first characters at the current position."""
        return shown(self._text[self._at : self._at + 1000])

    def peek(self) -> str:
        """Return the next character that is not white space; empty at the end."""
        while True:
            spaces = SPACES.match(self._text, self._at)
            assert spaces is not None, "the pattern also matches the empty text"
            self._move(spaces.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._read_on()

    def take(self, expected: str) -> str:
        """Consume one of the expected characters and return it; raise JSONDecodeError for another one."""
        character = self.peek()
        if not character or character not in expected:
            self.fail("Expecting " + " or ".join(repr(one) for one in expected))
        self._move(self._at + 1)
        return character

    def start_list(self) -> None:
        """Consume the `[` of a list."""
        self.take("[")
        self._row, self._row_line = 0, self._line

    def start_row(self) -> None:
        """Count the element of a list that begins here."""
        self.peek()
        self._row += 1
        self._is_alone = self._line > self._row_line
        self._row_line = self._line

    def end_list(self) -> None:
        """Return to locations by line."""
        self._is_alone = True

    def where(self, line: int) -> str:
        """Return `file:line`, or `file row N` in a line where an earlier row, or the list, begins."""
        return f"{self.path}:{line}" if self._is_alone or line > self._row_line else f"{self.path} row {self._row}"

    def fail(self, message: str) -> NoReturn:
        """Raise a JSONDecodeError for the current position."""
        raise json.JSONDecodeError(message, self._text, self._at)

    def element(self) -> _Element:
        """Return the next value; raise ValueError if it is not JSON, RecursionError if it is nested too deeply."""
        self.peek()
        while True:
            try:
                value, end = scan(self._text, self._at)
                # A number near the end of the piece may continue in the next: -1 as -1.5, and 1 before e+ as 1e+9.
                if len(self._text) - end > 2 or self._ended:
                    break
            except json.JSONDecodeError as error:
                cut_off = error.pos >= len(self._text) - LONGEST_TOKEN or error.msg.startswith("Unterminated string")
                if self._ended or not cut_off:
                    raise
            self._read_on()
        if self._row == 1 and not self._is_alone:
            self._is_alone, end = self._ends_line(end)
        element = _Element(value, self.where(self._line), self._text, self._at, end)
        self._move(end)
        return element

    def broken(self, error: Exception) -> Mistake:
        """Return the mistake of a text that cannot be read further."""
        line, cause = self._line, error
        if isinstance(error, json.JSONDecodeError):
            line += self._text.count("\n", self._at, error.pos)
            # Its column counts from the start of the piece, not of the line.
            cause = ValueError(error.msg)
        return broken_row(self.where(line), "the JSON cannot be read further", cause, self.begin())

    def _ends_line(self, end: int) -> tuple[bool, int]:
        """Return whether a comma and the end of the line follow, and the end after the text was read further."""
        while len(self._text) - end < LOOK_AHEAD and not (self._ended or self._undecodable):
            end -= self._at
            self._read_on()
        return ROW_ENDS_LINE.match(self._text, end, end + LOOK_AHEAD) is not None, end

    def _move(self, place: int) -> None:
        self._line += self._text.count("\n", self._at, place)
        self._at = place

    def _read_on(self) -> None:
        # Read as much as is held already: with fixed pieces, a long row would be parsed again for each piece.
        held = [self._text[self._at :]]
        num_wanted, num_read = len(held[0]), 0
        if self._undecodable is not None:
            raise self._not_utf8(self._undecodable)
        if num_wanted > LARGEST_ROW_BYTES:
            raise too_long(self.where(self._line))
        while num_read <= num_wanted:
            try:
                piece = next(self._pieces, "")
            except UnicodeDecodeError as error:
                self._undecodable = error
                break
            if not piece:
                self._ended = True
                break
            held.append(piece)
            num_read += len(piece)
        self._text, self._at = "".join(held), 0

    def _not_utf8(self, error: UnicodeDecodeError) -> UserError:
        before = self._text[self._at :]
        where = self.where(self._line + before.count("\n"))
        cause = ValueError(f"byte {error.object[error.start]:#04x} ({error.reason})")
        following = error.object[error.start :][:1000].decode(errors="replace").partition("\n")[0]
        begin = before.rpartition("\n")[2] + following
        return UserError.of([broken_row(where, "the line is not UTF-8", cause, begin)])


def _decoded(path: Path) -> Iterator[str]:
    """Yield the text; raise UnicodeDecodeError only after all text before the wrong byte, so that rows are counted."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for piece in pieces(path):
            if text := decoder.decode(piece):
                yield text
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        if error.start > 0:
            yield error.object[: error.start].decode()
        raise


def _elements(text: _JsonText) -> Iterator[_Element]:
    """Yield the elements of a list after its `[`, and consume its `]`."""
    if text.peek() == "]":
        text.take("]")
        return
    while True:
        text.start_row()
        yield text.element()
        if text.take(",]") == "]":
            text.end_list()
            return


def _rows(text: _JsonText, mistakes: RowMistakes) -> Iterator[Row]:
    for element in _elements(text):
        source = element.text, element.begin, element.end
        if not isinstance(element.value, dict):
            mistakes.add(not_an_object(element.value, element.where, element.text[element.begin : element.end]))
            continue
        try:
            check(element.value, *source, escapes=True)
        except (ValueError, RecursionError) as error:
            row = element.text[element.begin : element.end]
            mistakes.add(broken_row(element.where, "the row is not sound JSON", error, row))
        else:
            yield Row(element.where, element.value)


def _rows_of_object(text: _JsonText, mistakes: RowMistakes, wanted: str | None) -> Iterator[Row]:
    """Yield the rows of an object's list of objects, the wanted or the only one; its other values describe the file."""
    lists: list[str] = []
    text.take("{")
    while True:
        if text.peek() != '"':
            text.fail("Expecting property name enclosed in double quotes")
        key = text.element().value
        text.take(":")
        if text.peek() != "[":
            text.element()
        else:
            text.start_list()
            has_rows = text.peek() == "{"
            is_wanted = has_rows and (not lists if wanted is None else key == wanted and key not in lists)
            if has_rows:
                lists.append(key)
            if is_wanted:
                yield from _rows(text, mistakes)
            else:
                for _ in _elements(text):
                    pass
        if text.take(",}") == "}":
            break
    _check_lists(text.path, lists, wanted)


def _check_lists(path: Path, lists: list[str], wanted: str | None) -> None:
    named = ", ".join(map(shown, lists))
    if not lists:
        raise _no_rows(path, "is an object without a list of objects")
    if wanted is None and len(lists) > 1:
        raise UserError(
            f"{path} is an object with several lists of objects: {named}.",
            "read together, rows that were set apart would become training rows.",
            f"name the list to read with the source's key: {{path: {path.name}, key: {shown(lists[0])}}}.",
        )
    if wanted is not None and lists.count(wanted) != 1:
        times = "no" if wanted not in lists else "more than one"
        raise UserError(
            f"{path} has {times} list of objects with the key {shown(wanted)}; its lists are {named}.",
            "the source's key names the list with its rows.",
            f"write one of these keys, such as key: {shown(lists[0])}.",
        )


def no_keys(what: str, key: str) -> UserError:
    """Return the error of a source with a key whose file has no keys."""
    return UserError(
        f"the source's key is {key}, for {what}.",
        "a key names one of the lists in a .json file that holds an object.",
        "remove key from the source.",
    )


def _no_rows(path: Path, fact: str) -> UserError:
    return UserError(
        f"{path} {fact}.",
        "a .json file holds one array of rows, alone or in an object.",
        "write the rows as [{…}, {…}]; a file with one row per line has the ending .jsonl.",
    )
