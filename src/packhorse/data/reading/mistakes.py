"""Collects what is wrong with rows, so that one look mends many."""

from __future__ import annotations

from collections import Counter
from typing import Final

from packhorse.errors import Mistake, UserError

MOST_SHOWN: Final = 20


class RowMistakes:
    """Mistakes of one file: the first 20 of a kind are kept, all are counted."""

    def __init__(self, origin: str) -> None:
        self._origin = origin
        self._shown: list[Mistake] = []
        self._kinds: Counter[str] = Counter()

    def add(self, mistake: Mistake) -> None:
        """Count a mistake, and keep it if it is one of the first of its kind, which its reason tells."""
        kind = f"{mistake.why} {mistake.fix}"
        self._kinds[kind] += 1
        if self._kinds[kind] <= MOST_SHOWN:
            self._shown.append(mistake)

    def told(self) -> list[Mistake]:
        """Return the mistakes to show; of several, the last line gives the total."""
        total_found = self._kinds.total()
        if total_found < 2:
            return self._shown
        total = Mistake(
            f"{self._origin} has {total_found} mistakes; {len(self._shown)} are shown.",
            "a row that cannot be read as it was meant would be lost or trained wrongly.",
            "mend or remove these rows, then run the command again.",
        )
        return [*self._shown, total]

    def raise_if_any(self) -> None:
        """Raise all of them as one error.

        Raises:
            UserError: There is at least one.
        """
        if self._shown:
            raise UserError.of(self.told())
