"""RUN/launcher.lock: one launcher per run. The lock of a process that is gone is taken over, no other.

A Slurm job holds the lock too, but by the text of the file alone: no process of Packhorse lives as long as the job, and
a killed job leaves the text behind. The heartbeats of its ranks then show whether the job lives.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TextIO

from packhorse.errors import UserError
from packhorse.run_folder.attempts import last_sign_of_life
from packhorse.run_folder.layout import LOCK_FILE

SILENT_SECONDS: Final = 90.0
"""A job whose ranks are silent for this long has ended. On a shared disk a heartbeat is seen half a minute late."""
WHY: Final = "two launchers on one run folder would overwrite each other's checkpoints and metrics."


@contextmanager
def launcher_lock(run_folder: Path) -> Iterator[None]:
    """Hold the run for this process.

    The kernel releases the lock on the file when its holder ends, however it ends. The file stays, and its text says
    who holds it. The text of another host counts without a lock: locks do not reach across every shared folder, and
    only that host knows whether its process is gone.

    Raises:
        UserError: Another launcher or job runs it.
    """
    with _taken(run_folder, "") as file:
        try:
            yield
        finally:
            file.seek(0)
            file.truncate()


def lock_for_job(run_folder: Path, job: str, chain: str) -> None:
    """Hold the run for a job, until `release_job_lock` or until its ranks are silent.

    Args:
        run_folder: Folder of the run.
        job: Number of the job.
        chain: First of the jobs that continue each other; they take the lock over at once.

    Raises:
        UserError: Another launcher or job runs it.
    """
    with _taken(run_folder, chain, {"job": job, "chain": chain}):
        pass


def release_job_lock(run_folder: Path, job: str) -> None:
    """Release the run if this job holds it."""
    holder = lock_holder(run_folder)
    if holder is not None and holder.get("job") == job:
        (run_folder / LOCK_FILE).write_text("", encoding="utf-8")


def lock_holder(run_folder: Path) -> dict[str, object] | None:
    """Return what the lock file says of its holder, which may have been killed; None if it is empty or damaged."""
    try:
        holder = json.loads((run_folder / LOCK_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return holder if isinstance(holder, dict) and {"pid", "host", "since"} <= set(holder) else None


@contextmanager
def _taken(run_folder: Path, chain: str, more: dict[str, str] | None = None) -> Iterator[TextIO]:
    """Lock the file and write its holder into it."""
    with (run_folder / LOCK_FILE).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _held_error(run_folder, lock_holder(run_folder)) from None
        before = lock_holder(run_folder)
        if before is not None and _is_alive(run_folder, before, chain):
            raise _held_error(run_folder, before)
        file.seek(0)
        file.truncate()
        since = datetime.now(UTC).isoformat(timespec="seconds")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since, **(more or {})}
        file.write(json.dumps(holder) + "\n")
        file.flush()
        yield file


def _is_alive(run_folder: Path, holder: dict[str, object], chain: str) -> bool:
    if "job" not in holder:
        return holder["host"] != socket.gethostname()
    if chain and holder.get("chain") == chain:
        return False
    return time.time() - last_sign_of_life(run_folder) < SILENT_SECONDS


def _held_error(run_folder: Path, holder: dict[str, object] | None) -> UserError:
    if holder is not None and "job" in holder:
        return UserError(
            f"{run_folder.name} is run by job {holder['job']} of Slurm since {holder['since']}.",
            WHY,
            f"wait for it, or end it with `scancel {holder['job']}`; a job that was killed counts as gone once its "
            f"ranks have been silent for {SILENT_SECONDS:.0f} s.",
        )
    who = f"process {holder['pid']} on {holder['host']} since {holder['since']}" if holder else "another process"
    return UserError(
        f"{run_folder.name} is run by {who}.",
        WHY,
        "wait for it, or stop it with Ctrl-C there; "
        f"if {holder['host'] if holder else 'that host'} is permanently gone, remove {run_folder / LOCK_FILE}.",
    )
