"""Watches the ranks of an attempt by what they leave in its log folder, and says when it must be ended from outside.

A rank that is gone without a word, or silent, or that waits for another for ever, does not end the others by itself:
they wait for it in a collective, until a time-out of many minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from packhorse.launching.local.failure_logs import read_failures
from packhorse.launching.local.watch import is_of
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.attempts import ended_early, is_cause, read_rank_records
from packhorse.run_folder.heartbeat import Heartbeat, find_hung_rank, find_process, read_heartbeats, with_grace

Kind = Literal["dead", "hung", "left", "stuck"]

FAILED_SECONDS = 3.0
"""A rank has failed: how long the others may take to say what they know."""
END_SECONDS = 60.0
"""All ranks have ended in order: how long their processes may still take."""
ASLEEP_SECONDS = 5.0
"""The launcher itself was stopped, or the machine slept, if it has not looked for so long."""


@dataclass(frozen=True)
class Ending:
    """Why an attempt is ended from outside.

    Attributes:
        kind: A rank is dead without a word; hung; has left with a record while others wait for it; all ranks have
            ended, and processes stay.
        heartbeat: The last one of the rank that it is about.
        state: What the kernel says of its process, a letter as in proc(5); empty where it is gone.
    """

    kind: Kind
    heartbeat: Heartbeat
    state: str = ""


class Watch:
    """The ranks of one attempt."""

    def __init__(self, plan: RunPlan, logs: Path, clock: Callable[[], float] = time.time) -> None:
        self._plan, self._logs, self._clock = plan, logs, clock
        now = clock()
        self._looked = self._awake_since = now
        # Until a rank has said a word: as if it had said so when the attempt began.
        self.heartbeats = {
            rank: Heartbeat(rank, 0, "", "start", 0, now, now) for rank in range(plan.topology.world_size)
        }

    @property
    def all_have_begun(self) -> bool:
        """Every rank is past its start, and takes signals."""
        return all(beat.phase != "start" for beat in self.heartbeats.values())

    def living(self) -> list[Heartbeat]:
        """The ranks whose processes live."""
        return [beat for beat in self.heartbeats.values() if beat.pid and is_of(self._plan, beat.pid)]

    def look(self) -> Ending | None:
        """Why the attempt must be ended now; None while it may go on, or ends by itself."""
        now = self._clock()
        if now - self._looked > ASLEEP_SECONDS:
            self._awake_since = now  # the ranks may have slept too, and get the whole time again
        self._looked = now
        self.heartbeats |= {beat.rank: beat for beat in read_heartbeats(self._logs)}
        living = {beat.pid for beat in self.living()}
        records = read_rank_records(self._logs)  # after who lives: a rank writes its record before it goes
        recorded = {record["rank"] for record in records}
        silent = [beat for rank, beat in self.heartbeats.items() if rank not in recorded]
        dead = self._dead([beat for beat in silent if beat.pid and beat.pid not in living], records)
        if dead:
            return Ending("dead", dead)
        left = [record for record in records if ended_early(record)]
        if left and now - left[0]["time"] > FAILED_SECONDS:
            return Ending("left", self.heartbeats[left[0]["rank"]])
        if not silent and now - records[-1]["time"] > END_SECONDS:
            return Ending("stuck", max(self.heartbeats.values(), key=lambda beat: beat.at))
        seconds = self._plan.recipe.recovery.hang_seconds
        waiting = find_hung_rank([with_grace(beat, self._awake_since, seconds) for beat in silent], now, seconds)
        return self._hung(self.heartbeats[waiting.rank]) if waiting else None

    @staticmethod
    def _hung(beat: Heartbeat) -> Ending:
        found = find_process(beat.pid) if beat.pid else None
        return Ending("hung", beat, found.state if found else "")

    def _dead(self, gone: list[Heartbeat], records: Sequence[dict[str, Any]]) -> Heartbeat | None:
        """The rank that was gone first, without a word; None where another has a failure of its own to tell."""
        told = [failure.pid for failure in read_failures(self._logs)]
        own = [record for record in records if ended_early(record) and is_cause(record)]
        gone.sort(key=lambda beat: (told.index(beat.pid) if beat.pid in told else len(told), beat.at))
        return gone[0] if gone and not own else None
