"""Which documents share a pack: best-fit decreasing over all documents at once, on the histogram of their lengths."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Packing:
    """Documents in pack order; pack p holds `order[offsets[p]:offsets[p + 1]]`.

    Attributes:
        order: int64 [D], each document once.
        offsets: int64 [P + 1].
    """

    order: Int64
    offsets: Int64

    @property
    def num_packs(self) -> int:
        """P."""
        return len(self.offsets) - 1


def pack_lengths(lengths: Int64, capacity: int) -> Packing:
    """Pack documents of the given lengths into packs of at most `capacity` tokens.

    Exact best-fit decreasing: the longest document first, each into the fullest pack that still has room.
    Documents of one length, and packs of one remaining room, are interchangeable, so they move together:
    the cost grows with documents + distinct lengths, not with documents × packs. Only indices are made.

    Six documents of lengths 5 4 3 3 2 1, capacity 6, a letter for each token::

        by length        opened for a    b finds no room    c opens,          e fits b exactly,
                                         in a               d fits c          f fits a exactly
        a a a a a        a a a a a .     a a a a a .        a a a a a .       a a a a a f
        b b b b                          b b b b . .        b b b b . .       b b b b e e
        c c c                                               c c c d d d       c c c d d d
        d d d
        e e                                                         order    0 5 | 1 4 | 2 3
        f                                                           offsets  0 2 4 6

    Args:
        lengths: int [D], each from 1 to `capacity`.
        capacity: Tokens in a pack (T).

    Returns:
        Equal lengths give an equal packing, on every machine.

    Raises:
        ValueError: A length is below 1 or above the capacity.
    """
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths run from {lengths.min()} to {lengths.max()}, outside 1 to {capacity}")
    by_length = _longest_first(lengths, capacity)
    histogram = np.bincount(lengths, minlength=capacity + 1)
    pack_of, slot_of, sizes = _fill(histogram, capacity, len(lengths))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    order = np.empty(len(lengths), np.int64)
    order[offsets[pack_of] + slot_of] = by_length
    return Packing(order, offsets)


def _longest_first(lengths: Int64, capacity: int) -> Int64:
    # numpy sorts 16-bit keys by counting, which is ten times faster than comparing.
    keys = (capacity - lengths).astype(np.uint16 if capacity < 65536 else np.uint32)
    return np.argsort(keys, kind="stable")


def _fill(histogram: Int64, capacity: int, num_documents: int) -> tuple[Int64, Int64, Int64]:
    """Return pack and slot of each document in order of falling length, and each pack's number of documents."""
    pack_of = np.empty(num_documents, np.int64)
    slot_of = np.empty(num_documents, np.int64)
    sizes = np.zeros(num_documents, np.int64)
    rooms = _Rooms()
    num_packs = 0
    start = 0
    for length in np.flatnonzero(histogram)[::-1].tolist():
        left = int(histogram[length])
        while left:
            room = rooms.tightest(length)
            if room is None:
                room, each = capacity, capacity // length
                opened = -(-left // each)
                packs = np.arange(num_packs, num_packs + opened)
                num_packs += opened
            else:
                each = room // length
                packs = rooms.take(room, -(-left // each))
            placed = min(left, each * len(packs))
            _place(packs, each, placed, start, (pack_of, slot_of, sizes))
            full, rest = divmod(placed, each)
            rooms.put(room - each * length, packs[:full])
            rooms.put(room - rest * length, packs[full:])
            start += placed
            left -= placed
    return pack_of, slot_of, sizes[:num_packs]


def _place(packs: Int64, each: int, placed: int, start: int, into: tuple[Int64, Int64, Int64]) -> None:
    pack_of, slot_of, sizes = into
    here = slice(start, start + placed)
    if each == 1:
        pack_of[here] = packs
        slot_of[here] = sizes[packs]
        sizes[packs] += 1
        return
    pack_of[here] = np.repeat(packs, each)[:placed]
    slot_of[here] = (sizes[packs][:, None] + np.arange(each)).ravel()[:placed]
    full, rest = divmod(placed, each)
    sizes[packs[:full]] += each
    sizes[packs[full:]] += rest


class _Rooms:
    """Packs by the room that they have left."""

    def __init__(self) -> None:
        self._packs: dict[int, list[Int64]] = {}
        self._sorted: list[int] = []

    def tightest(self, length: int) -> int | None:
        """Return the smallest room of at least `length`."""
        at = bisect_left(self._sorted, length)
        return self._sorted[at] if at < len(self._sorted) else None

    def put(self, room: int, packs: Int64) -> None:
        """Add packs that have `room` left; full packs are forgotten."""
        if room == 0 or len(packs) == 0:
            return
        if room not in self._packs:
            insort(self._sorted, room)
            self._packs[room] = []
        self._packs[room].append(packs)

    def take(self, room: int, most: int) -> Int64:
        """Remove and return packs of this room, all or the `most` oldest."""
        held = self._packs[room]
        packs = held[0] if len(held) == 1 else np.concatenate(held)
        if len(packs) > most:
            self._packs[room] = [packs[most:]]
            return packs[:most]
        del self._packs[room]
        self._sorted.pop(bisect_left(self._sorted, room))
        return packs
