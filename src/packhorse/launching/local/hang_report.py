"""What the ranks of a hang can still say: their Python stacks, and the collectives that they stand in.

SIGUSR1 makes faulthandler write stacks-R.txt; for collectives-R.json the thread that beats looks for a file.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from packhorse.run_folder.heartbeat import BEAT_SECONDS, STOPPED, Heartbeat, find_process
from packhorse.run_folder.layout import REPORT_REQUEST_FILE, collectives_name, stacks_name

STACK_SECONDS = 1.0
COLLECTIVE_SECONDS = 1.0 + BEAT_SECONDS
INNERMOST = 3
OURS = "/packhorse/"
MAIN_THREAD = "run_worker"
"""Function that only the main thread of a rank is in."""


def request_hang_report(logs: Path, ranks: Iterable[Heartbeat], hang: bool) -> None:
    """Lets these ranks write what they know, and waits a second or two at most; one that is stopped cannot.

    Args:
        logs: The attempt's log folder.
        ranks: Those that live.
        hang: Ask for collectives too; where a rank is dead, the others do not stand in one for long.
    """
    awaited = []
    if hang:
        (logs / REPORT_REQUEST_FILE).touch()
    for rank in ranks:
        found = find_process(rank.pid)
        if found is not None and found.state not in STOPPED:
            with suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGUSR1)
                awaited += [_stacks(logs, rank.rank)] + ([_collectives(logs, rank.rank)] if hang else [])
    end = time.monotonic() + (COLLECTIVE_SECONDS if hang else STACK_SECONDS)
    while not all(path.is_file() and path.stat().st_size for path in awaited) and time.monotonic() < end:
        time.sleep(0.05)


def read_stack(logs: Path, rank: int) -> list[str]:
    """Where a rank's main thread stood: the innermost frames, then those of Packhorse; empty where it is not known."""
    try:
        text = _stacks(logs, rank).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    threads = [block.splitlines()[1:] for block in text.split("\n\n") if MAIN_THREAD in block]
    if not threads:
        return []
    frames = [line.strip() for line in threads[0] if line.startswith("  File ")]
    return frames[:INNERMOST] + [frame for frame in frames[INNERMOST:] if OURS in frame]


def collectives(logs: Path) -> list[str]:
    """Which collective each rank stands in, a line a rank and backend; of those that could say so."""
    lines = []
    for path in sorted(logs.glob("collectives-*.json")):
        for found in json.loads(path.read_text(encoding="utf-8")).values():
            waiting = [entry for entry in found.get("entries", []) if not entry["retired"]]
            if waiting:
                last = waiting[-1]
                place = f"number {last['collective_seq_id']} of group {last['process_group'][1]}"
                lines.append(f"{path.stem.replace('collectives-', 'rank ')} in {last['profiling_name']}, {place}")
    return lines


def _stacks(logs: Path, rank: int) -> Path:
    return logs / stacks_name(rank)


def _collectives(logs: Path, rank: int) -> Path:
    return logs / collectives_name(rank)
