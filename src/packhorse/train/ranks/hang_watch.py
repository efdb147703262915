"""Ends a rank whose run hangs where Packhorse's launcher does not watch: in a Slurm job, or started by hand.

Each rank knows how long its own phase has lasted. Only when that is too long does it read the other heartbeats in the
run folder, so a healthy run reads nothing, on any number of nodes. A rank that is stopped, or whose node is gone, does
not check; the ranks that wait for it find it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from packhorse.errors import EXIT_LOST
from packhorse.run_folder.heartbeat import Heartbeat, find_hung_rank, read_heartbeats, with_grace
from packhorse.run_folder.layout import REPORT_REQUEST_FILE

POLL_SECONDS = 10.0
"""Time between two readings of all heartbeats, once this rank's phase is too long."""
SUSPENDED_SECONDS = 5.0
"""A longer gap between two beats means that the job was suspended; its ranks then get the whole time again."""
LONGEST_REPORT_SECONDS = 30.0
"""How long this rank may take to write its own; a device that hangs may block it."""
REPORT_SECONDS = 3.0
"""How long the other ranks may take to write their stacks and collectives."""


class HangWatch:
    """Checks at each beat of this rank's heartbeat whether the run hangs, and then ends this rank."""

    def __init__(
        self,
        logs: Path,
        world_size: int,
        hang_seconds: float,
        last: Callable[[], Heartbeat],
        end: Callable[[Heartbeat], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Start the clock; nothing is read yet.

        Args:
            logs: Folder of the heartbeats.
            world_size: Expected number of ranks.
            hang_seconds: How long a rank may send no heartbeat, or all ranks may stay in one phase.
            last: Returns this rank's own heartbeat.
            end: Ends this rank; receives the heartbeat of the rank that the others wait for.
            clock: Unix seconds.
        """
        self._logs, self._world_size, self._seconds = logs, world_size, hang_seconds
        self._last, self._end, self._clock = last, end, clock
        self._began = self._beaten_at = self._floor = clock()
        self._polled_at = 0.0

    def beat(self) -> None:
        """Check once; called about every second by the heartbeat's thread."""
        now = self._clock()
        if now - self._beaten_at > SUSPENDED_SECONDS:
            self._floor = now
        self._beaten_at = now
        own = with_grace(self._last(), self._floor, self._seconds)
        if own.phase == "end" or now - own.since <= self._seconds or now - self._polled_at < POLL_SECONDS:
            return
        self._polled_at = now
        # A rank without a heartbeat counts as if its last one came when this watch began.
        silent = {n: Heartbeat(n, 0, "", "start", 0, self._began, self._began) for n in range(self._world_size)}
        beats = silent | {beat.rank: beat for beat in read_heartbeats(self._logs)}
        waiting = find_hung_rank(
            [with_grace(beat, self._floor, self._seconds) for beat in beats.values()], now, self._seconds
        )
        if waiting is not None:
            self._end(waiting)


def end_hung(
    logs: Path, report: Callable[[], None], record: Callable[[int, str, int], None], waiting: Heartbeat
) -> None:
    """Let all ranks write their stacks, record which rank they wait for, and end this process."""
    (logs / REPORT_REQUEST_FILE).touch()
    # NCCL's recorder asks the device for events, and may itself wait for ever where the device hangs.
    writer = threading.Thread(target=report, name="hang report", daemon=True)
    writer.start()
    writer.join(LONGEST_REPORT_SECONDS)
    time.sleep(REPORT_SECONDS)
    record(EXIT_LOST, f"rank {waiting.rank} hung in phase {waiting.phase}", waiting.rank)
    sys.stderr.flush()
    os._exit(EXIT_LOST)
