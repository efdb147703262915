"""A row that cannot be trained on as it is: raised where it is found, collected where rows are rendered."""

from __future__ import annotations

from typing import Final

from packhorse.errors import Mistake

EXCERPT: Final = 80


class RowRefusedError(Exception):
    """What is wrong with a row; where it stands is known further up."""

    def __init__(self, fact: str, why: str, fix: str) -> None:
        super().__init__(fact)
        self.fact, self.why, self.fix = fact, why, fix

    def at(self, where: str) -> Mistake:
        """Return the mistake of the row that stands there."""
        return Mistake(self.fact, self.why, self.fix, where)


def excerpt(text: str, at: int = 0) -> str:
    """Return 80 characters of a row around a place, on one line and in quotes."""
    start = max(0, min(at - EXCERPT // 2, len(text) - EXCERPT))
    shown = text[start : start + EXCERPT]
    before, after = "…" if start else "", "…" if start + EXCERPT < len(text) else ""
    return f"{before}{shown!r}{after}"
