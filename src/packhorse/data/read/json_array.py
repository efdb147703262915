"""Rows of one JSON text: an array, or an object that holds one; read in pieces, so that only one row is held."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from packhorse.data.read.broken import broken_row, shown
from packhorse.data.read.json_rows import check, no_object, read_jsonl, scan
from packhorse.data.read.mistakes import RowMistakes
from packhorse.data.read.row import Row
from packhorse.data.read.streams import LARGEST_ROW_BYTES, pieces, too_long
from packhorse.errors import Mistake, UserError

LINE_FEED: Final = b"\n"
SPACES: Final = re.compile(r"[ \t\r\n]*")
ONE_ROW_A_LINE: Final = re.compile(r"\{[^\n]*\}[ \t\r]*\n[ \t\r\n]*\{")
LONGEST_TOKEN: Final = 16
"""Characters of `-Infinity`, an escaped pair and the like: nearer to the end, what is read may be cut off."""


def read_json(path: Path, mistakes: RowMistakes) -> Iterator[Row]:
    """Yield the objects of an array, or of the one list of objects that an object holds, or of each line.

    Raises:
        UserError: The text is neither, or cannot be read on; what follows a broken element cannot be told from it.
    """
    text = _JsonText(path)
    if text.has_one_row_a_line():
        yield from read_jsonl(path, mistakes)
        return
    try:
        if text.peek() == "[":
            text.take("[")
            yield from _rows(text, mistakes)
        elif text.peek() == "{":
            yield from _rows_of_object(text, mistakes)
        elif text.peek():
            raise _no_rows(path, f"begins with {text.begin()}")
        if text.peek():
            text.fail("Extra data")
    except (ValueError, RecursionError) as error:
        raise UserError.of([text.broken(error)]) from error


@dataclass(frozen=True, slots=True)
class _Element:
    """A value, and where it was read: `text[begin:end]`."""

    value: Any
    where: str
    text: str
    begin: int
    end: int


class _JsonText:
    """A JSON text and the place that is read next."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pieces = _decoded(path)
        self._text = next(self._pieces, "")
        self._at = 0
        self._line = 1
        self._ended = False

    def has_one_row_a_line(self) -> bool:
        """Return whether an object ends the first line and another follows: inside one text a comma would part them."""
        return bool(self.peek()) and ONE_ROW_A_LINE.match(self._text, self._at) is not None

    def begin(self) -> str:
        """Return the first characters of what comes next."""
        return shown(self._text[self._at : self._at + 1000])

    def peek(self) -> str:
        """Return the next character that is no space; empty at the end."""
        while True:
            spaces = SPACES.match(self._text, self._at)
            assert spaces is not None, "nothing is a match too"
            self._move(spaces.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._read_on()

    def take(self, wanted: str) -> str:
        """Pass over one of the wanted characters and return it.

        Raises:
            JSONDecodeError: There is another one.
        """
        found = self.peek()
        if not found or found not in wanted:
            self.fail("Expecting " + " or ".join(repr(one) for one in wanted))
        self._move(self._at + 1)
        return found

    def fail(self, message: str) -> NoReturn:
        """Raise a JSONDecodeError for what comes next."""
        raise json.JSONDecodeError(message, self._text, self._at)

    def element(self) -> _Element:
        """Return the next value.

        Raises:
            ValueError: There is no JSON value.
            RecursionError: It is nested too deeply.
        """
        self.peek()
        where = f"{self.path}:{self._line}"
        while True:
            try:
                value, end = scan(self._text, self._at)
                # A number near the end of what was read so far may go on: -1 as -1.5, and 1 before e+ as 1e+9.
                if len(self._text) - end > 2 or self._ended:
                    break
            except json.JSONDecodeError as error:
                cut_off = error.pos >= len(self._text) - LONGEST_TOKEN or error.msg.startswith("Unterminated string")
                if self._ended or not cut_off:
                    raise
            self._read_on()
        found = _Element(value, where, self._text, self._at, end)
        self._move(end)
        return found

    def broken(self, error: Exception) -> Mistake:
        """Return the mistake of a text that cannot be read on."""
        line, said = self._line, error
        if isinstance(error, json.JSONDecodeError):
            line += self._text.count("\n", self._at, error.pos)
            # Its column counts from where the piece begins, not the line.
            said = ValueError(error.msg)
        return broken_row(f"{self.path}:{line}", "the JSON cannot be read on", said, self.begin())

    def _move(self, place: int) -> None:
        self._line += self._text.count("\n", self._at, place)
        self._at = place

    def _read_on(self) -> None:
        # As much again as is held: a long row would else be begun anew for each piece.
        held = [self._text[self._at :]]
        wanted, num_read = len(held[0]), 0
        if wanted > LARGEST_ROW_BYTES:
            raise too_long(f"{self.path}:{self._line}")
        while num_read <= wanted:
            piece = next(self._pieces, "")
            if not piece:
                self._ended = True
                break
            held.append(piece)
            num_read += len(piece)
        self._text, self._at = "".join(held), 0


def _decoded(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    try:
        for piece in pieces(path):
            if text := decoder.decode(piece):
                yield text
            line += piece.count(LINE_FEED)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        said = ValueError(f"byte {error.object[error.start]:#04x} ({error.reason})")
        begin = error.object[before.rfind(LINE_FEED) + 1 :][:1000].decode(errors="replace")
        where = f"{path}:{line + before.count(LINE_FEED)}"
        raise UserError.of([broken_row(where, "the line is no UTF-8", said, begin)]) from error


def _elements(text: _JsonText) -> Iterator[_Element]:
    """Yield what a list holds whose `[` was taken; take its `]`."""
    if text.peek() == "]":
        text.take("]")
        return
    while True:
        yield text.element()
        if text.take(",]") == "]":
            return


def _rows(text: _JsonText, mistakes: RowMistakes) -> Iterator[Row]:
    for found in _elements(text):
        if not isinstance(found.value, dict):
            mistakes.add(no_object(found.value, found.where, found.text[found.begin : found.end]))
            continue
        try:
            check(found.value, found.text, found.begin, found.end, escapes=True)
        except (ValueError, RecursionError) as error:
            row = found.text[found.begin : found.end]
            mistakes.add(broken_row(found.where, "the row is no sound JSON", error, row))
        else:
            yield Row(found.where, found.value)


def _rows_of_object(text: _JsonText, mistakes: RowMistakes) -> Iterator[Row]:
    """Yield the rows of an object's one list of objects; its other values say something about the file."""
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
            text.take("[")
            if text.peek() == "{":
                lists.append(key)
                yield from _rows(text, mistakes) if len(lists) == 1 else ()
            else:
                for _ in _elements(text):
                    pass
        if len(lists) > 1:
            raise _no_rows(text.path, f"is an object with several lists of objects: {', '.join(map(shown, lists))}")
        if text.take(",}") == "}":
            break
    if not lists:
        raise _no_rows(text.path, "is an object without a list of objects")


def _no_rows(path: Path, fact: str) -> UserError:
    return UserError(
        f"{path} {fact}.",
        "a .json file holds one array of rows, alone or as the only list of an object.",
        "write the rows as [{…}, {…}]; a file of one row a line is named .jsonl.",
    )
