"""Rows that do not match their format, as messages for the user."""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Iterable
from typing import Final

from packhorse.errors import Mistake, shown_characters

SHOWN_CHARACTERS: Final = 80
SHOWN_NAMES: Final = 20
NAME_CHARACTERS: Final = 40


class BadRowError(Exception):
    """A row that cannot be used; the caller that knows its location makes a `Mistake` of it.

    Attributes:
        fact: What is wrong, with the value.
        why: Reason why the row cannot be used.
        fix: Smallest change that fixes it.
        kind: The statement that refuses the row: its facts, and its fixes, differ only in values.
    """

    def __init__(self, fact: str, why: str, fix: str) -> None:
        super().__init__(fact)
        self.fact, self.why, self.fix = fact, why, fix
        # One kind: raised by one statement, as logging finds its caller, for one reason.
        frame = inspect.currentframe()
        caller = frame.f_back if frame is not None else None
        self.kind = f"{caller.f_code.co_filename}:{caller.f_lineno} {why}" if caller is not None else why

    def at(self, where: str) -> Mistake:
        """Return the mistake of the row at `file:line`."""
        return Mistake(self.fact, self.why, self.fix, where, self.kind)


def excerpt(text: str, at: int = 0) -> str:
    """Return 80 characters of a text around a position, in quotes; in a log, up to 2,000, and the position."""
    most = shown_characters(SHOWN_CHARACTERS)
    start = max(0, min(at - most // 2, len(text) - most))
    shown = text[start : start + most]
    before, after = "…" if start else "", "…" if start + most < len(text) else ""
    place = f" at character {at + 1:,}" if most > SHOWN_CHARACTERS and 0 < at < len(text) else ""
    return f"{before}{shown!r}{after}{place}"


def shown(value: object) -> str:
    """Return a value for a message: its first 80 characters (2,000 in a log), with unprintable ones escaped."""
    most = shown_characters(SHOWN_CHARACTERS)
    # Cut first: the repr of a text of many megabytes would take as long as reading it.
    if isinstance(value, str) and len(value) > most:
        return f"{value[:most]!r}…"
    if isinstance(value, (str, int, float)) or value is None:
        return repr(value)
    return f"{type(value).__name__}"


def names(given: Iterable[object]) -> str:
    """Return the names of a row's fields for a message: the first 20, printable and on one line."""
    listed = list(given)
    some = [_printable(str(name)) for name in listed[:SHOWN_NAMES]]
    more = [f"and {len(listed) - SHOWN_NAMES} more"] if len(listed) > SHOWN_NAMES else []
    return ", ".join([*some, *more]) or "none"


def ignore_line(keys: Iterable[object]) -> str:
    """Return the line of a source that ignores keys, such as `ignore: [a, "b c"]`."""
    quoted = (key if re.fullmatch(r"[A-Za-z_][\w.-]*", key, re.ASCII) else json.dumps(key) for key in map(str, keys))
    return f"ignore: [{', '.join(quoted)}]"


def closest(given: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known name closest to a given one; None if none is close."""
    # A longer text is not a typing mistake, and slow to compare.
    if len(given) > NAME_CHARACTERS:
        return None
    near = difflib.get_close_matches(given.lower(), list(known), n=1, cutoff=cutoff)
    return near[0] if near else None


def _printable(name: str) -> str:
    cut = name if len(name) <= NAME_CHARACTERS else f"{name[:NAME_CHARACTERS]}…"
    return cut if cut.isprintable() else ascii(cut)
