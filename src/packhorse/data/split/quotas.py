"""Compute how many groups go to each side: whole numbers that keep the shares in every stratum and over all.

Rounding each stratum alone would give every odd row to the same side; so what one stratum gets too much of is deducted
from the next strata (controlled rounding, Cox 1987, JASA 82; here greedy, with the sum of errors carried along).

Shapes: C classes, groups of one stratum and one size; K sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

# Shares as whole billionths: sums are exact, and equal on every machine.
PARTS: Final = 10**9
# Multiplier and increment of Knuth's MMIX (The Art of Computer Programming 2, 3.3.4).
LCG: Final = (6364136223846793005, 1442695040888963407)
LCG_MASK: Final = 2**64 - 1


class GroupClass(NamedTuple):
    """Groups of one stratum and one size.

    Attributes:
        size: Rows in each group.
        number: Number of groups.
        chance: 64 random bits, for the groups that remain after rounding.
    """

    size: int
    number: int
    chance: int


def share_parts(shares: Sequence[float]) -> list[int]:
    """Return shares in billionths that sum to `PARTS`.

    Raises:
        ValueError: The shares do not sum to 1, or one is negative.
    """
    if abs(sum(shares) - 1) > 1e-6 or min(shares) < 0:
        raise ValueError(f"shares {tuple(shares)}, which sum to {sum(shares)}")
    parts = [round(share * PARTS) for share in shares]
    parts[parts.index(max(parts))] += PARTS - sum(parts)
    return parts


def largest_remainder(total: int, weights: Sequence[int]) -> list[int]:
    """Divide `total` by weights into whole numbers, each within 1 of its exact share (Hamilton's method)."""
    whole = sum(weights)
    counts = [total * weight // whole for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda side: -(total * weights[side] % whole))
    for side in by_remainder[: total - sum(counts)]:
        counts[side] += 1
    return counts


def class_counts(strata: Iterable[Sequence[GroupClass]], parts: Sequence[int]) -> list[list[list[int]]]:
    """Return the number of groups of each class on each side.

    Args:
        strata: Classes of each stratum, from the largest groups to the smallest.
        parts: Shares of the K sides, in billionths.

    Returns:
        [stratum][class][side].
    """
    rounding = _Rounding(parts)
    return [rounding.stratum(classes) for classes in strata]


@dataclass
class _Sides:
    """Rows of one stratum for each side, in billionths of a row: `exact` share and `placed` so far."""

    exact: list[int]
    placed: list[int]


class _Rounding:
    """Divides strata one after the other, and carries the rounding errors along."""

    def __init__(self, parts: Sequence[int]) -> None:
        self._parts = parts
        self._sides = [side for side, part in enumerate(parts) if part > 0]
        # Rows that the strata so far gave too few of, for each side.
        self._owed = [0] * len(parts)

    def stratum(self, classes: Sequence[GroupClass]) -> list[list[int]]:
        """Return [class][side] for one stratum, and carry its rounding errors along."""
        num_rows = sum(size * number for size, number, _ in classes)
        here = _Sides([num_rows * part for part in self._parts], [0] * len(self._parts))
        counts = []
        for one in classes:
            counts.append(self._groups(one, here) if one.size > 1 else self._rows(one.number, here))
            here.placed = [done + n * one.size * PARTS for done, n in zip(here.placed, counts[-1])]
        self._owed = [owed + e - p for owed, e, p in zip(self._owed, here.exact, here.placed)]
        return counts

    def _rows(self, number: int, here: _Sides) -> list[int]:
        """Place single rows so that each side ends within one row of its exact share, after the groups."""
        counts = [max(0, (exact - placed) // PARTS) for exact, placed in zip(here.exact, here.placed)]
        if sum(counts) > number:
            return largest_remainder(number, counts)
        for _ in range(number - sum(counts)):
            wanted = [e - p - n * PARTS for e, p, n in zip(here.exact, here.placed, counts)]
            below = [side for side in self._sides if wanted[side] > 0] or self._sides
            counts[max(below, key=lambda side: wanted[side] + self._owed[side])] += 1
        return counts

    def _groups(self, groups: GroupClass, here: _Sides) -> list[int]:
        """Place groups in proportion to the rows that each side still lacks; the rest by chance, where they fit."""
        size = groups.size * PARTS
        lacking = [self._lacking(side, size, here) for side in range(len(self._parts))]
        if not any(lacking):
            lacking = list(self._parts)
        whole = sum(lacking)
        counts = [groups.number * wanted // whole for wanted in lacking]
        over = [groups.number * wanted % whole for wanted in lacking]
        chance = groups.chance
        for _ in range(groups.number - sum(counts)):
            chance = (chance * LCG[0] + LCG[1]) & LCG_MASK
            # Half a row too much does not exclude a side: single rows are rounded up too.
            fits = [
                over[side] if (counts[side] + 1) * size < lacking[side] + PARTS else 0 for side in range(len(lacking))
            ]
            if any(fits):
                side = _drawn(fits, chance)
            else:
                side = max(self._sides, key=lambda side: lacking[side] - counts[side] * size)
            counts[side] += 1
            over[side] = 0
        return counts

    def _lacking(self, side: int, size: int, here: _Sides) -> int:
        # Errors of other strata may move one group, but not disturb the shares of this stratum.
        owed = min(max(self._owed[side], -size), size)
        return max(0, here.exact[side] - here.placed[side] + owed)


def _drawn(weights: Sequence[int], chance: int) -> int:
    """Return a side, drawn with a probability in proportion to its weight."""
    left = chance * sum(weights) >> 64
    for side, weight in enumerate(weights):
        left -= weight
        if left < 0:
            return side
    raise AssertionError("the weights are those that were summed")
