"""What one row of the quickstart's corpus is, and the dice that draw it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, Literal, TypeVar

Language = Literal["es", "en"]
LANGUAGES: Final[tuple[Language, ...]] = ("es", "en")

T = TypeVar("T")


@dataclass(frozen=True)
class Both(Generic[T]):
    """The Spanish and the English wording of one thing."""

    es: T
    en: T

    def __getitem__(self, language: Language) -> T:
        """Return the wording in one language."""
        return self.es if language == "es" else self.en


@dataclass(frozen=True)
class Task:
    """One question with its only right answer; `text` is what the instruction works on, or empty."""

    instruction: str
    text: str
    answer: str
    system: str | None = None

    @property
    def prompt(self) -> str:
        """The user's turn: the instruction, then the text it works on after an empty line."""
        return f"{self.instruction}\n\n{self.text}" if self.text else self.instruction


class Dice:
    """Draws that are the same on every Python version.

    Only `random.Random.random` is guaranteed to keep its sequence between Python versions; `choice`,
    `shuffle` and `sample` are not (https://docs.python.org/3/library/random.html#notes-on-reproducibility).
    """

    def __init__(self, seed: int) -> None:
        """Seed the draws."""
        self._random = random.Random(seed)

    def below(self, limit: int) -> int:
        """Return an integer from 0 to `limit` - 1."""
        return int(self._random.random() * limit)

    def between(self, low: int, high: int) -> int:
        """Return an integer from `low` to `high`, both included."""
        return low + self.below(high - low + 1)

    def pick(self, items: Sequence[T]) -> T:
        """Return one of the items."""
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """Return the items in a drawn order (Fisher-Yates)."""
        order = list(items)
        for last in range(len(order) - 1, 0, -1):
            other = self.below(last + 1)
            order[last], order[other] = order[other], order[last]
        return order


Draw = Callable[[Language, Dice], Task]


def upper_first(sentence: str) -> str:
    """Capitalise the first letter, which in Spanish may stand behind an inverted question mark."""
    at = 1 if sentence.startswith("¿") else 0
    return sentence[:at] + sentence[at : at + 1].upper() + sentence[at + 1 :]
