"""What a run does now: its ranks, its launcher and its jobs."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from pathlib import Path

from packhorse.launching.slurm.client import JobState, NoSlurmError, SlurmError
from packhorse.launching.slurm.job_reports import JobReport, read_ends, report_jobs
from packhorse.launching.slurm.jobs import with_states
from packhorse.plan.run_plan import read_plan
from packhorse.run_folder.attempts import AttemptRecord, has_ended, read_attempts
from packhorse.run_folder.heartbeat import Heartbeat, find_process, read_heartbeats
from packhorse.run_folder.jobs import JobRecord, read_jobs
from packhorse.run_folder.layout import attempt_logs
from packhorse.run_folder.lock import lock_holder
from packhorse.run_folder.status import read_status

HEARTBEAT_SECONDS = 60.0
"""A rank on another host counts as alive if its heartbeat is not older."""


def read_stages(run_folder: Path) -> tuple[list[JobReport], str]:
    """Return the jobs of a run with their results, and why Slurm does not answer; empty if it does."""
    records = read_jobs(run_folder)
    try:
        jobs = with_states(records)
    except (NoSlurmError, SlurmError) as error:
        return stages_of_run(run_folder, [(record, None) for record in records], asked=False), error.mistakes[0].fact
    return stages_of_run(run_folder, jobs, asked=True), ""


def stages_of_run(run_folder: Path, jobs: Sequence[tuple[JobRecord, JobState | None]], asked: bool) -> list[JobReport]:
    """Return the results of jobs of a run.

    Args:
        run_folder: Folder of the run.
        jobs: Jobs of the run, with their state in Slurm.
        asked: Whether Slurm has answered.
    """
    if not jobs:
        return []
    has_data = read_plan(run_folder).data is not None
    return report_jobs(jobs, read_ends(run_folder), read_status(run_folder), has_data, asked)


def is_under_way(folder: Path) -> bool:
    """Return whether a rank or a launcher of the run is alive, or a job of it waits or runs."""
    attempts = read_attempts(folder)
    stages, _ = read_stages(folder)
    return (
        ranks_live(folder, attempts, newest_heartbeats(folder, attempts))
        or is_held(folder)
        or any(stage.condition in ("waits", "runs") for stage in stages)
    )


def newest_heartbeats(folder: Path, attempts: Sequence[AttemptRecord]) -> list[Heartbeat]:
    """Return the heartbeats of the newest attempt."""
    return read_heartbeats(attempt_logs(folder, attempts[-1].attempt)) if attempts else []


def ranks_live(folder: Path, attempts: Sequence[AttemptRecord], beats: Sequence[Heartbeat]) -> bool:
    """Return whether a rank of the newest attempt is alive."""
    return any(map(_is_alive, beats)) and not has_ended(folder, attempts[-1].attempt)


def is_held(folder: Path) -> bool:
    """Return whether a launcher runs the run, for example between two attempts."""
    launcher = lock_holder(folder)
    if launcher is None or "job" in launcher:  # whether a job is alive, Slurm and the heartbeats show
        return False
    return launcher["host"] != socket.gethostname() or find_process(int(str(launcher["pid"]))) is not None


def _is_alive(beat: Heartbeat) -> bool:
    if beat.phase == "end":
        return False
    if beat.host == socket.gethostname():
        return find_process(beat.pid) is not None
    return time.time() - beat.at < HEARTBEAT_SECONDS
