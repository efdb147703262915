"""Requests to stop that reach the launcher: SIGINT (Ctrl-C), SIGTERM, and SIGUSR2, which schedulers send ahead."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

AT_ONCE = (signal.SIGINT, signal.SIGTERM)
WARNING = signal.SIGUSR2
STDERR = 2


class StoppedBeforeStart(KeyboardInterrupt):
    """Asked to stop while nothing runs yet; what is being written is a draft, and is removed on the way out."""


class StopSignals:
    """What was asked of the launcher; handlers set flags and nothing else once ranks may run.

    Attributes:
        asked: The run is to save and stop.
        at_once: Asked once more by Ctrl-C or SIGTERM: all ranks are to end now.
    """

    def __init__(self) -> None:
        self.asked = False
        self.at_once = False
        self._may_leave = True
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def ranks_may_run(self) -> None:
        """From here on a request sets a flag; before, it ends what is going on by `StoppedBeforeStart`."""
        self._may_leave = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler of all three signals."""
        if self._may_leave:
            raise KeyboardInterrupt if number == signal.SIGINT else StoppedBeforeStart
        self.at_once = self.at_once or (self.asked and number in AT_ONCE)
        if not self.asked:
            # Not through sys.stderr: its buffer may be in use just now.
            os.write(STDERR, b"\nstopping: the ranks finish this step and save (once more: at once)\n")
        self.asked = True
        with suppress(BlockingIOError):
            os.write(self._write, b".")

    def wait_with(self, descriptor: int, seconds: float) -> None:
        """Waits until a file descriptor can be read, so many seconds, or a request; whichever comes first."""
        select.select([descriptor, self._read], [], [], seconds)
        with suppress(BlockingIOError):
            os.read(self._read, 1024)

    def close(self) -> None:
        """Gives its pipe back."""
        os.close(self._read)
        os.close(self._write)


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Takes the signals for as long as a run is prepared and trained; in the main thread."""
    stop = StopSignals()
    before = {number: signal.signal(number, stop.handle) for number in (*AT_ONCE, WARNING)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        stop.close()
