"""Which rows say the same, or nearly: groups over all rows, found from their keys and signatures alone.

Candidates are found by locality-sensitive hashing: a signature is cut into bands, and rows equal in one of them are
compared (Leskovec, Rajaraman & Ullman, Mining of Massive Datasets, ch. 3.4). Everything happens in the order of the
keys, so shuffling the files changes nothing.

Shapes: R rows, D distinct texts in the order of their keys, P slots of a signature.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from packhorse.data.checks.keys import Keys, distinct_rows
from packhorse.data.mapped import release

Labels = NDArray[np.int64]
Signatures = NDArray[np.uint32]

RECALL: Final = 0.99
RECALL_ABOVE: Final = 0.05
"""Of pairs so far above the threshold, the share `RECALL` and more must become candidates."""
NEIGHBOURS: Final = 8
PAIRS_AT_ONCE: Final = 1 << 15
ROWS_AT_ONCE: Final = 1 << 16
SMALLEST_FRAME: Final = 20
LARGEST_GROUP: Final = 1000
FRAME_SHARE: Final = 0.05

_FOLD: Final = np.uint64(0x9E3779B185EBCA87)


@dataclass(frozen=True, eq=False)
class NearGroups:
    """Rows that nearly say the same.

    Attributes:
        labels: int64 [R], the lowest row number of the row's group; of a row without a near copy, its own.
        frames: Rows of each group that was taken for one frame filled in differently, largest first; only exact copies
            have a label in common there.
        frame_rows: Lowest row number of each of these.
    """

    labels: Labels
    frames: tuple[int, ...]
    frame_rows: tuple[int, ...]


def equal_groups(keys: Keys) -> Labels:
    """Return int64 [R]: the lowest row number with the same key."""
    by_key, is_first = distinct_rows(keys)
    labels = np.empty(len(keys), np.int64)
    # Rows of one key stand in their own order, so the first is the lowest.
    labels[by_key] = by_key[is_first][np.cumsum(is_first) - 1]
    return labels


def near_groups(signatures: Signatures, keys: Keys, threshold: float, answers: Signatures | None = None) -> NearGroups:
    """Group rows of which one leads to the other over pairs whose estimated Jaccard similarity is ≥ `threshold`.

    Rows of equal keys always share a group. Of a bucket with many rows each is compared with the next 8 by key: two
    alike rows are missed if in no band they stand that near, and no other row leads from one to the other.

    A group of more than 20 texts that are also more than 5 % of all, or more than 1,000, is taken for a frame: one long
    fixed instruction around a short part that varies. Those rows are alike and are no copies, so only its exact copies
    are grouped.

    For the side of a split, whole rows are compared: who has seen the long passage with one question knows much of the
    row with the next. For dropping, give `answers` too: then both must be alike, and such rows are no copies.

    Args:
        signatures: uint32 [R, P] of the rows, may be a memory map: it is read in order, and by pairs of candidates.
        keys: uint64 [R, 2] content of each row.
        threshold: Least share of common shingles.
        answers: uint32 [R, P] of the rows' answers.
    """
    by_key, is_first = distinct_rows(keys)
    return _told(_linked(signatures, answers, by_key[is_first], threshold), by_key, is_first)


def band_slots(threshold: float, num_slots: int) -> int:
    """Return the slots of a band: as many as still make candidates of 99 % of the pairs .05 above the threshold.

    With r slots a band there are b = P ÷ r bands, and a pair of similarity s is equal in one with 1 − (1 − sʳ)ᵇ.
    """
    alike = min(1.0, threshold + RECALL_ABOVE)
    enough = [slots for slots in range(1, num_slots + 1) if 1 - (1 - alike**slots) ** (num_slots // slots) >= RECALL]
    return max(enough, default=1)


def _linked(signatures: Signatures, answers: Signatures | None, distinct: Labels, threshold: float) -> Labels:
    """Return int64 [D]: the lowest number of each text's group, texts numbered as in `distinct`, their rows."""
    parents = np.arange(len(distinct))
    num_slots = signatures.shape[1]
    slots = band_slots(threshold, num_slots)
    for start in range(0, num_slots - slots + 1, slots):
        buckets = _crowded_buckets(_band_hashes(signatures, slice(start, start + slots))[distinct])
        for first, second in _candidates(*buckets):
            apart = _roots(parents, first) != _roots(parents, second)
            one, other = first[apart], second[apart]
            alike = _alike(signatures, distinct[one], distinct[other], threshold)
            if answers is not None:
                alike &= _alike(answers, distinct[one], distinct[other], threshold)
            _join(parents, one[alike], other[alike])
    return _roots(parents, np.arange(len(parents)))


def _alike(signatures: Signatures, first: Labels, second: Labels, threshold: float) -> NDArray[np.bool_]:
    """Return bool [pairs]: whether the share of equal slots, which estimates Jaccard, reaches the threshold."""
    least_equal = math.ceil(threshold * signatures.shape[1] - 1e-9)
    num_equal = (signatures[first] == signatures[second]).sum(axis=1)
    # Pairs lie all over the file: a few of each page's rows would keep the whole of it in memory.
    release(signatures)
    return np.asarray(num_equal >= least_equal)


def _band_hashes(signatures: Signatures, band: slice) -> NDArray[np.uint64]:
    """Return uint64 [R]: a hash of one band, read in the order of the file."""
    hashes = np.zeros(len(signatures), np.uint64)
    for start in range(0, len(signatures), ROWS_AT_ONCE):
        part = hashes[start : start + ROWS_AT_ONCE]
        for slot in signatures[start : start + ROWS_AT_ONCE, band].T:
            part ^= slot
            part *= _FOLD
            part ^= part >> np.uint64(29)
        release(signatures)
    return hashes


def _crowded_buckets(hashes: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], Labels]:
    """Return bucket and number of each text that shares its bucket, bucket by bucket, in the order of the numbers.

    The number takes the low bits of its hash, so one sort of plain integers does it all. What the hash loses makes more
    candidates, which are compared anyway.
    """
    bits = np.uint64(max(len(hashes) - 1, 1).bit_length())
    tagged = hashes >> bits
    tagged <<= bits
    tagged |= np.arange(len(hashes), dtype=np.uint64)
    tagged.sort()
    buckets = tagged >> bits
    same = buckets[1:] == buckets[:-1]
    crowded = np.zeros(len(hashes), np.bool_)
    crowded[1:] |= same
    crowded[:-1] |= same
    numbers = tagged[crowded] & ((np.uint64(1) << bits) - np.uint64(1))
    return buckets[crowded], numbers.view(np.int64)


def _candidates(buckets: NDArray[np.uint64], numbers: Labels) -> Iterator[tuple[Labels, Labels]]:
    """Yield blocks of pairs of one bucket: each text with the next by number, so at most eight pairs a text."""
    for start in range(0, len(buckets), PAIRS_AT_ONCE):
        here = slice(start, start + PAIRS_AT_ONCE)
        for step in range(1, NEIGHBOURS + 1):
            after = buckets[start + step : start + step + PAIRS_AT_ONCE]
            same = np.flatnonzero(buckets[here][: len(after)] == after) + start
            yield numbers[same], numbers[same + step]


def _join(parents: Labels, first: Labels, second: Labels) -> None:
    """Put the sets of each pair together: higher roots hang from lower ones, all pairs at once, until all are one."""
    while True:
        first, second = _roots(parents, first), _roots(parents, second)
        apart = first != second
        if not apart.any():
            return
        first, second = first[apart], second[apart]
        np.minimum.at(parents, np.maximum(first, second), np.minimum(first, second))


def _roots(parents: Labels, numbers: Labels) -> Labels:
    """Return the lowest number of each one's set, halving the paths on the way."""
    while True:
        above = parents[numbers]
        beyond = parents[above]
        if np.array_equal(above, beyond):
            return above
        parents[numbers] = beyond


def _told(groups: Labels, by_key: Labels, is_first: NDArray[np.bool_]) -> NearGroups:
    """Take frames apart, and go from groups of distinct texts, int64 [D], to labels of rows."""
    largest = max(SMALLEST_FRAME, min(LARGEST_GROUP, FRAME_SHARE * len(groups)))
    is_frame = np.bincount(groups, minlength=len(groups)) > largest
    frames = np.flatnonzero(is_frame)
    sizes: list[tuple[int, int]] = []
    if len(frames):
        of_rows = groups[np.cumsum(is_first) - 1]
        lowest, num_rows = _lowest(of_rows, by_key)[frames], np.bincount(of_rows)[frames]
        sizes = sorted(zip(num_rows.tolist(), lowest.tolist()), key=lambda frame: (-frame[0], frame[1]))
        groups = np.where(is_frame[groups], np.arange(len(groups)), groups)
    of_rows = groups[np.cumsum(is_first) - 1]
    labels = np.empty(len(by_key), np.int64)
    labels[by_key] = _lowest(of_rows, by_key)[of_rows]
    return NearGroups(labels, tuple(num for num, _ in sizes), tuple(row for _, row in sizes))


def _lowest(groups: Labels, rows: Labels) -> Labels:
    """Return the lowest row of each group; `groups` are below the number of rows."""
    lowest = np.full(len(rows), len(rows), np.int64)
    np.minimum.at(lowest, groups, rows)
    return lowest
