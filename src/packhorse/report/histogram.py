"""Lengths of rows as bars: position and height of each, and the position of T."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

# Height of the bar area in CSS pixels; widths are percentages, so the page may have any width.
PLOT_HEIGHT: Final = 180
MOST_TICKS: Final = 6
_GAP: Final = 0.12


@dataclass(frozen=True)
class Bar:
    """One bin: lengths from `low` to `high` tokens, both included; x and width in percent, height in pixels."""

    low: int
    high: int
    rows: int
    x: float
    width: float
    height: float
    is_over: bool


@dataclass(frozen=True)
class Tick:
    """A label below the bars, at x percent; a minor one is hidden on a narrow screen."""

    x: float
    tokens: int
    anchor: str
    is_minor: bool


@dataclass(frozen=True)
class Histogram:
    """Bars, labels, position of T (None if all rows are shorter), rows of the highest bar."""

    bars: tuple[Bar, ...]
    ticks: tuple[Tick, ...]
    limit_x: float | None
    limit_anchor: str
    most_rows: int


def histogram(bins: Sequence[tuple[int, int]], length_tokens: int) -> Histogram | None:
    """Lay out bins of (upper bound in tokens, rows); None if there are no rows.

    Args:
        bins: Bins in the order of their bounds.
        length_tokens: T; its position within a bin is logarithmic, as the bins grow.
    """
    most = max((rows for _, rows in bins), default=0)
    if most == 0:
        return None
    step = 100 / len(bins)
    bars = []
    low = 1
    for at, (high, rows) in enumerate(bins):
        height = max(2.0, rows / most * PLOT_HEIGHT) if rows else 0.0
        bars.append(
            Bar(low, high, rows, (at + _GAP / 2) * step, (1 - _GAP) * step, round(height, 2), low > length_tokens)
        )
        low = high + 1
    limit = _position(bars, length_tokens, step)
    return Histogram(tuple(bars), _ticks(bars, step), limit, _anchor(limit if limit is not None else 100), most)


def _position(bars: Sequence[Bar], length_tokens: int, step: float) -> float | None:
    for at, bar in enumerate(bars):
        if length_tokens <= bar.high:
            low, high = math.log(max(bar.low - 1, 1)), math.log(max(bar.high, 2))
            inside = (math.log(max(length_tokens, 1)) - low) / (high - low) if high > low else 1.0
            return (at + min(max(inside, 0.0), 1.0)) * step
    return None


def _ticks(bars: Sequence[Bar], step: float) -> tuple[Tick, ...]:
    """Label upper bounds, at most `MOST_TICKS` of them, always including the last."""
    every = math.ceil(len(bars) / MOST_TICKS)
    ticks = [
        Tick((at + 1) * step, bars[at].high, _anchor((at + 1) * step), nth % 2 == 1)
        for nth, at in enumerate(range(len(bars) - 1, -1, -every))
    ]
    return tuple(reversed(ticks))


def _anchor(x: float) -> str:
    if x > 85:
        return "end"
    return "start" if x < 10 else "middle"
