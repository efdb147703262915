"""Request and read what the ranks of a hang can still report: their Python stacks and pending collectives.

SIGUSR1 makes faulthandler write stacks-R.txt. A thread writes collectives-R.json once the request file exists.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from packhorse.run_folder.heartbeat import BEAT_SECONDS, STOPPED, Heartbeat, find_process
from packhorse.run_folder.layout import COLLECTIVES, REPORT_REQUEST_FILE, STACKS, numbered

STACK_SECONDS: Final = 1.0
COLLECTIVE_SECONDS: Final = 1.0 + BEAT_SECONDS
NUM_INNERMOST: Final = 3
OWN_FRAME: Final = "/packhorse/"
MAIN_THREAD: Final = "run_worker"
"""Function that is only on the stack of a rank's main thread."""


def request_hang_report(logs: Path, ranks: Iterable[Heartbeat], hang: bool) -> None:
    """Let these ranks write their reports, and wait for them, two seconds at most; a stopped process cannot write.

    Args:
        logs: Log folder of the attempt.
        ranks: Ranks that live.
        hang: Request collectives too; after the death of a rank the others do not wait in one for long.
    """
    awaited = []
    if hang:
        (logs / REPORT_REQUEST_FILE).touch()
    for rank in ranks:
        process = find_process(rank.pid)
        if process is not None and process.state not in STOPPED:
            with suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGUSR1)
                awaited.append(logs / numbered(STACKS, rank.rank))
                if hang:
                    awaited.append(logs / numbered(COLLECTIVES, rank.rank))
    end = time.monotonic() + (COLLECTIVE_SECONDS if hang else STACK_SECONDS)
    while not all(path.is_file() and path.stat().st_size for path in awaited) and time.monotonic() < end:
        time.sleep(0.05)


def read_stack(logs: Path, rank: int) -> list[str]:
    """Return the stack of a rank's main thread: the innermost frames, then those of Packhorse; empty if unknown."""
    try:
        text = (logs / numbered(STACKS, rank)).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    threads = [block.splitlines()[1:] for block in text.split("\n\n") if MAIN_THREAD in block]
    if not threads:
        return []
    frames = [line.strip() for line in threads[0] if line.startswith("  File ")]
    return frames[:NUM_INNERMOST] + [frame for frame in frames[NUM_INNERMOST:] if OWN_FRAME in frame]


def read_collectives(logs: Path) -> list[str]:
    """Return the collective that each rank waits in, one line per rank and backend, for ranks that wrote a report."""
    lines = []
    for path in sorted(logs.glob(COLLECTIVES)):
        for backend in json.loads(path.read_text(encoding="utf-8")).values():
            waiting = [entry for entry in backend.get("entries", []) if not entry["retired"]]
            if waiting:
                last = waiting[-1]
                place = f"number {last['collective_seq_id']} of group {last['process_group'][1]}"
                lines.append(f"{path.stem.replace('collectives-', 'rank ')} in {last['profiling_name']}, {place}")
    return lines
