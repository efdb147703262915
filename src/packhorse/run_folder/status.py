"""RUN/status.json: what a run is doing, written by rank 0 and the launcher."""

from __future__ import annotations

import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from packhorse.durable import replace_file
from packhorse.plan.run_plan import PlanPart
from packhorse.run_folder.layout import STATUS_FILE
from packhorse.secrets import mask

State = Literal["waiting", "prepared", "starting", "training", "stopped", "failed", "finished"]


class Status(PlanPart):
    """State of a run at one moment."""

    state: State
    step: int
    num_steps: int
    attempt: int
    message: str = ""
    """One sentence for the user."""
    updated_at: str = ""
    """UTC, ISO 8601."""
    host: str = ""
    pid: int = 0
    """Process that wrote the status."""


def write_status(run_folder: Path, status: Status) -> None:
    """Replace status.json with one rename, so that a reader never sees half of it."""
    stamped = status.model_copy(
        update={
            "message": mask(status.message),
            "updated_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
    )
    # Ranks that fail together all write it: each needs a separate draft file.
    writer = f".{socket.gethostname()}-{os.getpid()}"
    replace_file(run_folder / STATUS_FILE, stamped.model_dump_json(indent=2) + "\n", writer=writer, on_disk=False)


def read_status(run_folder: Path) -> Status | None:
    """Return the status of a run; None before it has one."""
    file = run_folder / STATUS_FILE
    return Status.model_validate_json(file.read_text(encoding="utf-8")) if file.is_file() else None
