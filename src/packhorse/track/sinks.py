"""Where figures go: RUN/metrics.jsonl always, and whatever else keeps to the `Sink` protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from packhorse.track.meter import Figures


class Sink(Protocol):
    """Takes figures, in order of steps."""

    def log(self, step: int, figures: Figures) -> None:
        """Takes the figures of one step."""

    def close(self) -> None:
        """Writes out what is still held back."""


class Sinks:
    """Several sinks as one."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    def log(self, step: int, figures: Figures) -> None:
        """Hands the figures to every sink."""
        for sink in self._sinks:
            sink.log(step, figures)

    def close(self) -> None:
        """Closes every sink."""
        for sink in self._sinks:
            sink.close()
