"""Divide rows between the sides by their content: neither the order of the file nor copies change a row's side.

Changing any result here would move rows between training and test of data prepared before.

Shapes: R rows, G groups of rows that stay together, K sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from packhorse.data.split.quotas import GroupClass, class_counts, share_parts

Sides = NDArray[np.int8]
Int64 = NDArray[np.int64]
Int32 = NDArray[np.int32]
UInt64 = NDArray[np.uint64]

MASK: Final = 2**64 - 1

SIDE_NAMES: Final = ("train", "validation", "test")
STRATUM_ORDER: Final = 1
REPLAY: Final = 2
LARGEST_ERROR: Final = 0.01
NAMED_STRATA: Final = 5


class _Groups(NamedTuple):
    """Groups of rows that stay together: `rows` [R] by group, `sizes` [G], and the `first` row [G] by content."""

    rows: Int64
    sizes: Int64
    first: Int64


def assign(keys: UInt64, groups: NDArray[np.integer], strata: Int32, shares: Sequence[float], seed: int) -> Sides:
    """Assign each row to a side by its content: whole groups, with the given shares in each stratum and over all.

    A group is represented by its row with the smallest key: that row's stratum is the group's, and a hash of the seed
    and that key is its rank. Groups of one stratum and one size are ordered by rank and cut in proportion, large groups
    first, so that small ones and single rows correct the errors of large ones. If all groups are single rows, each side
    gets its exact share of each stratum, rounded up or down, and the rounding errors cancel out over the strata.

    Args:
        keys: uint64 [R, 2] hash of each row's content.
        groups: [R] label of the rows that stay together, equal rows among them.
        strata: int32 [R] code of each row's stratum; the codes must not depend on the order of the rows.
        shares: [K] share of each side; they sum to 1.
        seed: Seed of the division.

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
    grouped = _groups(keys, groups, strata)
    order, classes = _ordered(grouped, keys, strata, seed)
    counts = _counts(classes, parts, seed)
    sides_of = np.empty(len(grouped.first), np.int8)
    sides_of[order] = np.repeat(np.tile(np.arange(len(parts), dtype=np.int8), len(counts)), counts.ravel())
    sides = np.empty(len(keys), np.int8)
    sides[grouped.rows] = np.repeat(sides_of, grouped.sizes)
    return sides


def replayed(keys: UInt64, num_rows: int, seed: int) -> Int64 | None:
    """Return the indices, rising, of `num_rows` rows drawn by their content with a seed; None if there are fewer.

    Args:
        keys: uint64 [R, 2] hash of each row's content.
        num_rows: Number of rows to train on again.
        seed: Seed of the draw.
    """
    return None if num_rows > len(keys) else lowest(keys, num_rows, seed, REPLAY)


def too_small(names: Sequence[str], strata: Int32, sides: Sides, shares: Sequence[float]) -> list[str]:
    """Return sentences about strata without rows on a side, or with shares more than 0.01 off.

    Args:
        names: Name of each stratum, by its code; empty for rows without a stratum.
        strata: int32 [R] code of each row's stratum.
        sides: int8 [R] side of each row.
        shares: [K] requested shares.
    """
    num_sides = len(shares)
    cells = strata.astype(np.int64) * num_sides + sides
    counts = np.bincount(cells, minlength=len(names) * num_sides).reshape(-1, num_sides)
    rows = counts.sum(1)
    wanted = np.array(shares)
    bare = (counts == 0) & (wanted > 0) & (rows > 0)[:, None]
    without = np.flatnonzero(bare.any(1))
    sentences = [_no_row(names[at], int(rows[at]), bare[at]) for at in without[:NAMED_STRATA].tolist()]
    if len(without) > NAMED_STRATA:
        sentences.append(f"{len(without) - NAMED_STRATA:,} more strata have no row on some side")
    errors = np.abs(counts - rows[:, None] * wanted).max(1)
    off = (errors > LARGEST_ERROR * rows + 1e-6) & ~bare.any(1)
    # Rounding alone moves less than a row; larger errors come from rows that have to stay together.
    few = off & (errors < 1)
    causes = ((few, "too few rows"), (off & ~few, "too many rows that must stay together"))
    for chosen, cause in causes:
        if chosen.any():
            worst = int(np.argmax(np.where(chosen, errors / np.maximum(rows, 1), -1)))
            sentences.append(_off(names[worst], counts[worst], int(np.count_nonzero(chosen)), cause))
    return sentences


def _no_row(name: str, num_rows: int, bare: NDArray[np.bool_]) -> str:
    sides = " and none in ".join(SIDE_NAMES[side] for side in np.flatnonzero(bare))
    return f"{_subject(name)} {_number(num_rows, 'row')}, none in {sides}: too few to be on every side"


def _off(name: str, counts: Int64, number: int, cause: str) -> str:
    division = ", ".join(f"{count:,} {side}" for side, count in zip(SIDE_NAMES, counts.tolist()))
    which = "" if name == "" else f"{_number(number, 'stratum')}; the worst: "
    rows = _number(int(counts.sum()), "row")
    return f"{cause} for shares within a hundredth: {which}{_subject(name)} {rows} ({division})"


def _subject(name: str) -> str:
    return f"stratum {name} has" if name else "data.split has"


def _number(number: int, what: str) -> str:
    plural = {"row": "rows", "stratum": "strata"}[what]
    return f"{number:,} {what if number == 1 else plural}"


def lowest(keys: UInt64, num_rows: int, seed: int, purpose: int) -> Int64:
    """Return the indices, rising, of the first `num_rows` rows in the order of `ranks`."""
    if num_rows == 0:
        return np.zeros(0, np.int64)
    rank_of = ranks(keys, seed, purpose)
    border = np.partition(rank_of, num_rows - 1)[num_rows - 1]
    before = np.flatnonzero(rank_of < border)
    # Copies of a row share a rank, so any of them will do; other rows of that rank differ in their second half.
    at = np.flatnonzero(rank_of == border)
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
    """Return the row of the smallest key in each group, and among its copies the one of the lowest stratum."""
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
    """Groups of one stratum and one size: stratum code, size, number of groups, and 64 random bits, each [C]."""

    strata: Int32
    sizes: Int64
    numbers: Int64
    chances: UInt64


def _ordered(grouped: _Groups, keys: UInt64, strata: Int32, seed: int) -> tuple[Int64, _Classes]:
    """Return the groups [G] ordered by stratum, size (largest first) and rank; and the classes in that order."""
    ranked = ranks(keys[grouped.first], seed)
    of_class = strata[grouped.first].astype(np.int64)
    largest = int(grouped.sizes.max())
    of_class *= largest
    of_class += largest - grouped.sizes
    order = np.lexsort((ranked, of_class))
    of_class, ranked = of_class[order], ranked[order]
    changes = of_class[1:] != of_class[:-1]
    ties = np.flatnonzero(~changes & (ranked[1:] == ranked[:-1]))
    if len(ties):
        order = _without_ties(order, of_class, ranked, keys[grouped.first[order], 1])
    starts = np.flatnonzero(np.concatenate([np.ones(1, np.bool_), changes]))
    first = order[starts]
    numbers = np.diff(starts, append=len(order))
    return order, _Classes(strata[grouped.first[first]], grouped.sizes[first], numbers, mix(ranked[starts]))


def _without_ties(order: Int64, of_class: Int64, ranked: UInt64, low: UInt64) -> Int64:
    """Order groups of one rank by the second half of their keys, which then decides."""
    again = np.lexsort((low, ranked, of_class))
    same = (of_class[1:] == of_class[:-1]) & (ranked[1:] == ranked[:-1]) & (low[again][1:] == low[again][:-1])
    if same.any():
        raise ValueError(f"{int(np.count_nonzero(same))} keys are in several groups")
    return order[again]


def _counts(classes: _Classes, parts: Sequence[int], seed: int) -> Int64:
    """Return int64 [C, K], the number of groups of each class on each side."""
    starts = np.flatnonzero(np.concatenate([np.ones(1, np.bool_), classes.strata[1:] != classes.strata[:-1]]))
    ends = np.append(starts[1:], len(classes.strata))
    # Strata with large groups first: those with small ones can still correct the shares over all.
    chances = mix(classes.strata[starts].astype(np.uint64) ^ mixed_seed(seed, STRATUM_ORDER))
    visits = np.lexsort((chances, -classes.sizes[starts]))
    columns = zip(classes.sizes.tolist(), classes.numbers.tolist(), classes.chances.tolist())
    listed = [GroupClass(*column) for column in columns]
    spans = [slice(start, end) for start, end in zip(starts.tolist(), ends.tolist())]
    counts = np.empty((len(listed), len(parts)), np.int64)
    for visit, of_stratum in zip(visits.tolist(), class_counts((listed[spans[at]] for at in visits.tolist()), parts)):
        counts[spans[visit]] = of_stratum
    return counts


def mix(values: UInt64) -> UInt64:
    """Return the first output of SplitMix64 for each state, uint64 of any shape: a bijection that mixes all bits.

    Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", with the constants of Vigna's
    splitmix64.c.
    """
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def mixed_seed(seed: int, purpose: int = 0) -> UInt64:
    """Return uint64 [1] from a seed of any size and sign; different purposes give independent orders."""
    return mix(mix(np.array([seed & MASK], np.uint64)) + np.uint64(purpose))


def ranks(keys: UInt64, seed: int, purpose: int = 0) -> UInt64:
    """Return uint64 [R], the sort key of each row.

    Args:
        keys: uint64 [R, 2] hash of each row's content.
        seed: Seed of the order.
        purpose: Number of the purpose of the order.

    Returns:
        uint64 [R]. Rows of equal rank have equal keys if their second halves are equal, so the second half as an
        additional sort key makes the order strict.
    """
    mixed = mix(keys[:, 1] ^ mixed_seed(seed, purpose))
    mixed ^= keys[:, 0]
    return mix(mixed)
