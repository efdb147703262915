"""The processes of one run on this host: its launcher's child, and its ranks."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from packhorse.errors import UserError
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.folder import relative
from packhorse.run_folder.heartbeat import LAUNCHER_VARIABLE

GONE_SECONDS = 10.0


def processes_of(plan: RunPlan) -> list[int]:
    """The process numbers of this run's `accelerate launch` and ranks.

    torch's agent gives each rank a session of its own, so that no process group holds them all; their command lines
    end in the launched script and this run's plan, and nobody else's do.
    """
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        if is_of(plan, int(process.name)):
            found.append(int(process.name))
    return found


def is_of(plan: RunPlan, pid: int) -> bool:
    """Whether this process lives and belongs to the run."""
    last_words = [os.fsencode(word) for word in plan.argv[-2:]]
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")  # of a zombie: empty
    except OSError:
        return False
    return words[-3:-1] == last_words


def end_processes(plan: RunPlan) -> None:
    """Ends all of this run's processes on this host at once, and waits until they are gone, with what they held."""
    end = time.monotonic() + GONE_SECONDS
    while (left := processes_of(plan)) and time.monotonic() < end:
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)


def end_orphans(plan: RunPlan) -> None:
    """Ends what a launcher that is gone has left of this run; called by the one that holds the run's lock.

    Raises:
        UserError: Ranks run that no launcher of ours has started.
    """
    for process in processes_of(plan):
        with suppress(OSError):
            if f"{LAUNCHER_VARIABLE}=".encode() not in Path(f"/proc/{process}/environ").read_bytes():
                raise UserError(
                    f"{relative(plan.run_folder)} is run by process {process}, which `accelerate launch` started here.",
                    "two launches on one run folder would write over each other's checkpoints and figures.",
                    f"wait for it, or stop it: touch {relative(plan.run_folder)}/STOP",
                )
    end_processes(plan)
