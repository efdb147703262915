"""`packhorse cancel RUN`: a run that trains saves and stops, and what waits for it is taken out of the queue."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from packhorse.errors import EXIT_OK, UserError
from packhorse.launching.slurm.client import JobState
from packhorse.launching.slurm.job_reports import jobs_of_runs
from packhorse.launching.slurm.jobs import live_jobs
from packhorse.run_folder.folder import open_run, relative
from packhorse.run_folder.heartbeat import find_process
from packhorse.run_folder.jobs import JobRecord, read_jobs
from packhorse.run_folder.layout import CANCEL_FILE, STOP_FILE
from packhorse.run_folder.lock import lock_holder
from packhorse.run_folder.sweep import find_sweep


@dataclass(frozen=True)
class Live:
    """A job that waits or runs, and the run that it is for."""

    run: Path
    record: JobRecord
    state: JobState


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
    live = _live_of_sweep(sweep) if sweep is not None else [Live(folder, *each) for each in _live_of_run(folder)]
    said = _cancel_jobs(folder, live, now) if live else []
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


def _live_of_run(folder: Path) -> list[tuple[JobRecord, JobState]]:
    return live_jobs(folder) if read_jobs(folder) else []


def _live_of_sweep(sweep: Path) -> list[Live]:
    return [
        Live(run, record, state)
        for run, jobs in jobs_of_runs(sweep).items()
        for record, state in jobs
        if state is not None and state.is_live
    ]


def _cancel_jobs(folder: Path, live: Sequence[Live], now: bool) -> list[str]:
    """Marks the runs first, so that no job that ends meanwhile begins another; those that train may save."""
    saving = [each for each in live if each.record.kind == "train" and each.state.state == "RUNNING" and not now]
    others = [each for each in live if each not in saving]
    for each in live:
        (each.run / CANCEL_FILE).touch()
        if each in saving:
            (each.run / STOP_FILE).touch()
    # One job may prepare the data of many runs. What waits for a job goes before it, or Slurm would name it as broken.
    ended = {each.record.job_id: each.state.state.lower() for each in reversed(others)}
    if ended:
        SlurmClient().cancel(list(ended))
    lines = [f"job {each.record.job_id} is asked to save and to end; --now ends it at once" for each in saving]
    lines += [f"job {job_id} is cancelled; it was {state}" for job_id, state in reversed(ended.items())]
    return [*lines, f"to go on: packhorse resume {relative(folder)}"]


def _cancel_launcher(folder: Path, now: bool) -> list[str]:
    """A run that `packhorse train` runs: on this host by signals, elsewhere by the file that its ranks look for."""
    found = lock_holder(folder)
    if found is None or "job" in found:
        return []
    pid, here = int(str(found["pid"])), found["host"] == socket.gethostname()
    if here and find_process(pid) is None:
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
    return [f"process {pid} {how}; to go on: packhorse resume {relative(folder)}"]
