"""Requests to stop: a handler that sets a flag, and nothing else.

Free of torch, so that the handler stands before the seconds that importing torch takes.
"""

from __future__ import annotations

import signal
from types import FrameType

# SIGUSR2 is what some schedulers send some time before they end a job.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopRequest:
    """Whether this process was asked to stop; what follows from it is decided where all ranks agree."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> None:
        """Puts the handler in place; called once, in the main thread."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def raise_if_requested(self) -> None:
        """Called where nothing is trained yet, and ranks need not agree.

        Raises:
            Stopped: This process was asked to stop.
        """
        if self.requested:
            raise Stopped

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Saving here could store half a step, and raising here could leave half a file: a second signal is as safe.
        self.requested = True


class Stopped(Exception):  # noqa: N818  (a request, no error)
    """Asked to stop in the midst of something that is done again when the run goes on."""
