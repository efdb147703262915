"""`packhorse cancel RUN`: a run that trains saves and stops, and what waits for it is taken out of the queue."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from packhorse.errors import EXIT_OK, UserError
from packhorse.launching.lock import holder
from packhorse.launching.run_folder import open_run, relative
from packhorse.launching.slurm.chain import CANCEL_FILE
from packhorse.launching.slurm.client import JobState
from packhorse.launching.slurm.client import cancel as cancel_jobs
from packhorse.launching.slurm.jobs import JobRecord, live_jobs, read_jobs
from packhorse.launching.slurm.sweep_folder import find_sweep, member_folder
from packhorse.record.processes import process
from packhorse.record.requests import STOP_FILE

Live = tuple[JobRecord, JobState]


def cancel(run: str, now: bool = False) -> int:
    """Ends a run, or all runs of a sweep, so that it can be gone on with.

    Args:
        run: Name or folder of the run.
        now: At once, without a save.

    Raises:
        UserError: There is no such run, nothing of it waits or runs, or Slurm does not answer.
    """
    sweep = find_sweep(run)
    folder = sweep or Path(open_run(run).run_folder)
    live = live_jobs(folder) if read_jobs(folder) else []
    said = _cancel_jobs(folder, live, sweep is not None, now) if live else []
    if sweep is None and not live:
        said += _cancel_launcher(folder, now)
    if not said:
        raise UserError(
            f"nothing of {relative(folder)} runs or waits.",
            "there is nothing to end.",
            f"see `packhorse status {relative(folder)}` for where it stands.",
        )
    console = Console()
    for line in said:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    return EXIT_OK


def _cancel_jobs(folder: Path, live: Sequence[Live], of_sweep: bool, now: bool) -> list[str]:
    """Marks the runs first, so that no job that ends meanwhile begins another; those that train may save."""
    saving = [state for record, state in live if record.kind == "train" and state.state == "RUNNING" and not now]
    others = [state for _, state in live if state not in saving]
    for _, state in live:
        for run in _runs_of(folder, state) if of_sweep else [folder]:
            (run / CANCEL_FILE).touch()
            if state in saving:
                (run / STOP_FILE).touch()
    if others:
        # What waits for a job goes before it, or Slurm would name it as broken.
        cancel_jobs([state.job_id for state in reversed(others)])
    lines = [f"job {state.job_id} is asked to save and to end; --now ends it at once" for state in saving]
    lines += [f"job {state.job_id} is cancelled; it was {state.state.lower()}" for state in others]
    return [*lines, f"to go on: packhorse resume {relative(folder)}"]


def _runs_of(sweep: Path, state: JobState) -> list[Path]:
    """The run of one task; of tasks that wait together, none: they begin nothing once they are out of the queue."""
    task = state.job_id.partition("_")[2]
    return [member_folder(sweep, int(task))] if task.isdecimal() else []


def _cancel_launcher(folder: Path, now: bool) -> list[str]:
    """A run that `packhorse train` runs: on this host by signals, elsewhere by the file that its ranks look for."""
    found = holder(folder)
    if found is None or "job" in found:
        return []
    pid, here = int(str(found["pid"])), found["host"] == socket.gethostname()
    if here and process(pid) is None:
        return []
    if now and not here:
        raise UserError(
            f"{relative(folder)} is run by process {pid} on {found['host']}.",
            "only on that host can it be ended at once.",
            "leave --now out: its ranks then save and stop; or type the command there.",
        )
    if not here:
        (folder / STOP_FILE).touch()
        return [f"the ranks of process {pid} on {found['host']} are asked to save and stop"]
    # Two of one kind could reach it as one.
    for number in (signal.SIGTERM, signal.SIGINT)[: 1 + now]:
        os.kill(pid, number)
    how = "ends its ranks at once" if now else "is asked to save and stop"
    return [f"process {pid} {how}; to go on: packhorse train {relative(folder)} --resume"]
