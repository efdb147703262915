"""Stop requests by signal: the handler sets a flag and does nothing else.

This module imports no torch, so that the handler is installed before the seconds that importing torch takes.
"""

from __future__ import annotations

import signal
from types import FrameType

# Some schedulers send SIGUSR2 a while before they end a job.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class Stopped(Exception):  # noqa: N818  (a request, no error)
    """A stop was requested during work that a resumed run repeats."""


class StopRequest:
    """Whether this process was requested to stop; the ranks agree on what follows between two steps."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> None:
        """Install the handler; called once, in the main thread."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def raise_if_requested(self) -> None:
        """Stop before training has begun, where ranks need not agree.

        Raises:
            Stopped: This process was requested to stop.
        """
        if self.requested:
            raise Stopped

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Saving here could store half a step, and raising here could leave half a file: a second signal is as safe.
        self.requested = True
