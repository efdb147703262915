"""Watch the ranks of an attempt, decide when it must be ended, and end its processes on this host.

When a rank is dead or hangs, the others wait for it in a collective until a timeout of many minutes; they do not end
automatically.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from packhorse.errors import UserError
from packhorse.launching.local.failure_logs import read_failures
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.attempts import ended_early, is_cause, read_rank_records
from packhorse.run_folder.folder import relative
from packhorse.run_folder.heartbeat import (
    LAUNCHER_VARIABLE,
    Heartbeat,
    find_hung_rank,
    find_process,
    read_heartbeats,
    with_grace,
)
from packhorse.run_folder.layout import STOP_FILE

EndKind = Literal["dead", "hung", "left", "stuck"]

FAILED_SECONDS: Final = 3.0
"""Time for the other ranks to report what they know, after a rank has failed."""
END_SECONDS: Final = 60.0
"""Time for the processes to exit after all ranks have ended normally."""
ASLEEP_SECONDS: Final = 5.0
"""If the launcher has not looked for this long, it was stopped itself, or the machine slept."""
GONE_SECONDS: Final = 10.0
"""Longest wait until killed processes are gone."""


@dataclass(frozen=True)
class ForcedEnd:
    """Reason to end an attempt from outside.

    Attributes:
        kind: `dead`: a rank is gone without a record. `hung`: a rank hangs. `left`: a rank has ended with a record
            while others wait for it. `stuck`: all ranks have ended, and processes stay.
        heartbeat: Last heartbeat of the rank.
        state: State of its process, a letter as in proc(5); empty if the process is gone.
    """

    kind: EndKind
    heartbeat: Heartbeat
    state: str = ""


class RankWatcher:
    """Watches the ranks of one attempt."""

    def __init__(self, plan: RunPlan, logs: Path, clock: Callable[[], float] = time.time) -> None:
        self._plan, self._logs, self._clock = plan, logs, clock
        now = clock()
        self._looked = self._awake_since = now
        # A rank without a heartbeat counts as one that beat when the attempt began.
        self.heartbeats = {
            rank: Heartbeat(rank, 0, "", "start", 0, now, now) for rank in range(plan.topology.world_size)
        }

    @property
    def all_have_begun(self) -> bool:
        """Whether every rank is past its start, and handles signals."""
        return all(beat.phase != "start" for beat in self.heartbeats.values())

    def living(self) -> list[Heartbeat]:
        """Return the ranks whose processes live."""
        return [beat for beat in self.heartbeats.values() if beat.pid and belongs_to_run(self._plan, beat.pid)]

    def look(self) -> ForcedEnd | None:
        """Return why the attempt must be ended now; None while it may continue, or ends without help."""
        now = self._clock()
        if now - self._looked > ASLEEP_SECONDS:
            self._awake_since = now  # the ranks may have slept too, and get the full time again
        self._looked = now
        self.heartbeats |= {beat.rank: beat for beat in read_heartbeats(self._logs)}
        living = {beat.pid for beat in self.living()}
        records = read_rank_records(self._logs)  # after `living`: a rank writes its record before it exits
        recorded = {record["rank"] for record in records}
        silent = [beat for rank, beat in self.heartbeats.items() if rank not in recorded]
        dead = self._first_dead([beat for beat in silent if beat.pid and beat.pid not in living], records)
        if dead:
            return ForcedEnd("dead", dead)
        early = [record for record in records if ended_early(record)]
        if early and now - early[0]["time"] > FAILED_SECONDS:
            return ForcedEnd("left", self.heartbeats[early[0]["rank"]])
        if not silent and now - records[-1]["time"] > END_SECONDS:
            return ForcedEnd("stuck", max(self.heartbeats.values(), key=lambda beat: beat.at))
        seconds = self._plan.recipe.recovery.hang_seconds
        hung = find_hung_rank([with_grace(beat, self._awake_since, seconds) for beat in silent], now, seconds)
        if hung is None:
            return None
        beat = self.heartbeats[hung.rank]
        process = find_process(beat.pid) if beat.pid else None
        return ForcedEnd("hung", beat, process.state if process else "")

    def _first_dead(self, gone: list[Heartbeat], records: Sequence[dict[str, Any]]) -> Heartbeat | None:
        """Return the rank that died first without a record; None if another rank reports its own failure."""
        failed_pids = [failure.pid for failure in read_failures(self._logs)]
        causes = [record for record in records if ended_early(record) and is_cause(record)]
        gone.sort(
            key=lambda beat: (failed_pids.index(beat.pid) if beat.pid in failed_pids else len(failed_pids), beat.at)
        )
        return gone[0] if gone and not causes else None


def processes_of(plan: RunPlan) -> list[int]:
    """Return the process numbers of this run's `accelerate launch` and ranks on this host.

    torch's agent puts each rank into a separate session, so no process group contains them all. Their command lines,
    and no others, end with the launched script and this run's plan.
    """
    return [int(folder.name) for folder in Path("/proc").glob("[0-9]*") if belongs_to_run(plan, int(folder.name))]


def belongs_to_run(plan: RunPlan, pid: int) -> bool:
    """Return whether a process lives and belongs to the run."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")  # empty for a zombie
    except OSError:
        return False
    return words[-3:-1] == [os.fsencode(word) for word in plan.argv[-2:]]


def end_processes(plan: RunPlan) -> None:
    """Kill all processes of this run on this host, and wait until they and their resources are gone."""
    end = time.monotonic() + GONE_SECONDS
    while (pids := processes_of(plan)) and time.monotonic() < end:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def end_orphans(plan: RunPlan) -> None:
    """Kill the processes that a launcher, now gone, left of this run. The caller holds the run's lock.

    Raises:
        UserError: Ranks run that were started by hand.
    """
    for pid in processes_of(plan):
        with suppress(OSError):
            if f"{LAUNCHER_VARIABLE}=".encode() not in Path(f"/proc/{pid}/environ").read_bytes():
                raise UserError(
                    f"{relative(plan.run_folder)} is run by process {pid}, which `accelerate launch` started here.",
                    "two launches on one run folder would overwrite each other's checkpoints and metrics.",
                    f"wait for it, or stop it: touch {relative(plan.run_folder)}/{STOP_FILE}",
                )
    end_processes(plan)
