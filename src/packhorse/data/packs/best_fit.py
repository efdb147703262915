"""Best-fit decreasing on the histogram of lengths: equal documents, and packs with equal free space, move together.

Shapes: D documents, P packs.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from packhorse.data.packs.order import order_by

Int64 = NDArray[np.int64]


class Move(NamedTuple):
    """Documents of one length that go into packs with equal free space, `each` per pack, fewer into the last."""

    length: int
    space: int
    opens: bool
    num_packs: int
    each: int
    num_documents: int


def moves(histogram: Int64, capacity: int, spaces: dict[int, int]) -> Iterator[Move]:
    """Yield the steps of best-fit decreasing: the longest documents first, into the fullest packs with enough space.

    Args:
        histogram: int64 [capacity + 1], documents of each length.
        capacity: Tokens in a pack (T).
        spaces: Number of open packs by their free space.
    """
    counts = {space: count for space, count in spaces.items() if space}
    by_space = sorted(counts)
    for length in np.flatnonzero(histogram)[::-1].tolist():
        left = int(histogram[length])
        while left:
            at = bisect_left(by_space, length)
            opens = at == len(by_space)
            space = capacity if opens else by_space[at]
            each = space // length
            num_packs = -(-left // each)
            if not opens:
                num_packs = min(num_packs, counts[space])
                counts[space] -= num_packs
                if counts[space] == 0:
                    del counts[space], by_space[at]
            placed = min(left, each * num_packs)
            yield Move(length, space, opens, num_packs, each, placed)
            full, rest = divmod(placed, each)
            for remaining, count in ((space - each * length, full), (space - rest * length, num_packs - full)):
                if remaining and count:
                    if remaining not in counts:
                        insort(by_space, remaining)
                    counts[remaining] = counts.get(remaining, 0) + count
            left -= placed


def fewest_packs(histogram: Int64, capacity: int) -> int:
    """Return the number of packs that best-fit decreasing needs; documents are only counted."""
    return sum(move.num_packs for move in moves(histogram, capacity, {}) if move.opens)


def best_fit(lengths: Int64, capacity: int, spaces: Int64) -> Int64:
    """Place documents best-fit decreasing.

    Args:
        lengths: int64 [D], each from 1 to `capacity`.
        capacity: Tokens in a pack (T).
        spaces: int64 [P], free space in packs 0 to P - 1; new packs are numbered after them.

    Returns:
        int64 [D], pack of each document.
    """
    by_length = order_by(capacity - lengths)
    pack_of = np.empty(len(lengths), np.int64)
    waiting = _Packs(spaces)
    start, num_packs = 0, len(spaces)
    for move in moves(np.bincount(lengths, minlength=capacity + 1), capacity, waiting.counts()):
        if move.opens:
            packs = np.arange(num_packs, num_packs + move.num_packs)
            num_packs += move.num_packs
        else:
            packs = waiting.take(move.space, move.num_packs)
        here = by_length[start : start + move.num_documents]
        pack_of[here] = packs if move.each == 1 else np.repeat(packs, move.each)[: len(here)]
        start += move.num_documents
        full, rest = divmod(move.num_documents, move.each)
        waiting.put(move.space - move.each * move.length, packs[:full])
        waiting.put(move.space - rest * move.length, packs[full:])
    return pack_of


class _Packs:
    """Open packs by their free space, oldest first."""

    def __init__(self, spaces: Int64) -> None:
        self._packs: dict[int, list[Int64]] = {}
        distinct, counts = np.unique(spaces, return_counts=True)
        for space, packs in zip(distinct.tolist(), np.split(order_by(spaces), np.cumsum(counts)[:-1])):
            self.put(space, packs)

    def counts(self) -> dict[int, int]:
        """Return the number of packs by free space."""
        return {space: sum(map(len, held)) for space, held in self._packs.items()}

    def put(self, space: int, packs: Int64) -> None:
        """Add packs with `space` tokens free; full packs are dropped."""
        if space and len(packs):
            self._packs.setdefault(space, []).append(packs)

    def take(self, space: int, most: int) -> Int64:
        """Remove and return the `most` oldest packs with this free space."""
        held = self._packs.pop(space)
        packs = held[0] if len(held) == 1 else np.concatenate(held)
        self.put(space, packs[most:])
        return packs[:most]
