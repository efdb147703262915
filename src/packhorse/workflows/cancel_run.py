"""Stop a run so that it can be resumed: training saves and stops, waiting jobs leave the queue."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packhorse.errors import UserError
from packhorse.launching.slurm.client import JobState, SlurmClient
from packhorse.launching.slurm.job_reports import jobs_of_runs
from packhorse.launching.slurm.jobs import live_jobs
from packhorse.run_folder.folder import open_run, relative
from packhorse.run_folder.heartbeat import find_process
from packhorse.run_folder.jobs import JobRecord, read_jobs
from packhorse.run_folder.layout import CANCEL_FILE, STOP_FILE
from packhorse.run_folder.lock import lock_holder
from packhorse.run_folder.sweep import find_sweep


@dataclass(frozen=True)
class LiveJob:
    """A job that waits or runs.

    Attributes:
        run: Folder of its run.
        record: Record of its submission.
        state: State in Slurm.
    """

    run: Path
    record: JobRecord
    state: JobState


def cancel(run: str, now: bool = False) -> list[str]:
    """Stop a run, or all runs of a sweep; return what was done, one line each.

    Args:
        run: Name or folder of the run or sweep.
        now: Whether to stop at once, without saving.

    Raises:
        UserError: There is no such run, nothing of it waits or runs, or Slurm does not answer.
    """
    sweep = find_sweep(run)
    folder = sweep or Path(open_run(run).run_folder)
    live = _live_jobs(folder, is_sweep=sweep is not None)
    lines = _cancel_jobs(folder, live, now) if live else []
    if sweep is None and not live:
        lines = _cancel_launcher(folder, now)
    if not lines:
        raise UserError(
            f"nothing of {relative(folder)} runs or waits.",
            "there is nothing to stop.",
            f"see `packhorse status {relative(folder)}`.",
        )
    return lines


def _live_jobs(folder: Path, is_sweep: bool) -> list[LiveJob]:
    if not is_sweep:
        return [LiveJob(folder, *job) for job in live_jobs(folder)] if read_jobs(folder) else []
    return [
        LiveJob(run, record, state)
        for run, jobs in jobs_of_runs(folder).items()
        for record, state in jobs
        if state is not None and state.is_live
    ]


def _cancel_jobs(folder: Path, live: Sequence[LiveJob], now: bool) -> list[str]:
    """Mark the runs first, so that no job that ends meanwhile starts another; running training may save."""
    saving = [job for job in live if job.record.kind == "train" and job.state.state == "RUNNING" and not now]
    others = [job for job in live if job not in saving]
    for job in live:
        (job.run / CANCEL_FILE).touch()
        if job in saving:
            (job.run / STOP_FILE).touch()
    # One job may prepare the data of many runs. A waiting job is cancelled before the job that it waits for, or Slurm
    # would report its dependency as broken.
    ended = {job.record.job_id: job.state.state.lower() for job in reversed(others)}
    if ended:
        SlurmClient().cancel(list(ended))
    lines = [f"job {job.record.job_id} is asked to save and stop; --now stops it at once" for job in saving]
    lines += [f"job {job_id} is cancelled; it was {state}" for job_id, state in reversed(ended.items())]
    return [*lines, f"to resume: packhorse resume {relative(folder)}"]


def _cancel_launcher(folder: Path, now: bool) -> list[str]:
    """Stop a run of `packhorse train`: on this host by signals, elsewhere by the file that its ranks look for."""
    launcher = lock_holder(folder)
    if launcher is None or "job" in launcher:
        return []
    pid, here = int(str(launcher["pid"])), launcher["host"] == socket.gethostname()
    if here and find_process(pid) is None:
        return []
    if now and not here:
        raise UserError(
            f"{relative(folder)} is run by process {pid} on {launcher['host']}.",
            "it can be stopped at once only on that host.",
            "remove --now, then its ranks save and stop; or type the command on that host.",
        )
    if not here:
        (folder / STOP_FILE).touch()
        return [f"the ranks of process {pid} on {launcher['host']} are asked to save and stop"]
    # Two signals of one kind could arrive as one.
    for number in (signal.SIGTERM, signal.SIGINT)[: 1 + now]:
        os.kill(pid, number)
    how = "ends its ranks at once" if now else "is asked to save and stop"
    return [f"process {pid} {how}; to resume: packhorse resume {relative(folder)}"]
