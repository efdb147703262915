"""Progress of a run: a bar with the time left on a terminal, a few plain lines in a log."""

from __future__ import annotations

import math
import time
from typing import Final, Protocol

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from packhorse.track.meter import Clock, Figures

LINE_SECONDS: Final = 10.0
LINE_SHARE: Final = 0.05


class Progress(Protocol):
    """Shows the progress of a run."""

    def update(self, step: int, figures: Figures) -> None:
        """Show the figures of a finished step."""

    def close(self) -> None:
        """Show the last figures and restore the terminal."""


def open_progress(console: Console, num_steps: int, first_step: int = 0, clock: Clock = time.perf_counter) -> Progress:
    """Return a bar on a terminal, otherwise lines.

    Args:
        console: Console to write to.
        num_steps: Steps of the whole run.
        first_step: Steps done before this attempt; the time left is estimated from this attempt alone.
        clock: Source of the time.
    """
    kind = Bar if console.is_terminal else Lines
    return kind(console, _Pace(num_steps, first_step, clock))


class _Pace:
    """Estimates the time left from the steps of this attempt."""

    def __init__(self, num_steps: int, first_step: int, clock: Clock) -> None:
        self.num_steps = num_steps
        self.first_step = first_step
        self.clock = clock
        self._start = clock()

    def seconds_left(self, step: int) -> float:
        """Return an estimate, infinite before the first step of this attempt."""
        num_done = step - self.first_step
        return (self.clock() - self._start) / num_done * (self.num_steps - step) if num_done > 0 else math.inf

    def text(self, step: int, figures: Figures) -> str:
        """Return the line for a finished step."""
        loss, speed = figures["train/loss"], figures["speed/tokens_per_second"]
        return f"step {step}/{self.num_steps} · {describe(loss, speed, self.seconds_left(step))}"


class Bar:
    """A bar that is redrawn in place."""

    def __init__(self, console: Console, pace: _Pace) -> None:
        self._pace = pace
        self._bar = RichProgress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.description}"),
            console=console,
        )
        self._task = self._bar.add_task("", total=pace.num_steps, completed=pace.first_step)
        self._bar.start()

    def update(self, step: int, figures: Figures) -> None:
        """Redraw the bar."""
        loss, speed = figures["train/loss"], figures["speed/tokens_per_second"]
        text = describe(loss, speed, self._pace.seconds_left(step))
        self._bar.update(self._task, completed=step, description=text)

    def close(self) -> None:
        """Stop redrawing; the bar stays visible."""
        self._bar.stop()


class Lines:
    """Lines for a log: the first, the last, and between them at most one per 10 s and per 5 % of the steps."""

    def __init__(self, console: Console, pace: _Pace) -> None:
        self._console = console
        self._pace = pace
        self._shown: tuple[int, float] | None = None
        self._held_back: str | None = None

    def update(self, step: int, figures: Figures) -> None:
        """Write the line, or hold it back."""
        self._held_back = self._pace.text(step, figures)
        if self._is_due(step):
            self._show(step)

    def close(self) -> None:
        """Write the last line if it was held back."""
        if self._held_back is not None:
            self._show(self._pace.num_steps)

    def _is_due(self, step: int) -> bool:
        if self._shown is None or step >= self._pace.num_steps:
            return True
        shown_step, shown_seconds = self._shown
        is_far = step - shown_step >= LINE_SHARE * self._pace.num_steps
        return is_far and self._pace.clock() - shown_seconds >= LINE_SECONDS

    def _show(self, step: int) -> None:
        # soft_wrap: a log has no width, and text in a broken line cannot be searched.
        self._console.print(self._held_back, markup=False, highlight=False, soft_wrap=True)
        self._shown = (step, self._pace.clock())
        self._held_back = None


def describe(loss: float, tokens_per_second: float, seconds_left: float) -> str:
    """Return e.g. `loss 0.412 · 3.4k tokens/s · ETA 1 min 12 s`."""
    return f"loss {loss:.3f} · {describe_count(tokens_per_second)} tokens/s · ETA {describe_duration(seconds_left)}"


def describe_count(count: float) -> str:
    """Return a count in at most four characters: `87`, `3.4k`, `120k`, `1.2M`."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if count >= size * 0.9995:
            value = count / size
            return f"{value:.1f}{unit}" if value < 99.95 else f"{value:.0f}{unit}"
    return f"{count:.0f}"


def describe_duration(seconds: float) -> str:
    """Return the two largest units: `12 s`, `1 min 12 s`, `3 h 5 min`, `2 d 1 h`."""
    if not math.isfinite(seconds):
        return "unknown"
    whole = round(seconds)
    for (unit, size), (next_unit, next_size) in (
        (("d", 86400), ("h", 3600)),
        (("h", 3600), ("min", 60)),
        (("min", 60), ("s", 1)),
    ):
        if whole >= size:
            rest = whole % size // next_size
            return f"{whole // size} {unit} {rest} {next_unit}" if rest else f"{whole // size} {unit}"
    return f"{whole} s"
