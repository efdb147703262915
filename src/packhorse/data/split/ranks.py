"""Pseudo-random order by content: a hash of a row's key and a seed, so that the order of a file does not matter.

Shapes: R rows. Changing any result here would move rows between training and test of data prepared before.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

UInt64 = NDArray[np.uint64]

MASK: Final = 2**64 - 1


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
