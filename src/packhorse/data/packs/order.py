"""Random order from raw draws, as numpy keeps only raw streams equal between its versions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]

WORD_BITS = 64


def random_order(draws: UInt64) -> Int64:
    """Return int64 [n], the numbers from 0 in the order of their draws, uint64 [n]; equal draws by number."""
    return split_keys(sorted_keys(draws, len(draws)), len(draws))


def sorted_keys(keys: UInt64, size: int) -> UInt64:
    """Sort numbers below `size` by the high bits of their keys, uint64 [n]; the low bits become the numbers.

    All sorted words differ, so every sorting algorithm gives the same result, and numpy may use its fastest, which is
    eight times faster than a stable argsort.
    """
    bits = np.uint64(index_bits(size))
    words = (keys >> bits << bits) | np.arange(len(keys), dtype=np.uint64)
    words.sort()
    return words


def split_keys(words: UInt64, size: int) -> Int64:
    """Return int64 [n], the numbers that `sorted_keys` put into the low bits."""
    return (words & np.uint64((1 << index_bits(size)) - 1)).astype(np.int64)


def index_bits(size: int) -> int:
    """Return the number of bits that hold every number below `size`."""
    return max(size - 1, 1).bit_length()


def order_by(values: Int64) -> Int64:
    """Return int64 [n], the indices of non-negative `values` below 2**32 in rising order; equal values by index."""
    words = (values << 32) | np.arange(len(values))
    words.sort()
    return words & 0xFFFFFFFF
