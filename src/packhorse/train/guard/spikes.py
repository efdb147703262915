"""Loss spikes: how far a step's loss lies above those before it, in robust standard deviations."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Final

# A standard deviation is 1.4826 times the median absolute deviation of a normal distribution; unlike a standard
# deviation, half of the window may be spikes before it moves (Iglewicz and Hoaglin 1993).
DEVIATIONS: Final = 1.4826
# Losses of a smooth run scatter so little that any step would be a spike: nats, and share of the median.
SMALLEST_SCATTER: Final = 0.01
# Of the window, before the first score.
FIRST_SHARE: Final = 0.25


def spike_score(loss: float, before: Sequence[float], window_steps: int) -> float | None:
    """Robust z-score of a loss among those before it.

    Args:
        loss: Of one step, nats per supervised token.
        before: Losses of up to `window_steps` steps before it.
        window_steps: Steps that it is compared with.

    Returns:
        Its distance from their median, above 0 where it lies higher; None while there are too few of them.
    """
    if len(before) < FIRST_SHARE * window_steps:
        return None
    median = statistics.median(before)
    scatter = DEVIATIONS * statistics.median(abs(each - median) for each in before)
    return (loss - median) / max(scatter, SMALLEST_SCATTER, SMALLEST_SCATTER * median)
