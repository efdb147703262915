"""Stop requests: a handler that sets a flag, and ranks that agree on it at a step boundary."""

from __future__ import annotations

import signal
from types import FrameType

from packhorse.train.engine import Engine

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Set by SIGTERM or SIGINT; acted on only where all ranks agree.

    Before training has begun there is nothing to save, and a signal ends the process at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self._training = False

    def install(self) -> None:
        """Puts the handler in place; called once, in the main thread."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def begin_training(self) -> None:
        """From here on a signal only sets the flag: saving inside a handler could store half a step."""
        self._training = True

    def agreed(self, engine: Engine) -> bool:
        """True on every rank once any rank was asked to stop; a collective, called by all ranks each step."""
        return engine.sum_over_ranks([float(self.requested)])[0] > 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if not self._training:
            raise StopBeforeTraining


class StopBeforeTraining(BaseException):
    """A stop request while nothing is trained yet; BaseException so that no library swallows it."""
