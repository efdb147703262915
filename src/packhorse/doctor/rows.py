"""A row of the doctor's table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

EXIT_BROKEN: Final = 1
Verdict = Literal["ok", "note", "broken", "not tried"]


@dataclass(frozen=True)
class Row:
    """One thing that was looked at.

    Attributes:
        name: What.
        verdict: `broken`: training would fail, or learn nothing; `note`: it may be slow, or fail later.
        fact: What was found, with the nodes' names.
        fix: The smallest change that mends it; empty where nothing needs one.
    """

    name: str
    verdict: Verdict
    fact: str
    fix: str = ""


def first_broken(rows: Sequence[Row]) -> Row | None:
    """The row to mend first: rows stand in the order in which one depends on those above it."""
    return next((row for row in rows if row.verdict == "broken"), None)
