"""Which rows of each source are used: a number of them, or shares of all, drawn by their content.

Shapes: R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Final

import numpy as np
from numpy.typing import NDArray

from packhorse.data.resolve import source_name
from packhorse.data.split.ranks import UInt64
from packhorse.data.split.split import lowest
from packhorse.errors import Mistake, UserError
from packhorse.recipe.schema import Source

DRAW: Final = 3


def draw(
    keys: UInt64, source_of_row: NDArray[np.integer], sources: Sequence[Source], seed: int = 0
) -> NDArray[np.bool_]:
    """Draw rows from each source, the same ones whatever the order of the file.

    `rows: N` takes N. Of sources with a `weight`, as many rows are taken as their proportions allow without one row
    taken twice: the source that is shortest for its weight gives all its rows. A source with neither gives all.
    Copies of a row count as rows.

    Args:
        keys: uint64 [R, 2] hash of each row's content.
        source_of_row: [R] index into `sources`.
        sources: As the recipe has them.
        seed: Another seed draws others.

    Returns:
        bool [R], the rows that are used.

    Raises:
        UserError: A source has fewer rows than its `rows`, or a weight that gives it none.
    """
    available = np.bincount(source_of_row, minlength=len(sources)).tolist()
    wanted = _wanted(sources, available)
    used = np.ones(len(keys), np.bool_)
    for number, (num_rows, there) in enumerate(zip(wanted, available)):
        if num_rows < there:
            rows = np.flatnonzero(source_of_row == number)
            used[rows] = False
            used[rows[lowest(keys[rows], num_rows, seed, DRAW)]] = True
    return used


def _wanted(sources: Sequence[Source], available: Sequence[int]) -> list[int]:
    short = [
        Mistake(
            f"rows is {source.rows:,} for {source_name(source)}, which has {there:,} rows that can be used.",
            "no row is taken twice.",
            f"set rows to {there:,} or less, or remove it to use all.",
        )
        for source, there in zip(sources, available)
        if source.rows is not None and source.rows > there
    ]
    if short:
        raise UserError.of(short)
    wanted = [there if source.rows is None else source.rows for source, there in zip(sources, available)]
    weighed = {number: _exact(source.weight) for number, source in enumerate(sources) if source.weight is not None}
    if not weighed:
        return wanted
    unit = min(available[number] / weight for number, weight in weighed.items())
    # An empty source first: it is why the others get none.
    for number, weight in sorted(weighed.items(), key=lambda one: available[one[0]]):
        wanted[number] = round(unit * weight)
        if wanted[number] == 0:
            raise _none_drawn(sources[number], available[number])
    return wanted


def _exact(weight: float) -> Fraction:
    """The number as it was written: 0.3, not the double next to it."""
    return Fraction(str(weight))


def _none_drawn(source: Source, available: int) -> UserError:
    return UserError(
        f"weight {source.weight:g} of {source_name(source)}, which has {available:,} rows, gives 0 of them.",
        "weights are shares of the rows used, and no row is taken twice, so the smallest source limits the others.",
        "raise this weight, take the source out, or give rows instead of weights.",
    )
