"""One launcher a run: RUN/launcher.lock says who runs it. Of a process that is gone it is taken over, of no other."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from packhorse.errors import UserError

LOCK_FILE = "launcher.lock"


@contextmanager
def only_launcher(run_folder: Path) -> Iterator[None]:
    """Holds the run for this process.

    The file stays; what counts is the lock on it, which the kernel takes back when its holder ends, however it ends.
    The text in it says who holds it: process, host, since when. Of another host it decides alone, since locks do not
    reach across every shared folder, and only that host can tell whether its process is gone.

    Raises:
        UserError: Another launcher runs it.
    """
    with (run_folder / LOCK_FILE).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _held(run_folder, holder(run_folder)) from None
        before = holder(run_folder)
        if before is not None and before["host"] != socket.gethostname():
            raise _held(run_folder, before)
        file.seek(0)
        file.truncate()
        since = datetime.now(UTC).isoformat(timespec="seconds")
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n")
        file.flush()
        try:
            yield
        finally:
            file.seek(0)
            file.truncate()


def holder(run_folder: Path) -> dict[str, object] | None:
    """Who wrote the lock file last and did not empty it: holds it, or was killed; None where nobody did."""
    try:
        found = json.loads((run_folder / LOCK_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"pid", "host", "since"} <= set(found) else None


def _held(run_folder: Path, holder: dict[str, object] | None) -> UserError:
    who = f"process {holder['pid']} on {holder['host']} since {holder['since']}" if holder else "another process"
    return UserError(
        f"{run_folder.name} is run by {who}.",
        "two launchers on one run folder would write over each other's checkpoints and figures.",
        f"wait for it, or stop it with Ctrl-C there; if {holder['host'] if holder else 'that host'} is gone for good,"
        f" remove {run_folder / LOCK_FILE}.",
    )
