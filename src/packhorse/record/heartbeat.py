"""Heartbeats: what each rank does and since when, so that a dead or hung rank can be named with its phase.

RUN/logs/attempt-N/heartbeat-R.json is written by rank R through shared memory: naming a phase costs microseconds, and
what was named last stays readable after a SIGKILL. A thread renews the time; where it stands still, the process does.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Phase = Literal["start", "load", "data", "forward", "backward", "optimizer", "save", "evaluate", "end"]
RECORD_BYTES = 512
BEAT_SECONDS = 1.0


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
    """

    rank: int
    pid: int
    host: str
    phase: Phase
    step: int
    since: float
    at: float


class Pulse:
    """The heartbeat of this process; `close` ends it."""

    def __init__(self, folder: Path, rank: int, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        now = clock()
        self._last = Heartbeat(rank, os.getpid(), socket.gethostname(), "start", 0, now, now)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"heartbeat-{rank}.json"
        path.write_bytes(b" " * RECORD_BYTES)
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), RECORD_BYTES)
        self._ended = threading.Event()
        self._write(self._last)
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def phase(self, name: Phase, step: int | None = None) -> None:
        """Names what comes next; `step` where it has changed. Naming the same phase again says that it goes on."""
        with self._lock:
            now, last = self._clock(), self._last
            done = last.step if step is None else step
            self._write(Heartbeat(last.rank, last.pid, last.host, name, done, now, now))

    def close(self) -> None:
        """Says that the process ends in order, and stops the thread."""
        if self._ended.is_set():
            return
        self.phase("end")
        self._ended.set()
        self._thread.join()
        self._memory.close()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with self._lock:
                last = self._last
                self._write(Heartbeat(last.rank, last.pid, last.host, last.phase, last.step, last.since, self._clock()))

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


def hung(heartbeats: list[Heartbeat], now: float, timeout_seconds: float) -> Heartbeat | None:
    """The rank that the others wait for; None while all go on.

    First a process that is silent: stopped, or its host gone. Then, where every rank has been in its phase for longer
    than the timeout, the one that is furthest behind: the others wait for it in a collective.
    """
    alive = [heartbeat for heartbeat in heartbeats if heartbeat.phase != "end"]
    silent = [heartbeat for heartbeat in alive if now - heartbeat.at > timeout_seconds]
    if silent:
        return min(silent, key=lambda heartbeat: heartbeat.at)
    if alive and all(now - heartbeat.since > timeout_seconds for heartbeat in alive):
        return min(alive, key=lambda heartbeat: (heartbeat.step, heartbeat.since))
    return None
