"""Rows that were read, and the mistakes of rows that cannot be read."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

from packhorse.errors import Mistake, UserError

SHOWN_CHARACTERS: Final = 80
WHOLE_ROW: Final = "every row is either trained on or accounted for, so none is skipped."
MOST_SHOWN: Final = 20
MOST_RECORDED: Final = 10_000


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read.

    Attributes:
        where: `file:line`; `file:row number` for Parquet, Arrow and the hub; `file row N` in a JSON line of several.
        values: Keys and values of the row.
    """

    where: str
    values: dict[str, Any]


class RowMistakes:
    """Mistakes of one source, at most one per row: the first 20 of a kind are shown, the first 10,000 rows recorded."""

    def __init__(self, origin: str) -> None:
        self._origin = origin
        self._shown: list[Mistake] = []
        self._kinds: Counter[str] = Counter()
        self.recorded: list[Mistake] = []

    @property
    def num_rows(self) -> int:
        """Number of rows with a mistake."""
        return self._kinds.total()

    def add(self, mistake: Mistake) -> None:
        """Count the mistake of a row that is dropped; mistakes with equal reason and fix are of one kind."""
        kind = f"{mistake.why} {mistake.fix}"
        self._kinds[kind] += 1
        if self._kinds[kind] <= MOST_SHOWN:
            self._shown.append(mistake)
        if len(self.recorded) < MOST_RECORDED:
            self.recorded.append(mistake)

    def to_show(self) -> list[Mistake]:
        """Return the mistakes to show; if there are several, the last one gives the total."""
        if self.num_rows < 2:
            return self._shown
        total = Mistake(
            f"{self._origin} has {self.num_rows} mistakes; {len(self._shown)} are shown.",
            "a row that cannot be read correctly would be lost or trained on wrongly.",
            "fix or remove these rows, or set data.on_bad_row to drop, then run the command again.",
        )
        return [*self._shown, total]

    def raise_if_any(self) -> None:
        """Raise all mistakes as one UserError, if there are any."""
        if self._shown:
            raise UserError.of(self.to_show())


def shown(text: str) -> str:
    """Return the first 80 characters of a row, with escapes for characters that a terminal cannot print."""
    # A broken row may be a whole file: only its beginning is copied.
    begin = text[: 4 * SHOWN_CHARACTERS].strip()[:SHOWN_CHARACTERS]
    if begin.isprintable():
        return begin
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in begin)


def broken_row(where: str, fact: str, error: Exception, text: str) -> Mistake:
    """Return the mistake of a row that does not have the form of its file."""
    return Mistake(f"{fact}: {reason(error)}; it begins {shown(text)}", WHOLE_ROW, "fix or remove the line.", where)


def reason(error: Exception) -> str:
    """Return the message of a parser's error in words that need no knowledge of Python."""
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.object[error.start]:#04x} at column {error.start + 1} ({error.reason})"
    if isinstance(error, ValueError) and "integer string conversion" in str(error):
        return "an integer of more than 4300 digits"
    return shown(str(error)) or type(error).__name__
