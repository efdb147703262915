"""Heartbeats: the phase of each rank and since when, so that a dead or hung rank can be named with its phase.

Rank R writes RUN/logs/attempt-N/heartbeat-R.json through shared memory: naming a phase costs microseconds, and the last
phase stays readable after a SIGKILL. A thread renews the time; when the time is no longer renewed, the process hangs.
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
from typing import Final, Literal

from packhorse.errors import EXIT_LOST
from packhorse.run_folder.layout import HEARTBEATS, REPORT_REQUEST_FILE, numbered

Phase = Literal["start", "load", "prior", "data", "forward", "backward", "optimizer", "save", "evaluate", "end"]
RECORD_BYTES: Final = 512
BEAT_SECONDS: Final = 1.0
START_SECONDS: Final = 300.0
"""Least time that a rank may take until its first heartbeat: it imports torch, possibly from a slow disk."""
LAUNCHER_VARIABLE: Final = "PACKHORSE_LAUNCHER"
"""Environment variable that identifies the launcher to its ranks; absent if `accelerate launch` was typed by hand."""
GONE: Final = "ZX"  # proc(5): ended, but not yet waited for by its parent
STOPPED: Final = "Tt"  # proc(5): by SIGSTOP, or by a debugger


@dataclass(frozen=True)
class Heartbeat:
    """One rank at one moment.

    Attributes:
        rank: Global rank.
        pid: Process of the rank.
        host: Host of the process.
        phase: What the rank does.
        step: Optimizer steps done.
        since: Start of the phase, Unix seconds.
        at: Last renewal by the process, Unix seconds.
        first_step: Optimizer steps done when this attempt began; None until that is known.
        changes: Number of phase changes; all ranks go through the same phases.
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
    """Writes the heartbeat of this process until `close`.

    A rank whose launcher is gone ends itself: nothing watches it, and it would block the next launch.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._request = folder / REPORT_REQUEST_FILE
        self._write_report: Callable[[], None] | None = None
        self._each_beat: Callable[[], None] = lambda: None
        self._each_phase: Callable[[Phase, int | None], None] | None = None
        self._lock = threading.Lock()
        now = time.time()
        self._last = Heartbeat(rank, os.getpid(), socket.gethostname(), "start", 0, now, now)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / numbered(HEARTBEATS, rank)
        path.write_bytes(b" " * RECORD_BYTES)
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), RECORD_BYTES)
        self._ended = threading.Event()
        self._extended_until = 0.0
        self._launcher = os.environ.get(LAUNCHER_VARIABLE, "")
        self._write(self._last)
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def on_report_request(self, write_report: Callable[[], None]) -> None:
        """Set what the heartbeat thread calls, once, when a hang report is requested; the main thread may hang then."""
        self._write_report = write_report

    def on_each_beat(self, call: Callable[[], None]) -> None:
        """Set what the heartbeat thread calls at each beat."""
        self._each_beat = call

    def on_each_phase(self, call: Callable[[Phase, int | None], None]) -> None:
        """Set what `phase` calls with its arguments, in the thread that begins the phase."""
        self._each_phase = call

    @property
    def last(self) -> Heartbeat:
        """Heartbeat that was written last."""
        return self._last

    def phase(self, name: Phase, step: int | None = None) -> None:
        """Begin a phase; `step` if it has changed. Naming the same phase again renews its start."""
        with self._lock:
            now, last = time.time(), self._last
            done = last.step if step is None else step
            first = step if last.first_step is None else last.first_step
            changes = last.changes + ((name, done) != (last.phase, last.step))
            self._write(replace(last, phase=name, step=done, since=now, at=now, first_step=first, changes=changes))
        if self._each_phase is not None:
            self._each_phase(name, step)

    def extend(self, seconds: float) -> None:
        """Renew the start of the phase at each beat for this long; 0 ends that."""
        with self._lock:
            self._extended_until = time.time() + seconds

    def exit_if_launcher_is_gone(self) -> None:
        """End this process at once if its launcher is gone, so that it reports no failure that follows from that."""
        if self._launcher and process_identity(int(self._launcher.split(":")[0])) != self._launcher:
            sys.stderr.write("the launcher of this run is gone: this rank ends too\n")
            sys.stderr.flush()
            os._exit(EXIT_LOST)

    def close(self) -> None:
        """Write that the process ends normally, and stop the thread."""
        if self._ended.is_set():
            return
        self.phase("end")
        self._ended.set()
        self._thread.join()
        self._memory.flush()  # else another host may see it only half a minute later
        self._memory.close()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self._renew()
            self.exit_if_launcher_is_gone()
            if self._write_report and self._request.exists():
                write_report, self._write_report = self._write_report, None
                write_report()
            self._each_beat()

    def _renew(self) -> None:
        with self._lock:
            now = time.time()
            since = now if now < self._extended_until else self._last.since
            self._write(replace(self._last, at=now, since=since))

    def _write(self, heartbeat: Heartbeat) -> None:
        self._last = heartbeat
        self._memory[:] = json.dumps(asdict(heartbeat)).encode().ljust(RECORD_BYTES)


def read_heartbeats(folder: Path) -> list[Heartbeat]:
    """Return the heartbeats of an attempt by rank; one that is being written is skipped."""
    heartbeats = []
    for path in folder.glob(HEARTBEATS):
        try:
            heartbeats.append(Heartbeat(**json.loads(path.read_bytes())))
        except (OSError, ValueError, TypeError):
            continue
    return sorted(heartbeats, key=lambda heartbeat: heartbeat.rank)


def with_grace(beat: Heartbeat, floor: float, hang_seconds: float) -> Heartbeat:
    """Return the heartbeat with its times moved to at least `floor`, and later by the extra time for a rank's start."""
    grace = max(0.0, START_SECONDS - hang_seconds) if beat.phase == "start" else 0.0
    return replace(beat, at=max(beat.at, floor) + grace, since=max(beat.since, floor) + grace)


def find_hung_rank(heartbeats: list[Heartbeat], now: float, timeout_seconds: float) -> Heartbeat | None:
    """Return the rank that the others wait for; None if there is no hang.

    A silent process (stopped, or its host gone) comes first. Otherwise, if every rank has been in its phase for longer
    than the timeout, it is the rank that is furthest behind, because the others wait for it in a collective. If all are
    in the same phase, it is the rank that entered it last. Ranks that fell silent meanwhile come before the others.
    """
    alive = [heartbeat for heartbeat in heartbeats if heartbeat.phase != "end"]
    silent = [heartbeat for heartbeat in alive if now - heartbeat.at > timeout_seconds]
    if silent:
        return min(silent, key=lambda heartbeat: heartbeat.at)
    if alive and all(now - heartbeat.since > timeout_seconds for heartbeat in alive):
        fell_silent = [heartbeat for heartbeat in alive if now - heartbeat.at > timeout_seconds / 2]
        return min(fell_silent or alive, key=lambda heartbeat: (heartbeat.changes, -heartbeat.since))
    return None


@dataclass(frozen=True)
class Process:
    """A process that exists on this host.

    Attributes:
        state: One letter, as in proc(5): R runs, S sleeps, D waits for a disk, T is stopped.
        started: Clock ticks from the start of the machine to that of the process; a later process with the same number
            has another value.
    """

    state: str
    started: int


def find_process(pid: int) -> Process | None:
    """Return the process with this number on this host; None if it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text[text.rindex(")") + 1 :].split()  # the name is in parentheses, and may contain anything
    return None if fields[0] in GONE else Process(fields[0], int(fields[19]))


def process_identity(pid: int) -> str:
    """Return the number and start of a process as text for an environment variable; empty if it has ended."""
    process = find_process(pid)
    return f"{pid}:{process.started}" if process else ""
