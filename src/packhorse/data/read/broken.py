"""Words for rows that cannot be read: where, why, and how the row begins."""

from __future__ import annotations

import json
from typing import Final

from packhorse.errors import Mistake

SHOWN_CHARACTERS: Final = 80
WHOLE_ROW: Final = "every row is either trained on or accounted for, so none is skipped."


def shown(text: str) -> str:
    """Return the first 80 characters of a row; what a terminal cannot print is written as an escape."""
    # A broken row may be a whole file: only its beginning is copied.
    begin = text[: 4 * SHOWN_CHARACTERS].strip()[:SHOWN_CHARACTERS]
    if begin.isprintable():
        return begin
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in begin)


def broken_row(where: str, fact: str, error: Exception, text: str) -> Mistake:
    """Return the mistake of a row that is not in the form that its file has."""
    return Mistake(f"{fact}: {reason(error)}; it begins {shown(text)}", WHOLE_ROW, "mend or remove the line.", where)


def reason(error: Exception) -> str:
    """Return what an error of a parser says, in words that need no Python."""
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.object[error.start]:#04x} at column {error.start + 1} ({error.reason})"
    if isinstance(error, ValueError) and "integer string conversion" in str(error):
        return "an integer of more than 4300 digits"
    return shown(str(error)) or type(error).__name__
