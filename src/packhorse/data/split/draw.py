"""Draw the rows of each source that are used: a number of rows, or shares of all, by their content.

Shapes: R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Final

import numpy as np
from numpy.typing import NDArray

from packhorse.data.resolve import source_name
from packhorse.data.split.split import UInt64, lowest
from packhorse.errors import Mistake, UserError
from packhorse.recipe.schema import Source

DRAW: Final = 3


def draw(
    keys: UInt64, source_of_row: NDArray[np.integer], sources: Sequence[Source], seed: int = 0
) -> NDArray[np.bool_]:
    """Draw rows from each source, independently of the order of the file.

    `rows: N` takes N rows. Sources with a `weight` get as many rows as their proportions allow without repeating one:
    the source that is shortest for its weight gives all its rows. A source with neither gives all rows. Copies of a row
    count as rows.

    Args:
        keys: uint64 [R, 2] hash of each row's content.
        source_of_row: [R] index into `sources`.
        sources: Sources as in the recipe.
        seed: Seed of the draw.

    Returns:
        bool [R], the rows that are used.

    Raises:
        UserError: A source has fewer rows than its `rows`, or a weight that gives it none.
    """
    available = np.bincount(source_of_row, minlength=len(sources)).tolist()
    wanted = _wanted(sources, available)
    used = np.ones(len(keys), np.bool_)
    for number, (num_rows, num_available) in enumerate(zip(wanted, available)):
        if num_rows < num_available:
            rows = np.flatnonzero(source_of_row == number)
            used[rows] = False
            used[rows[lowest(keys[rows], num_rows, seed, DRAW)]] = True
    return used


def _wanted(sources: Sequence[Source], available: Sequence[int]) -> list[int]:
    short = [
        Mistake(
            f"rows is {source.rows:,} for {source_name(source)}, which has {num_available:,} usable rows.",
            "no row is used twice.",
            f"set rows to {num_available:,} or less, or remove it to use all.",
        )
        for source, num_available in zip(sources, available)
        if source.rows is not None and source.rows > num_available
    ]
    if short:
        raise UserError.of(short)
    wanted = [total if source.rows is None else source.rows for source, total in zip(sources, available)]
    weighed = {number: _exact(source.weight) for number, source in enumerate(sources) if source.weight is not None}
    if not weighed:
        return wanted
    unit = min(available[number] / weight for number, weight in weighed.items())
    # An empty source first: it is the reason why the others get no rows.
    for number, weight in sorted(weighed.items(), key=lambda one: available[one[0]]):
        wanted[number] = round(unit * weight)
        if wanted[number] == 0:
            raise _none_drawn(sources[number], available[number])
    return wanted


def _exact(weight: float) -> Fraction:
    """Return the number as it was written: 0.3, not the closest double."""
    return Fraction(str(weight))


def _none_drawn(source: Source, available: int) -> UserError:
    return UserError(
        f"weight {source.weight:g} of {source_name(source)}, which has {available:,} rows, gives 0 of them.",
        "weights are shares of the rows used, and no row is used twice, so the smallest source limits the others.",
        "raise this weight, remove the source, or give rows instead of weights.",
    )
