"""Which documents share a pack: best-fit decreasing over all documents at once, on the histogram of their lengths."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]

# Shares of the documents taken in random order, tried in turn, until the packs are nearly as few as can be.
SHARES_IN_RANDOM_ORDER: Final = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
MOST_PACKS: Final = 1.002


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
    _check(lengths, capacity)
    everything = np.arange(len(lengths))
    return _best_fit(lengths, capacity, everything, Packing(everything[:0], np.zeros(1, np.int64)))


def pack_mixed(lengths: Int64, capacity: int, seed: int) -> Packing:
    """Pack documents so that a pack is a sample of the rows, not of one length.

    Best-fit decreasing puts documents of one length side by side, and rows of one length are often of one kind: a
    step of few packs would then learn one task at a time. Here most documents are taken in random order, each pack
    filled until the next document does not fit; the rest, drawn at random too, fill what was left open, best fit
    decreasing. As many go in random order as cost at most 0.2 % more packs than best-fit decreasing alone.

    Args:
        lengths: int [D], each from 1 to `capacity`.
        capacity: Tokens in a pack (T).
        seed: Another seed gives another draw.

    Returns:
        Equal lengths and seed give an equal packing, on every machine.

    Raises:
        ValueError: A length is below 1 or above the capacity.
    """
    _check(lengths, capacity)
    # Raw draws sorted, not Generator.permutation: numpy keeps raw streams equal between its versions, and only those.
    shuffled = np.argsort(np.random.PCG64(seed).random_raw(len(lengths)), kind="stable")
    fewest = pack_lengths(lengths, capacity)
    for share in SHARES_IN_RANDOM_ORDER:
        first, rest = np.split(shuffled, [int(len(lengths) * share)])
        packing = _best_fit(lengths, capacity, rest, Packing(first, _next_fit(lengths[first], capacity)))
        if packing.num_packs <= fewest.num_packs * MOST_PACKS:
            return packing
    return fewest


def _check(lengths: Int64, capacity: int) -> None:
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths run from {lengths.min()} to {lengths.max()}, outside 1 to {capacity}")


def _next_fit(lengths: Int64, capacity: int) -> Int64:
    """Return the offsets of packs that take documents in order until the next one does not fit."""
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]).tolist()
    offsets = [0]
    while offsets[-1] < len(lengths):
        offsets.append(bisect_right(ends, ends[offsets[-1]] + capacity, offsets[-1]) - 1)
    return np.array(offsets, np.int64)


def _best_fit(lengths: Int64, capacity: int, documents: Int64, begun: Packing) -> Packing:
    """Add `documents` to the packs begun, best-fit decreasing."""
    by_length = documents[_longest_first(lengths[documents], capacity)]
    histogram = np.bincount(lengths[documents], minlength=capacity + 1)
    sizes = np.zeros(begun.num_packs + len(documents), np.int64)
    sizes[: begun.num_packs] = np.diff(begun.offsets)
    rooms = _Rooms()
    left = capacity - np.add.reduceat(lengths[begun.order], begun.offsets[:-1]) if begun.num_packs else sizes[:0]
    for room in np.unique(left).tolist():
        rooms.put(room, np.flatnonzero(left == room))
    pack_of, slot_of, num_packs = _fill(histogram, capacity, rooms, begun.num_packs, sizes)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes[:num_packs])])
    order = np.empty(len(begun.order) + len(documents), np.int64)
    packs_begun = np.repeat(np.arange(begun.num_packs), np.diff(begun.offsets))
    slots_begun = np.arange(len(begun.order)) - begun.offsets[packs_begun]
    order[offsets[packs_begun] + slots_begun] = begun.order
    order[offsets[pack_of] + slot_of] = by_length
    return Packing(order, offsets)


def _longest_first(lengths: Int64, capacity: int) -> Int64:
    # numpy sorts 16-bit keys by counting, which is ten times faster than comparing.
    keys = (capacity - lengths).astype(np.uint16 if capacity < 65536 else np.uint32)
    return np.argsort(keys, kind="stable")


def _fill(histogram: Int64, capacity: int, rooms: _Rooms, num_packs: int, sizes: Int64) -> tuple[Int64, Int64, int]:
    """Place documents in order of falling length; `sizes`, documents in each pack, grows in place.

    Returns:
        Pack and slot of each document, and the number of packs.
    """
    num_documents = int(histogram.sum())
    pack_of = np.empty(num_documents, np.int64)
    slot_of = np.empty(num_documents, np.int64)
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
    return pack_of, slot_of, num_packs


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
