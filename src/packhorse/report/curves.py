"""Curves of figures by step: thinned so that spikes stay, and laid out as SVG paths with labels beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from pydantic import BaseModel, ConfigDict

MOST_POINTS: Final = 600
MOST_NOT_FINITE: Final = 100
MOST_DOTS: Final = 60
WIDTH, HEIGHT = 1000, 200
LOG_RATIO: Final = 100
NUM_TICKS: Final = 4

Point = tuple[float, float]


class Series(BaseModel):
    """Values of one figure by step."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings", use_attribute_docstrings=True)

    name: str
    points: tuple[Point, ...]
    """(step, value) in order; of long series the lowest and highest value of each of 299 intervals, first and last."""
    num_points: int
    """Finite values that were logged."""
    not_finite: tuple[float, ...]
    """Steps whose value is NaN or Inf, the first 100."""
    num_not_finite: int
    last: float
    """Last value that was logged; it may be NaN or Inf."""
    lowest: float | None
    """Lowest finite value."""


class Curve(BaseModel):
    """Series that share one plot."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings", use_attribute_docstrings=True)

    title: str
    unit: str
    is_log_if_wide: bool
    """Whether the scale is logarithmic if all values are positive and differ by a factor of 100."""
    series: tuple[Series, ...]


def series_of(name: str, points: Sequence[Point]) -> Series | None:
    """Return a series from (step, value) in any order; None without values."""
    if not points:
        return None
    ordered = sorted(points, key=lambda point: point[0])
    finite = [point for point in ordered if math.isfinite(point[1])]
    not_finite = [step for step, value in ordered if not math.isfinite(value)]
    return Series(
        name=name,
        points=tuple(thinned(finite)),
        num_points=len(finite),
        not_finite=tuple(not_finite[:MOST_NOT_FINITE]),
        num_not_finite=len(not_finite),
        last=ordered[-1][1],
        lowest=min((value for _, value in finite), default=None),
    )


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Return at most `most` points: first, last, and the lowest and highest of equal intervals between them."""
    if len(points) <= most:
        return list(points)
    num_intervals = (most - 2) // 2
    inner = points[1:-1]
    kept = [points[0]]
    for number in range(num_intervals):
        part = inner[len(inner) * number // num_intervals : len(inner) * (number + 1) // num_intervals]
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept += sorted(ends)
    return [*kept, points[-1]]


@dataclass(frozen=True)
class Label:
    """A label of an axis, at a percentage of its length from the left or the top."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """One series as drawn: SVG path, dots if there are few points, and marks at steps whose value is not finite."""

    series: Series
    path: str
    dots: str
    marks: tuple[float, ...]


@dataclass(frozen=True)
class Plot:
    """A curve as drawn in a box of WIDTH × HEIGHT."""

    curve: Curve
    lines: tuple[Line, ...]
    x_labels: tuple[Label, ...]
    y_labels: tuple[Label, ...]
    is_log: bool


def plot_of(curve: Curve) -> Plot:
    """Lay out a curve that has at least one series."""
    steps = [step for each in curve.series for step in (*(x for x, _ in each.points), *each.not_finite)]
    values = [value for each in curve.series for _, value in each.points]
    first, last = min(steps), max(steps)
    is_log = curve.is_log_if_wide and bool(values) and min(values) > 0 and max(values) / min(values) >= LOG_RATIO
    scaled = [math.log10(value) if is_log else value for value in values] or [0.0]
    low, high = _widened(min(scaled), max(scaled))

    def x_of(step: float) -> float:
        return WIDTH * (step - first) / (last - first) if last > first else WIDTH / 2

    def y_of(value: float) -> float:
        at = math.log10(value) if is_log else value
        return HEIGHT * (1 - (at - low) / (high - low))

    lines = []
    for each in curve.series:
        places = [f"{x_of(step):.1f} {y_of(value):.1f}" for step, value in each.points]
        dots = "".join(f"M{place}h0" for place in places) if len(places) <= MOST_DOTS else ""
        marks = tuple(round(x_of(step), 1) for step in each.not_finite)
        lines.append(Line(each, f"M{'L'.join(places)}" if places else "", dots, marks))
    middle = [step for step in _ticks(first, last) if 0.1 < (step - first) / ((last - first) or 1) < 0.9]
    x_labels = [Label(x_of(step) / WIDTH * 100, f"{step:,.0f}") for step in dict.fromkeys((first, *middle, last))]
    y_labels = [Label(100 * (1 - (at - low) / (high - low)), shown_tick(10**at if is_log else at))
                for at in _y_ticks(low, high, is_log)]  # fmt: skip
    return Plot(curve, tuple(lines), tuple(x_labels), tuple(y_labels) if values else (), is_log)


def shown_tick(value: float) -> str:
    """Return a value with three significant digits and its size as a letter: `1.5k`, `0.0035`, `2e-05`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _widened(low: float, high: float) -> tuple[float, float]:
    """Return a range that does not touch the edges of the plot, and is not empty."""
    margin = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float) -> Iterator[float]:
    """Yield about NUM_TICKS multiples of 1, 2 or 5 × 10^k from low to high."""
    if high <= low:
        return
    rough = (high - low) / NUM_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    for number in range(math.ceil(low / size), math.floor(high / size) + 1):
        yield number * size


def _y_ticks(low: float, high: float, is_log: bool) -> list[float]:
    """Return the ticks of the vertical axis; a logarithmic one has powers of ten."""
    if not is_log:
        return list(_ticks(low, high))
    powers = range(math.ceil(low), math.floor(high) + 1)
    return [float(power) for power in powers[:: math.ceil(len(powers) / NUM_TICKS) or 1]]
