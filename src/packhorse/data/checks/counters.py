"""Bounded counters over the rows of a source: rows with a finding, values of fields, openings of prompts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from packhorse.data.checks.keys import normalised
from packhorse.data.checks.personal import masked

MOST_SAMPLES: Final = 3
SAMPLE_CHARACTERS: Final = 120
OPENING_WORDS: Final = 5
SMALLEST_OPENING: Final = 10
MOST_OPENINGS: Final = 1000
MOST_FIELDS: Final = 100
SHOWN_FIELDS: Final = 8
MOST_VALUES: Final = 50
"""A field with more values than this is not a stratum."""
CONFIDENCE: Final = re.compile(r"certainty|confidence|probability|score|similarity", re.IGNORECASE)


@dataclass(frozen=True)
class Sample:
    """A row with a finding: `file:line`, and at most 120 characters of its text, personal data masked."""

    where: str
    text: str


class RowCounter:
    """Number of rows with a finding, and the first few of them."""

    def __init__(self) -> None:
        self.count = 0
        self.samples: list[Sample] = []

    def add(self, where: str, text: str, mark: str = "") -> None:
        """Count a row; its sample includes `mark` if given."""
        self.count += 1
        if len(self.samples) < MOST_SAMPLES:
            self.samples.append(make_sample(where, text, mark))


class ValueCounter:
    """Rows of each value, until there are more than `most` values."""

    def __init__(self, most: int) -> None:
        self._counts: Counter[str] = Counter()
        self._most = most
        self._too_many = False

    def add(self, value: str) -> None:
        """Count a row with this value."""
        if not self._too_many:
            self._counts[value] += 1
            self._too_many = len(self._counts) > self._most

    def counts(self) -> dict[str, int]:
        """Return the rows of each value, most frequent first; empty if there are too many values."""
        return {} if self._too_many else dict(self._counts.most_common())


class FieldCounter:
    """Values of the fields of rows that divide a source into strata, such as a style or a label's confidence."""

    def __init__(self) -> None:
        self._values: dict[str, ValueCounter] = {}

    def add(self, fields: Mapping[str, object]) -> None:
        """Count the fields of a row."""
        for name, value in fields.items():
            if name in self._values or len(self._values) < MOST_FIELDS:
                self._values.setdefault(name, ValueCounter(MOST_VALUES)).add(_stratum(name, value))

    def strata(self, besides: str) -> dict[str, dict[str, int]]:
        """Return the rows of each value, for fields with two values or more, of at least two rows on average.

        Args:
            besides: Name of a field that is shown elsewhere.
        """
        counts = {name: values.counts() for name, values in self._values.items() if name != besides}
        few = {name: of_field for name, of_field in counts.items() if 2 <= len(of_field) <= sum(of_field.values()) / 2}
        return dict(sorted(few.items())[:SHOWN_FIELDS])


class OpeningCounter:
    """Prompts that begin with the same five words."""

    def __init__(self) -> None:
        self._rows: dict[str, RowCounter] = {}
        self._num_prompts = 0

    def add(self, prompt: str, where: str, text: str) -> None:
        """Count the prompt of a row; a row without one does not count."""
        opening = normalised(" ".join(prompt.split(None, OPENING_WORDS)[:OPENING_WORDS]))
        if not opening:
            return
        self._num_prompts += 1
        # An opening of half of the prompts is practically never first seen after this many others.
        if opening in self._rows or len(self._rows) < MOST_OPENINGS:
            self._rows.setdefault(opening, RowCounter()).add(where, text)

    def most_frequent(self) -> RowCounter:
        """Return the rows of the most frequent opening; none if they are fewer than half of the prompts, or than 10."""
        most = max(self._rows.values(), key=lambda rows: rows.count, default=RowCounter())
        return most if most.count >= max(SMALLEST_OPENING, self._num_prompts / 2) else RowCounter()


def make_sample(where: str, text: str, mark: str = "") -> Sample:
    """Return a sample of at most 120 characters on one line, personal data masked; it includes `mark` if given."""
    # Masked before it is cut: half an address would not be recognised.
    line = " ".join(masked(text).split())
    start = max(0, line.find(mark) - SAMPLE_CHARACTERS // 3) if mark else 0
    shown = line[start : start + SAMPLE_CHARACTERS]
    before, after = "…" if start else "", "…" if start + len(shown) < len(line) else ""
    return Sample(where, before + shown[len(before) : len(shown) - len(after)] + after)


def _stratum(name: str, value: object) -> str:
    """Return the value as text, or the tenth of a confidence between 0 and 1."""
    if isinstance(value, float) and 0 <= value <= 1 and CONFIDENCE.search(name):
        tenth = min(int(value * 10), 9)
        return f"{tenth / 10:.1f} to {(tenth + 1) / 10:.1f}"
    return str(value)
