"""Calibration: whether answers given with a probability of 80 % are right in 80 % of rows. Pure functions.

Shapes: N rows, M bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
Int = NDArray[np.int64]

NUM_BINS: Final = 10
"""Bins of equal width; a bin includes its upper end (Guo et al. 2017, On Calibration of Modern Neural Networks)."""


@dataclass(frozen=True)
class CalibrationBin:
    """Rows whose probability is in one bin.

    Attributes:
        high: Upper end of the bin.
        num_rows: Number of rows.
        confidence: Mean probability of the answers; 0 without rows.
        accuracy: Share of right answers; 0 without rows.
    """

    high: float
    num_rows: int
    confidence: float
    accuracy: float


def calibration_bins(confidence: Float, right: Float) -> tuple[CalibrationBin, ...]:
    """Return the bins from low to high probability.

    Args:
        confidence: Probability of each answer, float64 [N].
        right: 1 for a right answer, else 0, float64 [N].
    """
    index = _bin(confidence)
    counts = np.bincount(index, minlength=NUM_BINS)
    means = [np.bincount(index, values, NUM_BINS) / np.maximum(counts, 1) for values in (confidence, right)]
    return tuple(
        CalibrationBin((at + 1) / NUM_BINS, int(counts[at]), float(means[0][at]), float(means[1][at]))
        for at in range(NUM_BINS)
    )


def calibration_sums(confidence: Float, right: Float) -> Float:
    """Return what each row adds to the sums of `calibration_error`, float64 [N, M + 1].

    In the bin of the row it is right − confidence, and in the last column 1.
    """
    sums = np.zeros((len(confidence), NUM_BINS + 1))
    sums[np.arange(len(confidence)), _bin(confidence)] = right - confidence
    sums[:, -1] = 1
    return sums


def calibration_error(sums: Float) -> Float:
    """Return the expected calibration error, 0 to 1: |accuracy − confidence| of the bins, weighted by their rows.

    Args:
        sums: float64 [..., M + 1], see `calibration_sums`.
    """
    error: Float = np.abs(sums[..., :-1]).sum(-1) / sums[..., -1]
    return error


def _bin(confidence: Float) -> Int:
    """Return int64 [N]."""
    return np.clip(np.ceil(confidence * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
