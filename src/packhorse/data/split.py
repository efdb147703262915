"""Shares rows out by their content: neither the order of the file nor a copy of a row changes a row's side."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Sides = NDArray[np.int8]


def assign(keys: Sequence[str], strata: Sequence[str], shares: Sequence[float], seed: int) -> Sides:
    """Give each row a side: deterministic by content, in exact shares within each stratum.

    Rows of equal key share a side. Within a stratum the distinct keys stand in the order of a hash of seed
    and key, and are cut where the shares of the stratum's rows end (largest remainder, Hamilton's method).

    Args:
        keys: [rows] hash of each row's content.
        strata: [rows] name of each row's stratum; a key seen in several belongs to the first by name.
        shares: Share of each side; they sum to 1.
        seed: Another seed gives another sharing out.

    Returns:
        int8 [rows], index into `shares`.

    Raises:
        ValueError: Keys and strata differ in number, or shares do not sum to 1.
    """
    if len(keys) != len(strata) or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"{len(keys)} keys, {len(strata)} strata, shares that sum to {sum(shares)}")
    copies: dict[str, int] = defaultdict(int)
    stratum_of: dict[str, str] = {}
    for key, stratum in zip(keys, strata):
        copies[key] += 1
        stratum_of[key] = min(stratum, stratum_of.get(key, stratum))
    members: dict[str, list[str]] = defaultdict(list)
    for key, stratum in stratum_of.items():
        members[stratum].append(key)
    side_of: dict[str, int] = {}
    for stratum in sorted(members):
        shuffled = sorted(members[stratum], key=lambda key: rank(seed, key))
        side_of |= _cut(shuffled, copies, shares)
    return np.fromiter((side_of[key] for key in keys), np.int8, len(keys))


def largest_remainder(total: int, shares: Sequence[float]) -> list[int]:
    """Share out `total` in whole numbers that sum to it, each within 1 of its exact share."""
    exact = [total * share for share in shares]
    # Rounded first: .7 × 10 must give 7, whatever the last bit of the product says.
    counts = [int(round(value, 9)) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda side: (round(counts[side] - exact[side], 9), side))
    for side in by_remainder[: total - sum(counts)]:
        counts[side] += 1
    return counts


def rank(seed: int, key: str) -> bytes:
    """Return what rows are ordered by: a hash of seed and content, so the order of a file does not matter."""
    return hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=16).digest()


def _cut(shuffled: list[str], copies: dict[str, int], shares: Sequence[float]) -> dict[str, int]:
    total = sum(copies[key] for key in shuffled)
    ends = np.cumsum(largest_remainder(total, shares))
    sizes = np.array([copies[key] for key in shuffled])
    # A group of copies goes where its middle falls; a single row's middle is never on a border.
    middles = np.cumsum(sizes) - sizes / 2
    sides = np.searchsorted(ends, middles, side="right")
    return dict(zip(shuffled, np.minimum(sides, len(shares) - 1).tolist()))
