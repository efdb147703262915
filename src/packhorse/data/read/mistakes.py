"""Collects what is wrong with rows, so that one look mends many."""

from __future__ import annotations

from collections import Counter
from typing import Final

from packhorse.errors import Mistake, UserError

MOST_SHOWN: Final = 20
MOST_RECORDED: Final = 10_000


class RowMistakes:
    """Mistakes of one source: the first 20 of a kind are shown, the first 10,000 rows recorded, all counted.

    A row has one mistake: whoever finds it leaves the row out.
    """

    def __init__(self, origin: str) -> None:
        self._origin = origin
        self._shown: list[Mistake] = []
        self._kinds: Counter[str] = Counter()
        self.recorded: list[Mistake] = []

    @property
    def num_rows(self) -> int:
        """Rows with a mistake."""
        return self._kinds.total()

    def add(self, mistake: Mistake) -> None:
        """Count a mistake, and keep it if it is one of the first of its kind, which its reason tells."""
        kind = f"{mistake.why} {mistake.fix}"
        self._kinds[kind] += 1
        if self._kinds[kind] <= MOST_SHOWN:
            self._shown.append(mistake)
        if len(self.recorded) < MOST_RECORDED:
            self.recorded.append(mistake)

    def told(self) -> list[Mistake]:
        """Return the mistakes to show; of several, the last line gives the total."""
        if self.num_rows < 2:
            return self._shown
        total = Mistake(
            f"{self._origin} has {self.num_rows} mistakes; {len(self._shown)} are shown.",
            "a row that cannot be read as it was meant would be lost or trained wrongly.",
            "mend or remove these rows, or set data.on_bad_row to drop, then run the command again.",
        )
        return [*self._shown, total]

    def raise_if_any(self) -> None:
        """Raise all of them as one error.

        Raises:
            UserError: There is at least one.
        """
        if self._shown:
            raise UserError.of(self.told())
