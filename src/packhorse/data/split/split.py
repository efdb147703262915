"""Shares rows out by their content: neither the order of the file nor a copy of a row changes a row's side.

Shapes: R rows, G groups of rows that stay together, K sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from packhorse.data.split.quotas import GroupClass, class_counts, share_parts
from packhorse.data.split.ranks import UInt64, mix, mixed_seed, ranks

Sides = NDArray[np.int8]
Int64 = NDArray[np.int64]
Int32 = NDArray[np.int32]

SIDE_NAMES: Final = ("train", "validation", "test")
STRATUM_ORDER: Final = 1
REPLAY: Final = 2
LARGEST_ERROR: Final = 0.01
NAMED_STRATA: Final = 5


class _Groups(NamedTuple):
    """Rows that stay together: `rows` [R] group after group, the `sizes` [G], and the `first` row [G] by content."""

    rows: Int64
    sizes: Int64
    first: Int64


def assign(keys: UInt64, groups: NDArray[np.integer], strata: Int32, shares: Sequence[float], seed: int) -> Sides:
    """Give each row a side: by content alone, whole groups, in the shares asked for within each stratum and over all.

    A group stands for its row of the smallest key: that row's stratum is the group's, and a hash of seed and that
    key is its rank. Groups of one stratum and one size stand in the order of their ranks and are cut in proportion,
    large groups first, so that small ones and single rows mend what large ones upset. Where groups are single rows,
    each side has its exact share of each stratum, rounded up or down, and over all strata the rounding evens out.

    Args:
        keys: uint64 [R, 2] hash of each row's content.
        groups: [R] label of the rows that stay together, equal rows among them.
        strata: int32 [R] code of each row's stratum; the codes must not depend on the order of the rows.
        shares: [K] share of each side; they sum to 1.
        seed: Another seed gives another sharing out.

    Returns:
        int8 [R], index into `shares`.

    Raises:
        ValueError: Keys, groups and strata differ in number, equal keys have several groups, or shares do not sum to 1.
    """
    if not len(keys) == len(groups) == len(strata):
        raise ValueError(f"{len(keys)} keys, {len(groups)} groups, {len(strata)} strata")
    parts = share_parts(shares)
    if len(keys) == 0:
        return np.zeros(0, np.int8)
    found = _groups(keys, groups, strata)
    order, classes = _ordered(found, keys, strata, seed)
    counts = _counts(classes, parts, seed)
    sides_of = np.empty(len(found.first), np.int8)
    sides_of[order] = np.repeat(np.tile(np.arange(len(parts), dtype=np.int8), len(counts)), counts.ravel())
    sides = np.empty(len(keys), np.int8)
    sides[found.rows] = np.repeat(sides_of, found.sizes)
    return sides


def replayed(keys: UInt64, num_rows: int, seed: int) -> Int64 | None:
    """Return the places, rising, of `num_rows` rows drawn by their content; None where there are fewer.

    Args:
        keys: uint64 [R, 2] hash of each row's content.
        num_rows: How many are trained on again.
        seed: Another seed draws others.
    """
    return None if num_rows > len(keys) else lowest(keys, num_rows, seed, REPLAY)


def too_small(names: Sequence[str], strata: Int32, sides: Sides, shares: Sequence[float]) -> list[str]:
    """Return sentences on strata that have no row on a side, or whose shares are off by more than a hundredth.

    Args:
        names: Name of each stratum, by its code; the name of rows that are in no stratum is empty.
        strata: int32 [R] code of each row's stratum.
        sides: int8 [R] side of each row.
        shares: [K] what was asked for.
    """
    num_sides = len(shares)
    cells = strata.astype(np.int64) * num_sides + sides
    counts = np.bincount(cells, minlength=len(names) * num_sides).reshape(-1, num_sides)
    rows = counts.sum(1)
    wanted = np.array(shares)
    bare = (counts == 0) & (wanted > 0) & (rows > 0)[:, None]
    without = np.flatnonzero(bare.any(1))
    said = [_no_row(names[at], int(rows[at]), bare[at]) for at in without[:NAMED_STRATA].tolist()]
    if len(without) > NAMED_STRATA:
        said.append(f"{len(without) - NAMED_STRATA:,} more strata have no row on some side")
    errors = np.abs(counts - rows[:, None] * wanted).max(1)
    off = (errors > LARGEST_ERROR * rows + 1e-6) & ~bare.any(1)
    # Rounding alone moves less than a row; what is more is owed to rows that had to stay together.
    few = off & (errors < 1)
    causes = ((few, "too few rows"), (off & ~few, "too many rows that must stay together"))
    for chosen, cause in causes:
        if chosen.any():
            worst = int(np.argmax(np.where(chosen, errors / np.maximum(rows, 1), -1)))
            said.append(_off(names[worst], counts[worst], int(np.count_nonzero(chosen)), cause))
    return said


def _no_row(name: str, num_rows: int, bare: NDArray[np.bool_]) -> str:
    sides = " and none in ".join(SIDE_NAMES[side] for side in np.flatnonzero(bare))
    return f"{_called(name)} {_number(num_rows, 'row')}, none in {sides}: too few to be on every side"


def _off(name: str, counts: Int64, number: int, cause: str) -> str:
    shared = ", ".join(f"{count:,} {side}" for side, count in zip(SIDE_NAMES, counts.tolist()))
    which = "" if name == "" else f"{_number(number, 'stratum')}; most of all "
    return (
        f"{cause} for shares within a hundredth: {which}{_called(name)} {_number(int(counts.sum()), 'row')} ({shared})"
    )


def _called(name: str) -> str:
    return f"stratum {name} has" if name else "data.split has"


def _number(number: int, what: str) -> str:
    plural = {"row": "rows", "stratum": "strata"}[what]
    return f"{number:,} {what if number == 1 else plural}"


def lowest(keys: UInt64, num_rows: int, seed: int, purpose: int) -> Int64:
    """Return the places, rising, of the `num_rows` rows that come first in the order of `ranks`."""
    if num_rows == 0:
        return np.zeros(0, np.int64)
    found = ranks(keys, seed, purpose)
    border = np.partition(found, num_rows - 1)[num_rows - 1]
    before = np.flatnonzero(found < border)
    # Copies of a row share a rank, and any of them will do; other rows of that rank are told apart by their keys.
    at = np.flatnonzero(found == border)
    at = at[np.argsort(keys[at, 1], kind="stable")]
    return np.sort(np.concatenate([before, at[: num_rows - len(before)]]))


def _groups(keys: UInt64, groups: NDArray[np.integer], strata: Int32) -> _Groups:
    rows = np.argsort(groups)
    ordered = groups[rows]
    starts = np.flatnonzero(np.concatenate([np.ones(1, np.bool_), ordered[1:] != ordered[:-1]]))
    del ordered
    sizes = np.diff(starts, append=len(rows))
    if len(starts) == len(rows):
        return _Groups(rows, sizes, rows)
    together = rows[np.repeat(sizes > 1, sizes)]
    first = rows[starts]
    first[sizes > 1] = _smallest(together, sizes[sizes > 1], keys, strata)
    return _Groups(rows, sizes, first)


def _smallest(rows: Int64, sizes: Int64, keys: UInt64, strata: Int32) -> Int64:
    """Return of each group the row of the smallest key, and among its copies that of the lowest stratum."""
    for values in (keys[:, 0], keys[:, 1], strata):
        if len(rows) == len(sizes):
            break
        here = values[rows]
        starts = np.cumsum(sizes) - sizes
        kept = here == np.repeat(np.minimum.reduceat(here, starts), sizes)
        rows, sizes = rows[kept], np.add.reduceat(kept, starts, dtype=np.int64)
    smallest: Int64 = rows[np.cumsum(sizes) - sizes]
    return smallest


class _Classes(NamedTuple):
    """Groups of one stratum and one size: the stratum's code, the size, how many, and 64 random bits, each [C]."""

    strata: Int32
    sizes: Int64
    numbers: Int64
    chances: UInt64


def _ordered(found: _Groups, keys: UInt64, strata: Int32, seed: int) -> tuple[Int64, _Classes]:
    """Return the groups [G] by stratum, size from large to small, and rank; and the classes in that order."""
    ranked = ranks(keys[found.first], seed)
    of_class = strata[found.first].astype(np.int64)
    largest = int(found.sizes.max())
    of_class *= largest
    of_class += largest - found.sizes
    order = np.lexsort((ranked, of_class))
    of_class, ranked = of_class[order], ranked[order]
    changes = of_class[1:] != of_class[:-1]
    ties = np.flatnonzero(~changes & (ranked[1:] == ranked[:-1]))
    if len(ties):
        order = _without_ties(order, of_class, ranked, keys[found.first[order], 1])
    starts = np.flatnonzero(np.concatenate([np.ones(1, np.bool_), changes]))
    first = order[starts]
    numbers = np.diff(starts, append=len(order))
    return order, _Classes(strata[found.first[first]], found.sizes[first], numbers, mix(ranked[starts]))


def _without_ties(order: Int64, of_class: Int64, ranked: UInt64, low: UInt64) -> Int64:
    """Put groups of one rank in the order of their keys, whose other half then decides."""
    again = np.lexsort((low, ranked, of_class))
    same = (of_class[1:] == of_class[:-1]) & (ranked[1:] == ranked[:-1]) & (low[again][1:] == low[again][:-1])
    if same.any():
        raise ValueError(f"{int(np.count_nonzero(same))} keys stand in several groups")
    return order[again]


def _counts(classes: _Classes, parts: Sequence[int], seed: int) -> Int64:
    """Return int64 [C, K], groups of each class on each side."""
    starts = np.flatnonzero(np.concatenate([np.ones(1, np.bool_), classes.strata[1:] != classes.strata[:-1]]))
    ends = np.append(starts[1:], len(classes.strata))
    # Strata of large groups first: those of small ones can still mend the shares over all.
    chances = mix(classes.strata[starts].astype(np.uint64) ^ mixed_seed(seed, STRATUM_ORDER))
    visits = np.lexsort((chances, -classes.sizes[starts]))
    columns = zip(classes.sizes.tolist(), classes.numbers.tolist(), classes.chances.tolist())
    listed = [GroupClass(*column) for column in columns]
    spans = [slice(start, end) for start, end in zip(starts.tolist(), ends.tolist())]
    counts = np.empty((len(listed), len(parts)), np.int64)
    for visit, of_stratum in zip(visits.tolist(), class_counts((listed[spans[at]] for at in visits.tolist()), parts)):
        counts[spans[visit]] = of_stratum
    return counts
