"""A row that cannot be what its format says, in words for the user."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Final

SHOWN_CHARACTERS: Final = 80
SHOWN_NAMES: Final = 20
NAME_CHARACTERS: Final = 40


class BadRowError(Exception):
    """What is wrong with a row; whoever knows its line makes a `Mistake` of it.

    Attributes:
        fact: What is so, with the value.
        why: Why it cannot go on like this.
        fix: The smallest change that mends it.
    """

    def __init__(self, fact: str, why: str, fix: str) -> None:
        super().__init__(fact)
        self.fact, self.why, self.fix = fact, why, fix


def shown(value: object) -> str:
    """Return a value as a message may show it: its first 80 characters, what is unprintable escaped."""
    # A slice first: the repr of a text of many megabytes would take as long as reading it.
    if isinstance(value, str) and len(value) > SHOWN_CHARACTERS:
        return f"{value[:SHOWN_CHARACTERS]!r}…"
    if isinstance(value, (str, int, float)) or value is None:
        return repr(value)
    return f"{type(value).__name__}"


def names(given: Iterable[object]) -> str:
    """Return the names of a row's fields, the first 20 of them, each on one line and printable."""
    listed = list(given)
    some = [_printable(str(name)) for name in listed[:SHOWN_NAMES]]
    more = [f"and {len(listed) - SHOWN_NAMES} more"] if len(listed) > SHOWN_NAMES else []
    return ", ".join([*some, *more]) or "none"


def closest(given: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known name nearest to a given one; None where none is near."""
    # Longer than any name: not a slip of the finger, and slow to compare.
    if len(given) > NAME_CHARACTERS:
        return None
    near = difflib.get_close_matches(given.lower(), list(known), n=1, cutoff=cutoff)
    return near[0] if near else None


def _printable(name: str) -> str:
    cut = name if len(name) <= NAME_CHARACTERS else f"{name[:NAME_CHARACTERS]}…"
    return cut if cut.isprintable() else ascii(cut)
