"""Rows that were read, and the mistakes of rows that cannot be read."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from packhorse.errors import Mistake, UserError, shown_characters

SHOWN_CHARACTERS: Final = 80
WHOLE_ROW: Final = "every row is either trained on or accounted for, so none is skipped."
MOST_SHOWN: Final = 3
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
    """Mistakes of one source, at most one per row: all are counted by kind, and the first 10,000 are recorded.

    Attributes:
        recorded: First mistakes, in the order of the rows.
    """

    def __init__(self, origin: str, listed_in: Path | None = None) -> None:
        """Start without mistakes.

        Args:
            origin: Name of the source in messages.
            listed_in: File to which the caller writes what is recorded, if it writes one.
        """
        self._origin, self._listed_in = origin, listed_in
        self._kinds: Counter[str] = Counter()
        self._shown: dict[str, list[Mistake]] = {}
        self.recorded: list[Mistake] = []

    @property
    def num_rows(self) -> int:
        """Number of rows with a mistake."""
        return self._kinds.total()

    @property
    def all_shown(self) -> bool:
        """Whether `to_show` has every row."""
        return all(count <= MOST_SHOWN for count in self._kinds.values())

    def add(self, mistake: Mistake) -> None:
        """Count the mistake of a row that is dropped."""
        kind = mistake.kind or f"{mistake.why} {mistake.fix}"
        self._kinds[kind] += 1
        if self._kinds[kind] <= MOST_SHOWN:
            self._shown.setdefault(kind, []).append(mistake)
        if len(self.recorded) < MOST_RECORDED:
            self.recorded.append(mistake)

    def to_show(self) -> list[Mistake]:
        """Return one mistake for each kind, with its count and three rows; and the total, if there are several rows."""
        kinds = [self._of_kind(count, self._shown[kind]) for kind, count in self._kinds.items()]
        if self.num_rows < 2:
            return kinds
        in_kinds = "" if len(kinds) == 1 else f" of {len(kinds)} kinds"
        total = Mistake(
            f"{self._origin} has {self.num_rows:,} rows with mistakes{in_kinds}{self._listed()}.",
            "a row that cannot be read correctly would be lost or trained on wrongly.",
            "fix or remove these rows, or set data.on_bad_row to drop, then run the command again.",
        )
        return [*kinds, total]

    def raise_if_any(self) -> None:
        """Raise all mistakes as one UserError, if there are any."""
        if self._shown:
            raise UserError.of(self.to_show())

    def _of_kind(self, count: int, first: list[Mistake]) -> Mistake:
        if count == 1:
            return first[0]
        rows = "".join(f"\n    {mistake.where}: {mistake.fact}" for mistake in first)
        examples = ", such as" if count > len(first) else ":"
        fact = f"{count:,} rows of {self._origin} have a mistake of one kind{examples}{rows}"
        return Mistake(fact, first[0].why, first[0].fix)

    def _listed(self) -> str:
        if self._listed_in is None or self.all_shown:
            return ""
        listed = "all" if self.num_rows <= MOST_RECORDED else f"the first {MOST_RECORDED:,}"
        return f"; {listed} are listed in {self._listed_in}"


def shown(text: str) -> str:
    """Return the first 80 characters of a row (2,000 in a log), with escapes for what a terminal cannot print."""
    most = shown_characters(SHOWN_CHARACTERS)
    # A broken row may be a whole file: only its beginning is copied.
    begin = text[: 4 * most].strip()[:most]
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
