"""Files that are mapped into memory and read once, piece by piece."""

from __future__ import annotations

from mmap import MADV_DONTNEED, mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray


def release(values: NDArray[Any]) -> None:
    """Give back the pages of a mapped file that were read, or a pass over it would fill the memory (madvise(2)).

    They are read again when they are touched; an array that is not mapped stays as it is.
    """
    base: object = values
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap):
        base.madvise(MADV_DONTNEED)
