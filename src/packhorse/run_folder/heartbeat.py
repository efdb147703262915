"""Heartbeats: what each rank does and since when, so that a dead or hung rank can be named with its phase.

RUN/logs/attempt-N/heartbeat-R.json is written by rank R through shared memory: naming a phase costs microseconds, and
what was named last stays readable after a SIGKILL. A thread renews the time; where it stands still, the process does.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from packhorse.errors import EXIT_LOST
from packhorse.run_folder.heartbeat import process_identity

Phase = Literal["start", "load", "data", "forward", "backward", "optimizer", "save", "evaluate", "end"]
RECORD_BYTES = 512
BEAT_SECONDS = 1.0
START_SECONDS = 300.0
"""How long a rank may take at least until its first heartbeat: it imports torch, maybe from a slow disk."""
LAUNCHER_VARIABLE = "PACKHORSE_LAUNCHER"
"""Environment variable by which a launcher tells its ranks who it is; absent in a launch typed by hand."""
ASK_FILE = "asked"
"""Beside the heartbeats: made by the launcher when it is about to end a hang, so that ranks say what they know."""


@dataclass(frozen=True)
class Heartbeat:
    """One rank at one moment.

    Attributes:
        rank: Global rank.
        pid: Its process.
        host: Where that runs.
        phase: What it does.
        step: Optimizer steps done.
        since: When the phase was named, Unix seconds.
        at: When the process last said that it lives, Unix seconds.
        first_step: Optimizer steps done when this attempt began; None while that is not known.
        changes: How often the phase has changed; all ranks go through the same ones.
    """

    rank: int
    pid: int
    host: str
    phase: Phase
    step: int
    since: float
    at: float
    first_step: int | None = None
    changes: int = 0


class HeartbeatWriter:
    """The heartbeat of this process; `close` ends it.

    A rank whose launcher is gone ends itself: nobody would watch it, and the next launcher would find it in its way.
    """

    def __init__(self, folder: Path, rank: int, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._asked = folder / ASK_FILE
        self._answer: Callable[[], None] | None = None
        self._at_each_beat: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        now = clock()
        self._last = Heartbeat(rank, os.getpid(), socket.gethostname(), "start", 0, now, now)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"heartbeat-{rank}.json"
        path.write_bytes(b" " * RECORD_BYTES)
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), RECORD_BYTES)
        self._ended = threading.Event()
        self._launcher = os.environ.get(LAUNCHER_VARIABLE, "")
        self._write(self._last)
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def on_report_request(self, answer: Callable[[], None]) -> None:
        """Sets what the beating thread does, once, when the launcher asks; the main thread may hang by then."""
        self._answer = answer

    def on_each_beat(self, look: Callable[[], None]) -> None:
        """Sets what the beating thread does each time."""
        self._at_each_beat = look

    @property
    def last(self) -> Heartbeat:
        """What was said last."""
        return self._last

    def phase(self, name: Phase, step: int | None = None) -> None:
        """Names what comes next; `step` where it has changed. Naming the same phase again says that it goes on."""
        with self._lock:
            now, last = self._clock(), self._last
            done = last.step if step is None else step
            first = step if last.first_step is None else last.first_step
            changes = last.changes + ((name, done) != (last.phase, last.step))
            self._write(replace(last, phase=name, step=done, since=now, at=now, first_step=first, changes=changes))

    def exit_if_launcher_is_gone(self) -> None:
        """Ends this process at once where its launcher is gone; what fails because of that is not worth telling."""
        if self._launcher and process_identity(int(self._launcher.split(":")[0])) != self._launcher:
            sys.stderr.write("the launcher of this run is gone: this rank ends too\n")
            sys.stderr.flush()
            os._exit(EXIT_LOST)

    def close(self) -> None:
        """Says that the process ends in order, and stops the thread."""
        if self._ended.is_set():
            return
        self.phase("end")
        self._ended.set()
        self._thread.join()
        self._memory.flush()  # or another host sees it when the kernel finds time, half a minute later
        self._memory.close()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with self._lock:
                self._write(replace(self._last, at=self._clock()))
            self.exit_if_launcher_is_gone()
            if self._answer and self._asked.exists():
                answer, self._answer = self._answer, None
                answer()
            self._at_each_beat()

    def _write(self, heartbeat: Heartbeat) -> None:
        self._last = heartbeat
        self._memory[:] = json.dumps(asdict(heartbeat)).encode().ljust(RECORD_BYTES)


def read_heartbeats(folder: Path) -> list[Heartbeat]:
    """The heartbeats of an attempt, by rank; one that is just being written is left out."""
    found = []
    for path in folder.glob("heartbeat-*.json"):
        try:
            found.append(Heartbeat(**json.loads(path.read_bytes())))
        except (OSError, ValueError, TypeError):
            continue
    return sorted(found, key=lambda heartbeat: heartbeat.rank)


def with_grace(beat: Heartbeat, floor: float, hang_seconds: float) -> Heartbeat:
    """The heartbeat as if nothing had been due before `floor`, nor for some minutes of a rank's start."""
    grace = max(0.0, START_SECONDS - hang_seconds) if beat.phase == "start" else 0.0
    return replace(beat, at=max(beat.at, floor) + grace, since=max(beat.since, floor) + grace)


def hung(heartbeats: list[Heartbeat], now: float, timeout_seconds: float) -> Heartbeat | None:
    """The rank that the others wait for; None while all go on.

    First a process that is silent: stopped, or its host gone. Then, where every rank has been in its phase for longer
    than the timeout, the one that is furthest behind: the others wait for it in a collective. In one and the same phase
    that is the one that came last. One that has fallen silent since comes before them all.
    """
    alive = [heartbeat for heartbeat in heartbeats if heartbeat.phase != "end"]
    silent = [heartbeat for heartbeat in alive if now - heartbeat.at > timeout_seconds]
    if silent:
        return min(silent, key=lambda heartbeat: heartbeat.at)
    if alive and all(now - heartbeat.since > timeout_seconds for heartbeat in alive):
        fell_silent = [heartbeat for heartbeat in alive if now - heartbeat.at > timeout_seconds / 2]
        return min(fell_silent or alive, key=lambda heartbeat: (heartbeat.changes, -heartbeat.since))
    return None
