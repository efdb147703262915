"""Requests to stop the launcher: SIGINT (Ctrl-C), SIGTERM, and SIGUSR2, which schedulers send ahead."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Final

AT_ONCE: Final = (signal.SIGINT, signal.SIGTERM)
WARNING: Final = signal.SIGUSR2
STDERR: Final = 2


class StoppedBeforeStart(KeyboardInterrupt):
    """Stopped before any rank runs; what is being written is a draft, and is removed by the `finally` blocks."""


class StopSignals:
    """Requests to stop; once ranks may run, the handlers only set flags.

    Attributes:
        requested: The run is to save and stop.
        at_once: A second Ctrl-C or SIGTERM came: all ranks are to end now.
    """

    def __init__(self) -> None:
        self.requested = False
        self.at_once = False
        self._may_leave = True
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def ranks_may_run(self) -> None:
        """Make requests set a flag from now on, instead of raising `StoppedBeforeStart`."""
        self._may_leave = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle one of the three signals."""
        if self._may_leave:
            raise KeyboardInterrupt if number == signal.SIGINT else StoppedBeforeStart
        self.at_once = self.at_once or (self.requested and number in AT_ONCE)
        if not self.requested:
            # Not through sys.stderr: a signal handler may interrupt a write to its buffer.
            os.write(STDERR, b"\nstopping: the ranks finish this step and save (repeat to stop at once)\n")
        self.requested = True
        with suppress(BlockingIOError):
            os.write(self._write, b".")

    def wait_with(self, descriptor: int, seconds: float) -> None:
        """Wait until a file descriptor can be read, a request comes, or `seconds` have passed."""
        select.select([descriptor, self._read], [], [], seconds)
        with suppress(BlockingIOError):
            os.read(self._read, 1024)

    def close(self) -> None:
        """Close the pipe."""
        os.close(self._read)
        os.close(self._write)


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Handle the signals while a run is prepared and trained. Only the main thread may enter this context."""
    stop = StopSignals()
    before = {number: signal.signal(number, stop.handle) for number in (*AT_ONCE, WARNING)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        stop.close()
