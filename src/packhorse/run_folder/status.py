"""status.json: what a run is doing, written by rank 0 and read by anybody."""

from __future__ import annotations

import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from packhorse.durable import replace_file
from packhorse.plan.run_plan import PlanPart
from packhorse.secrets import mask

STATUS_FILE = "status.json"

State = Literal["waiting", "prepared", "starting", "training", "stopped", "failed", "finished"]


class Status(PlanPart):
    """One moment of a run."""

    state: State
    step: int
    num_steps: int
    attempt: int
    message: str = ""
    """What a reader should know, in a sentence."""
    updated_at: str = ""
    """UTC, ISO 8601."""
    host: str = ""
    pid: int = 0
    """Process of rank 0."""


def write_status(run_folder: Path, status: Status) -> None:
    """Replaces status.json in one move, so that a reader never sees half of it."""
    stamped = status.model_copy(
        update={
            "message": mask(status.message),
            "updated_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
    )
    # Ranks that fail together all write it: each under a name of its own.
    writer = f".{socket.gethostname()}-{os.getpid()}"
    replace_file(run_folder / STATUS_FILE, stamped.model_dump_json(indent=2) + "\n", writer=writer, on_disk=False)


def read_status(run_folder: Path) -> Status | None:
    """Reads status.json; None where a run has not begun."""
    file = run_folder / STATUS_FILE
    return Status.model_validate_json(file.read_text(encoding="utf-8")) if file.is_file() else None
