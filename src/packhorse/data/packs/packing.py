"""Assign documents to packs. Only indices are made; no token is touched.

Shapes: D documents, P packs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from packhorse.data.packs.best_fit import best_fit, fewest_packs
from packhorse.data.packs.mixing import mix
from packhorse.data.packs.order import order_by

Int64 = NDArray[np.int64]

GOOD_FILL: Final = 0.97
LONGER: Final = (1.25, 1.5, 2.0, 3.0, 4.0)
LENGTH_STEP: Final = 64
# A longer pack costs memory, so it must fill at least this much better.
LEAST_GAIN: Final = 0.01


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
        """Number of packs (P)."""
        return len(self.offsets) - 1


def pack(lengths: Int64, capacity: int, how: str, seed: int) -> Packing:
    """Pack documents by the method of `data.packing`; equal arguments give an equal packing on every machine.

    Args:
        lengths: int64 [D], each from 1 to `capacity`.
        capacity: Tokens in a pack (T).
        how: `mixed`: a pack is a sample of the rows; `best_fit`: fewest packs; `in_order`: in the order of the
            documents, each pack filled until the next document does not fit; `none`: one document per pack.
        seed: Seed of the draw; only `mixed` draws.

    Raises:
        ValueError: A length is below 1 or above the capacity, or the method is unknown.
    """
    match how:
        case "mixed":
            return pack_mixed(lengths, capacity, seed)
        case "best_fit":
            return pack_lengths(lengths, capacity)
        case "in_order":
            return pack_in_order(lengths, capacity)
        case "none":
            _check(lengths, capacity)
            return Packing(np.arange(len(lengths)), np.arange(len(lengths) + 1))
    raise ValueError(f"{how} is not a packing method")


def pack_lengths(lengths: Int64, capacity: int) -> Packing:
    """Pack documents by exact best-fit decreasing: the longest first, each into the fullest pack with enough space.

    Documents of one length, and packs with equal free space, are interchangeable, so they move together: the cost grows
    with documents + distinct lengths, not with documents × packs. Equal lengths give an equal packing on every machine.

    Six documents of lengths 5 4 3 3 2 1, capacity 6, one letter per token::

        by length        opened for a    b finds no space   c opens,           e fits b exactly,
                                         in a               d fits c          f fits a exactly
        a a a a a        a a a a a .     a a a a a .        a a a a a .       a a a a a f
        b b b b                          b b b b . .        b b b b . .       b b b b e e
        c c c                                               c c c d d d       c c c d d d
        d d d
        e e                                                         order    0 5 | 1 4 | 2 3
        f                                                           offsets  0 2 4 6

    Args:
        lengths: int64 [D], each from 1 to `capacity`.
        capacity: Tokens in a pack (T).

    Raises:
        ValueError: A length is below 1 or above the capacity.
    """
    _check(lengths, capacity)
    return _by_pack(best_fit(lengths, capacity, np.zeros(0, np.int64)))


def pack_mixed(lengths: Int64, capacity: int, seed: int) -> Packing:
    """Pack documents so that a pack is a sample of the rows, not of one length (see `mixing.mix`).

    Args:
        lengths: int64 [D], each from 1 to `capacity`.
        capacity: Tokens in a pack (T).
        seed: Seed of the draw; equal lengths and seed give an equal packing on every machine.

    Raises:
        ValueError: A length is below 1 or above the capacity.
    """
    _check(lengths, capacity)
    return _by_pack(mix(lengths, capacity, seed))


def pack_in_order(lengths: Int64, capacity: int) -> Packing:
    """Pack documents in their order: a pack is closed if the next document does not fit.

    Raises:
        ValueError: A length is below 1 or above the capacity.
    """
    _check(lengths, capacity)
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    # End of a pack that begins with document d; as a memoryview, since a list of ten million numbers takes 400 MB.
    following = (np.searchsorted(ends, ends + capacity, side="right") - 1).data
    offsets = [0]
    while offsets[-1] < len(lengths):
        offsets.append(following[offsets[-1]])
    return Packing(np.arange(len(lengths)), np.array(offsets, np.int64))


def split_long(lengths: Int64, capacity: int) -> tuple[Int64, Int64]:
    """Cut each document longer than `capacity` into as few parts as possible, of nearly equal length.

    Only lengths are computed. Nothing before a part's first token can predict it, so a document cut in two has one
    label fewer if that token is supervised.

    Args:
        lengths: int64 [D], each at least 1.
        capacity: Tokens in a pack (T).

    Returns:
        int64 [D], number of parts of each document, and int64 [D'], length of each part in the documents' order.
    """
    num_parts = -(-lengths // capacity)
    part = np.arange(num_parts.sum()) - np.repeat(np.cumsum(num_parts) - num_parts, num_parts)
    shortest, num_longer = np.divmod(lengths, num_parts)
    return num_parts, np.repeat(shortest, num_parts) + (part < np.repeat(num_longer, num_parts))


def suggest_length(lengths: Int64, capacity: int) -> tuple[int, float] | None:
    """Return a T at which these lengths pack well, and its fill; None if `capacity` fills 97 % or no T is better.

    The result is the shortest of 1.25, 1.5, 2, 3 and 4 times `capacity` (in multiples of 64) that fills 97 %, else the
    fullest. Documents are only counted: a million take about 0.1 s.

    Args:
        lengths: int64 [D], each from 1 to `capacity`.
        capacity: Tokens in a pack (T).
    """
    if len(lengths) == 0:
        return None
    histogram = np.bincount(lengths)
    now = _fill(histogram, capacity)
    if now >= GOOD_FILL:
        return None
    longer = [-(-int(capacity * times) // LENGTH_STEP) * LENGTH_STEP for times in LONGER]
    tried = [(length, _fill(histogram, length)) for length in longer]
    best = next((one for one in tried if one[1] >= GOOD_FILL), max(tried, key=lambda one: one[1]))
    return best if best[1] >= now + LEAST_GAIN else None


def _check(lengths: Int64, capacity: int) -> None:
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths are from {lengths.min()} to {lengths.max()}, outside 1 to {capacity}")


def _by_pack(pack_of: Int64) -> Packing:
    """Group documents by pack, int64 [D]; those of a pack keep their order."""
    sizes = np.bincount(pack_of)
    # Mixed packing starts with the number of packs of best fit, and may leave some of them empty.
    sizes = sizes[sizes > 0]
    return Packing(order_by(pack_of), np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)]))


def _fill(histogram: Int64, capacity: int) -> float:
    num_tokens = int(histogram @ np.arange(len(histogram)))
    return num_tokens / (fewest_packs(histogram, capacity) * capacity)
