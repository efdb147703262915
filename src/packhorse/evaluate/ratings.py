"""Blind ratings of base and tuned answers by people: which row comes next, what is kept, and what follows from it."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import permutations
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from packhorse.durable import append_line, read_lines
from packhorse.evaluate.opinions import PEOPLE_SCORE, PEOPLE_WINS, PeopleResult, RaterResult
from packhorse.evaluate.stored import AnsweredRow, StoredEvaluation
from packhorse.recipe.evaluation import EvaluationSection

Kind = Literal["choice", "scores"]
Level = Literal["nominal", "ordinal", "interval"]
KINDS: Final[tuple[Kind, ...]] = ("choice", "scores")
CHOICES: Final = {"first": (1.0, 0.0), "second": (0.0, 1.0), "tie": (0.0, 0.0)}
"""Values of the answer shown first and of the other."""


class Rating(BaseModel):
    """Rating of one row by one person; one line of ratings.jsonl. A later one of the same row replaces it."""

    model_config = ConfigDict(frozen=True)

    rater: str
    kind: Kind
    row: str
    """Fingerprint of the row and both answers."""
    set: str
    key: str
    """Hash of the row's content, as in rows.parquet."""
    first: Literal["base", "tuned"]
    """Model whose answer was shown first."""
    base: float
    """Score, 1 to 5; of a choice 1 if the answer was preferred, else 0."""
    tuned: float
    at: str
    """Time, UTC."""


@dataclass(frozen=True)
class BlindRow:
    """A row as a rater sees it: two answers in random order, and no name of a model."""

    row: AnsweredRow
    first: Literal["base", "tuned"]

    @property
    def answers(self) -> tuple[str, str]:
        """Return the answer that is shown first, and the other."""
        pair = (self.row.base, self.row.tuned)
        return pair if self.first == "base" else pair[::-1]


class RatingSession:
    """Ratings of one person. All raters get the same order of rows, so that few ratings already share rows."""

    def __init__(self, rows: Sequence[AnsweredRow], file: Path, rater: str, kind: Kind) -> None:
        """Read the ratings so far.

        Args:
            rows: Answered rows, ordered by a hash of their content; those with equal answers are not shown.
            file: ratings.jsonl of the run.
            rater: Name of the person.
            kind: `choice` or `scores`.
        """
        self.rater, self.kind, self._file = rater, kind, file
        self._rows = {row.fingerprint: row for row in rows if row.base != row.tuned}
        known = (rating for rating in read_lines(file, Rating) if (rating.rater, rating.kind) == (rater, kind))
        self._rated = [name for name in dict.fromkeys(rating.row for rating in known) if name in self._rows]
        self._skipped: list[str] = []

    @property
    def num_rows(self) -> int:
        """Rows that can be rated."""
        return len(self._rows)

    @property
    def num_rated(self) -> int:
        """Rows that this person has rated."""
        return len(self._rated)

    def next(self) -> BlindRow | None:
        """Return the first row without a rating; skipped ones come last; None if all are rated."""
        done = {*self._rated, *self._skipped}
        waiting = [name for name in self._rows if name not in done] or self._skipped
        return self.blind(waiting[0]) if waiting else None

    def blind(self, name: str) -> BlindRow | None:
        """Return a row by its fingerprint; None if there is no such row."""
        if name not in self._rows:
            return None
        digest = hashlib.sha256(f"{self.rater}\n{name}".encode()).digest()
        return BlindRow(self._rows[name], "base" if digest[0] % 2 else "tuned")

    def rate(self, shown: BlindRow, first: float, second: float) -> None:
        """Keep a rating; it is on disk when this returns.

        Args:
            shown: The row.
            first: Value of the answer that was shown first.
            second: Value of the other.
        """
        row = shown.row
        base, tuned = (first, second) if shown.first == "base" else (second, first)
        rating = Rating(
            rater=self.rater,
            kind=self.kind,
            row=row.fingerprint,
            set=row.set,
            key=row.key,
            first=shown.first,
            base=base,
            tuned=tuned,
            at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        append_line(self._file, rating)
        self._skipped = [name for name in self._skipped if name != row.fingerprint]
        self._rated = [*(name for name in self._rated if name != row.fingerprint), row.fingerprint]

    def skip(self, shown: BlindRow) -> None:
        """Show a row again after all others."""
        name = shown.row.fingerprint
        self._skipped = [*(each for each in self._skipped if each != name), name]

    def last(self) -> BlindRow | None:
        """Return the row that was rated last, to rate it again."""
        return self.blind(self._rated[-1]) if self._rated else None


def with_ratings(stored: StoredEvaluation, file: Path, settings: EvaluationSection) -> StoredEvaluation:
    """Return the evaluation with the ratings of people: one metric per kind, and the agreement of raters."""
    newest = {(each.rater, each.kind, each.row): each for each in read_lines(file, Rating)}
    stored, results = stored.without(PEOPLE_WINS, PEOPLE_SCORE), []
    rows = {row.fingerprint: row for row in stored.rows()}
    for kind, metric in zip(KINDS, (PEOPLE_WINS, PEOPLE_SCORE), strict=True):
        given = [rating for rating in newest.values() if rating.kind == kind]
        valid = [rating for rating in given if rating.row in rows]
        if not valid:
            continue
        by_row = _by_row(valid)
        opinions = {
            rows[name].line: (_mean(each.base for each in ratings), _mean(each.tuned for each in ratings))
            for name, ratings in by_row.items()
        }
        stored = stored.with_opinions(metric, opinions, settings)
        results.append(_result(kind, by_row, num_outdated=len(given) - len(valid)))
    return stored.with_notes(people=tuple(results))


def _by_row(ratings: Iterable[Rating]) -> dict[str, list[Rating]]:
    by_row: defaultdict[str, list[Rating]] = defaultdict(list)
    for rating in ratings:
        by_row[rating.row].append(rating)
    return by_row


def _mean(values: Iterable[float]) -> float:
    given = list(values)
    return math.fsum(given) / len(given)


def _result(kind: Kind, by_row: dict[str, list[Rating]], num_outdated: int) -> PeopleResult:
    ratings = [rating for of_row in by_row.values() for rating in of_row]
    if kind == "choice":
        alpha = krippendorff_alpha(
            [[each.tuned - each.base for each in of_row] for of_row in by_row.values()], "nominal"
        )
    else:
        sides = [[getattr(each, side) for each in of_row] for of_row in by_row.values() for side in ("base", "tuned")]
        alpha = krippendorff_alpha(sides, "ordinal")
    return PeopleResult(
        kind=kind,
        raters=tuple(
            _rater(name, [each for each in ratings if each.rater == name])
            for name in sorted({each.rater for each in ratings})
        ),
        num_rows=len(by_row),
        num_shared=sum(len(of_row) > 1 for of_row in by_row.values()),
        num_outdated=num_outdated,
        alpha=None if math.isnan(alpha) else alpha,
    )


def _rater(name: str, ratings: Sequence[Rating]) -> RaterResult:
    preferred = ["tuned" if each.tuned > each.base else "base" for each in ratings if each.tuned != each.base]
    shown_first = [each.first for each in ratings if each.tuned != each.base]
    num_first = sum(one == first for one, first in zip(preferred, shown_first, strict=True))
    return RaterResult(rater=name, num_rated=len(ratings), num_first=num_first, num_named=len(preferred))


def krippendorff_alpha(units: Sequence[Sequence[float]], level: Level) -> float:
    """Return Krippendorff's alpha: 1 for full agreement, 0 for that of chance.

    Source: Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", sections D and E.

    Args:
        units: Values that the raters gave to each unit; a rater who skipped a unit has none there.
        level: How far two values are apart: `nominal` equal or not, `ordinal` by ranks, `interval` by their difference.

    Returns:
        Alpha; NaN if no unit has two values, or if all values are equal.
    """
    pairable = [unit for unit in units if len(unit) > 1]
    values = sorted({value for unit in pairable for value in unit})
    position = {value: index for index, value in enumerate(values)}
    coincidences = np.zeros((len(values), len(values)))  # [V, V]
    for unit in pairable:
        for first, second in permutations(unit, 2):
            coincidences[position[first], position[second]] += 1 / (len(unit) - 1)
    counts = coincidences.sum(0)  # [V]
    distances = _distances(np.array(values), counts, level)
    expected = float(counts @ distances @ counts)
    return 1 - (counts.sum() - 1) * float((coincidences * distances).sum()) / expected if expected else math.nan


def _distances(values: NDArray[np.float64], counts: NDArray[np.float64], level: Level) -> NDArray[np.float64]:
    """Return the squared distance of each pair of values, [V, V]."""
    if level == "nominal":
        return 1 - np.eye(len(values))
    # Between two ranks are all values in between, and half of those at both ends.
    at = np.cumsum(counts) - counts / 2 if level == "ordinal" else values
    return np.asarray((at[:, None] - at[None, :]) ** 2, np.float64)
