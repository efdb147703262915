"""Pinned memory comes in powers of two (torch's CachingHostAllocator): copies share slabs, so that few are rounded up.

torch has a setting against the rounding, `pinned_max_round_threshold_mb`, which is left alone: as of 2.13 a block that
was not rounded may be handed out again for a larger request (`get_free_block` in ATen/core/CachingHostAllocator.h
compares no sizes).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

ALIGNMENT: Final = 512
"""Bytes at which each copy begins."""
LARGEST: Final = 2**31
"""Bytes of a slab at most, but for copies that are larger."""
GROWTH: Final = 8
"""A slab is as large as this part of all before it, so that what is left of the last one is little."""
OPEN: Final = 4
"""So many slabs, the last, are looked through for room; little is left in those before."""


class PinnedSlabs:
    """Places for copies as they come.

    Of full fine-tuning in float32 (weights and two moments) the slabs of a 7B take 1.04 of the bytes in them, of an 8B
    1.01, of a 70B on one rank 1.03; each copy by itself would take 1.31, 1.10 and 1.11, of Qwen2.5 7B 1.90 (now 1.06).

    Attributes:
        sizes: Bytes of each slab.
    """

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._used: list[int] = []

    def place(self, size: int) -> tuple[int, int]:
        """Takes room.

        Args:
            size: In bytes.

        Returns:
            The number of the slab, which may be a new one at the end of `sizes`, and the byte at which the room begins.
        """
        size = -(-size // ALIGNMENT) * ALIGNMENT
        last = len(self.sizes)
        for number in range(max(0, last - OPEN), last):
            begin = self._used[number]
            if size <= self.sizes[number] - begin:
                self._used[number] += size
                return number, begin
        self.sizes.append(pinned_bytes(max(size, min(sum(self.sizes) // GROWTH, LARGEST))))
        self._used.append(size)
        return last, 0


def slabs_bytes(sizes: Iterable[int]) -> int:
    """Of all slabs that hold copies of these sizes."""
    slabs = PinnedSlabs()
    for size in sizes:
        slabs.place(size)
    return sum(slabs.sizes)


def pinned_bytes(size: int) -> int:
    """The least power of two that holds so many bytes."""
    return 1 << (size - 1).bit_length() if size else 0
