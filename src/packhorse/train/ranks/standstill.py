"""Ends a rank whose run stands still, where no launcher of ours watches: in a job, or started by hand.

Each rank knows how long it has been in its phase. Only when that is too long does it look at the others' heartbeats,
which lie in the run folder: so nothing is read while all is well, on however many nodes. A rank that is stopped, or
whose node is gone, cannot look, and is found by those that wait for it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from packhorse.errors import EXIT_LOST
from packhorse.run_folder.heartbeat import Heartbeat, find_hung_rank, read_heartbeats, with_grace
from packhorse.run_folder.layout import REPORT_REQUEST_FILE

LOOK_SECONDS = 10.0
"""Between two looks at all heartbeats, once there is reason to look."""
ASLEEP_SECONDS = 5.0
"""A job that was suspended stood still longer than this, and its ranks get the whole time again."""
LAST_WORDS_SECONDS = 3.0
"""How long the other ranks may take to write their stacks and collectives."""


class Standstill:
    """Looks, at each beat of one rank's heart, whether the run stands still; and if so, ends this rank."""

    def __init__(
        self,
        logs: Path,
        world_size: int,
        hang_seconds: float,
        last: Callable[[], Heartbeat],
        end: Callable[[Heartbeat], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Nothing is looked at yet.

        Args:
            logs: Folder of the heartbeats.
            world_size: Ranks that there are to be.
            hang_seconds: How long a rank may say nothing, or all ranks be in one phase.
            last: This rank's own heartbeat.
            end: Ends this rank; told which one the others wait for.
            clock: Unix seconds.
        """
        self._logs, self._world_size, self._seconds = logs, world_size, hang_seconds
        self._last, self._end, self._clock = last, end, clock
        self._began = self._beaten = self._floor = clock()
        self._looked = 0.0

    def beat(self) -> None:
        """Called about every second, by the thread that beats."""
        now = self._clock()
        if now - self._beaten > ASLEEP_SECONDS:
            self._floor = now
        self._beaten = now
        mine = with_grace(self._last(), self._floor, self._seconds)
        if mine.phase == "end" or now - mine.since <= self._seconds or now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        # Until a rank has said a word: as if it had said so when this one began.
        silent = {n: Heartbeat(n, 0, "", "start", 0, self._began, self._began) for n in range(self._world_size)}
        beats = silent | {beat.rank: beat for beat in read_heartbeats(self._logs)}
        waiting = find_hung_rank(
            [with_grace(beat, self._floor, self._seconds) for beat in beats.values()], now, self._seconds
        )
        if waiting is not None:
            self._end(waiting)


def end_hung(logs: Path, say: Callable[[], None], record: Callable[[int, str, int], None], waiting: Heartbeat) -> None:
    """Lets all ranks say where they stand, writes down which one they wait for, and ends this process.

    Args:
        logs: Of the attempt.
        say: Writes where this rank stands.
        record: Writes how it ended: exit code, message, and the rank that hangs.
        waiting: The rank that the others wait for, as it was last heard of.
    """
    (logs / REPORT_REQUEST_FILE).touch()
    say()
    time.sleep(LAST_WORDS_SECONDS)
    record(EXIT_LOST, f"rank {waiting.rank} hung in phase {waiting.phase}", waiting.rank)
    sys.stderr.flush()
    os._exit(EXIT_LOST)
