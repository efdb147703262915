"""Group rows with equal or similar text, over all rows, by their keys and signatures alone.

Candidates are found by locality-sensitive hashing: a signature is cut into bands, and rows equal in one of them are
compared (Leskovec, Rajaraman & Ullman, Mining of Massive Datasets, ch. 3.4). All steps follow the order of the keys, so
shuffling the files changes nothing.

Shapes: R rows, D distinct texts in the order of their keys, P slots of a signature.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from mmap import MADV_DONTNEED, mmap
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from packhorse.data.checks.keys import Keys, distinct_rows

Labels = NDArray[np.int64]
Signatures = NDArray[np.uint32]

RECALL: Final = 0.99
RECALL_ABOVE: Final = 0.05
"""Share of the pairs this far above the threshold that must become candidates, at least."""
NEIGHBOURS: Final = 8
PAIRS_AT_ONCE: Final = 1 << 15
ROWS_AT_ONCE: Final = 1 << 16
SMALLEST_FRAME: Final = 20
LARGEST_GROUP: Final = 1000
FRAME_SHARE: Final = 0.05

_FOLD: Final = np.uint64(0x9E3779B185EBCA87)


@dataclass(frozen=True, eq=False)
class NearGroups:
    """Groups of similar rows.

    Attributes:
        labels: int64 [R], lowest row number of the row's group; the row's own number if it has no near copy.
        frames: Number of rows of each group that was treated as one template with different values, largest first; in
            these groups only exact copies share a label.
        frame_rows: Lowest row number of each of these groups.
    """

    labels: Labels
    frames: tuple[int, ...]
    frame_rows: tuple[int, ...]


def largest_group(num_texts: int) -> float:
    """Return the number of texts above which a group is a template or an instruction, and not copies of one text."""
    return max(SMALLEST_FRAME, min(LARGEST_GROUP, FRAME_SHARE * num_texts))


def equal_groups(keys: Keys) -> Labels:
    """Return int64 [R], the lowest row number with the same key."""
    by_key, is_first = distinct_rows(keys)
    labels = np.empty(len(keys), np.int64)
    # Rows of one key are in their own order, so the first is the lowest.
    labels[by_key] = by_key[is_first][np.cumsum(is_first) - 1]
    return labels


def near_groups(signatures: Signatures, keys: Keys, threshold: float, answers: Signatures | None = None) -> NearGroups:
    """Group rows that are connected by pairs with an estimated Jaccard similarity of at least `threshold`.

    Rows with equal keys always share a group. In a bucket, each row is compared with the next 8 by key: two similar
    rows are missed if they are that close in no band, and no chain of other rows connects them.

    A group of more than 20 texts that are also more than 5 % of all, or more than 1,000, is treated as a template: one
    long fixed instruction around a short part that varies. Such rows are similar but not copies, so only exact copies
    in it are grouped.

    For the sides of a split, whole rows are compared: a model that has seen the long passage with one question knows
    much of the row with the next. For dropping, give `answers` too: then both must be similar, and such rows stay.

    Args:
        signatures: uint32 [R, P] of the rows; may be a memory map, which is read in order and by candidate pairs.
        keys: uint64 [R, 2] content of each row.
        threshold: Lowest share of common shingles.
        answers: uint32 [R, P] of the rows' answers.
    """
    by_key, is_first = distinct_rows(keys)
    return _row_groups(_linked(signatures, answers, by_key[is_first], threshold), by_key, is_first)


def band_slots(threshold: float, num_slots: int) -> int:
    """Return the largest number of slots per band that still finds 99 % of the pairs .05 above the threshold.

    With r slots per band there are b = P ÷ r bands, and a pair of similarity s is equal in one with 1 − (1 − sʳ)ᵇ.
    """
    alike = min(1.0, threshold + RECALL_ABOVE)
    enough = [slots for slots in range(1, num_slots + 1) if 1 - (1 - alike**slots) ** (num_slots // slots) >= RECALL]
    return max(enough, default=1)


def _linked(signatures: Signatures, answers: Signatures | None, distinct: Labels, threshold: float) -> Labels:
    """Return int64 [D], the lowest number of each text's group; texts are numbered by `distinct`, int64 [D], rows."""
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
    """Return bool [pairs]: whether the share of equal slots, an estimate of Jaccard, reaches the threshold."""
    least_equal = math.ceil(threshold * signatures.shape[1] - 1e-9)
    num_equal = (signatures[first] == signatures[second]).sum(axis=1)
    # Pairs are spread over the whole file, which would otherwise stay in memory as a whole.
    release_pages(signatures)
    return np.asarray(num_equal >= least_equal)


def _band_hashes(signatures: Signatures, band: slice) -> NDArray[np.uint64]:
    """Return uint64 [R], a hash of one band, read in the order of the file."""
    hashes = np.zeros(len(signatures), np.uint64)
    for start in range(0, len(signatures), ROWS_AT_ONCE):
        part = hashes[start : start + ROWS_AT_ONCE]
        for slot in signatures[start : start + ROWS_AT_ONCE, band].T:
            part ^= slot
            part *= _FOLD
            part ^= part >> np.uint64(29)
        release_pages(signatures)
    return hashes


def _crowded_buckets(hashes: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], Labels]:
    """Return bucket and number of each text that shares its bucket, ordered by bucket, then number.

    The number replaces the low bits of the hash, so one sort of plain integers is enough. The lost bits give more
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
    """Yield blocks of pairs in one bucket: each text with the next 8 by number."""
    for start in range(0, len(buckets), PAIRS_AT_ONCE):
        here = slice(start, start + PAIRS_AT_ONCE)
        for step in range(1, NEIGHBOURS + 1):
            after = buckets[start + step : start + step + PAIRS_AT_ONCE]
            same = np.flatnonzero(buckets[here][: len(after)] == after) + start
            yield numbers[same], numbers[same + step]


def _join(parents: Labels, first: Labels, second: Labels) -> None:
    """Join the sets of each pair: higher roots are attached to lower ones, all pairs at once, until nothing changes."""
    while True:
        first, second = _roots(parents, first), _roots(parents, second)
        apart = first != second
        if not apart.any():
            return
        first, second = first[apart], second[apart]
        np.minimum.at(parents, np.maximum(first, second), np.minimum(first, second))


def _roots(parents: Labels, numbers: Labels) -> Labels:
    """Return the lowest number of each set, and halve the paths to it (union-find)."""
    while True:
        above = parents[numbers]
        beyond = parents[above]
        if np.array_equal(above, beyond):
            return above
        parents[numbers] = beyond


def _row_groups(groups: Labels, by_key: Labels, is_first: NDArray[np.bool_]) -> NearGroups:
    """Separate the templates, and convert groups of distinct texts, int64 [D], to labels of rows."""
    is_frame = np.bincount(groups, minlength=len(groups)) > largest_group(len(groups))
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
    """Return the lowest row of each group; the labels in `groups` are below the number of rows."""
    lowest = np.full(len(rows), len(rows), np.int64)
    np.minimum.at(lowest, groups, rows)
    return lowest


def release_pages(values: NDArray[Any]) -> None:
    """Release the pages of a memory-mapped array, or a pass over it would fill the memory (madvise(2)).

    The pages are read again on the next access; an array that is not mapped is unaffected.
    """
    base: object = values
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap):
        base.madvise(MADV_DONTNEED)
