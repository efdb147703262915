"""One launcher a run: RUN/launcher.lock says who runs it. Of a process that is gone it is taken over, of no other.

A job of Slurm holds it too, and by its text alone: no process of ours lives as long as the job, and one that was ended
hard leaves the text behind. Whether its ranks live is told by their heartbeats.
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
from typing import TextIO

from packhorse.errors import UserError
from packhorse.run_folder.attempts import last_sign_of_life

LOCK_FILE = "launcher.lock"
SILENT_SECONDS = 90.0
"""A job whose ranks are silent for so long has ended. On a shared disk a heartbeat is seen half a minute late."""


@contextmanager
def launcher_lock(run_folder: Path) -> Iterator[None]:
    """Holds the run for this process.

    The file stays; what counts is the lock on it, which the kernel takes back when its holder ends, however it ends.
    The text in it says who holds it: process, host, since when. Of another host it decides alone, since locks do not
    reach across every shared folder, and only that host can tell whether its process is gone.

    Raises:
        UserError: Another launcher runs it.
    """
    with _taken(run_folder, "") as file:
        try:
            yield
        finally:
            file.seek(0)
            file.truncate()


def lock_for_job(run_folder: Path, job: str, chain: str) -> None:
    """Holds the run for a job, until `release_job_lock` or, where that is never called, its ranks are silent.

    Args:
        run_folder: The run's.
        job: Number of the job.
        chain: Of the first of the jobs that go on with each other: they take it over at once.

    Raises:
        UserError: Another launcher or job runs it.
    """
    with _taken(run_folder, chain, {"job": job, "chain": chain}):
        pass


def release_job_lock(run_folder: Path, job: str) -> None:
    """Gives the run free, if this job holds it."""
    found = holder(run_folder)
    if found is not None and found.get("job") == job:
        (run_folder / LOCK_FILE).write_text("", encoding="utf-8")


@contextmanager
def _taken(run_folder: Path, chain: str, more: dict[str, str] | None = None) -> Iterator[TextIO]:
    """The file, locked, with who we are in it."""
    with (run_folder / LOCK_FILE).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _held(run_folder, holder(run_folder)) from None
        before = holder(run_folder)
        if before is not None and _lives(run_folder, before, chain):
            raise _held(run_folder, before)
        file.seek(0)
        file.truncate()
        since = datetime.now(UTC).isoformat(timespec="seconds")
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": since, **(more or {})}
        file.write(json.dumps(who) + "\n")
        file.flush()
        yield file


def _lives(run_folder: Path, holder: dict[str, object], chain: str) -> bool:
    if "job" not in holder:
        return holder["host"] != socket.gethostname()
    if chain and holder.get("chain") == chain:
        return False
    return time.time() - last_sign_of_life(run_folder) < SILENT_SECONDS


def holder(run_folder: Path) -> dict[str, object] | None:
    """Who wrote the lock file last and did not empty it: holds it, or was killed; None where nobody did."""
    try:
        found = json.loads((run_folder / LOCK_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"pid", "host", "since"} <= set(found) else None


def _held(run_folder: Path, holder: dict[str, object] | None) -> UserError:
    if holder is not None and "job" in holder:
        return UserError(
            f"{run_folder.name} is run by job {holder['job']} of Slurm since {holder['since']}.",
            "two launchers on one run folder would write over each other's checkpoints and figures.",
            f"wait for it, or end it with `scancel {holder['job']}`; a job that was ended hard counts as gone when its "
            f"ranks are silent for {SILENT_SECONDS:.0f} s.",
        )
    who = f"process {holder['pid']} on {holder['host']} since {holder['since']}" if holder else "another process"
    return UserError(
        f"{run_folder.name} is run by {who}.",
        "two launchers on one run folder would write over each other's checkpoints and figures.",
        f"wait for it, or stop it with Ctrl-C there; if {holder['host'] if holder else 'that host'} is gone for good,"
        f" remove {run_folder / LOCK_FILE}.",
    )
