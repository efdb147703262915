"""Submit the jobs of a run, and look up their states."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from packhorse.launching.slurm.client import JobState, SlurmClient
from packhorse.run_folder.jobs import JobKind, JobRecord, read_jobs


def submit_job(
    words: Sequence[str], kind: JobKind, depends_on: tuple[str, ...], expected_start: float | None = None
) -> JobRecord:
    """Submit a job and return its record, which is not written yet.

    Args:
        words: Options of sbatch, the script, and its arguments.
        kind: What the job does.
        depends_on: Jobs that must succeed before it begins.
        expected_start: Start that Slurm predicted; Unix seconds.

    Raises:
        NoSlurmError: This machine has no Slurm.
        SlurmError: Slurm refuses the job.
    """
    return JobRecord(
        job_id=SlurmClient().submit(words),
        kind=kind,
        submitted_at=time.time(),
        argv=("sbatch", "--parsable", *words),
        depends_on=depends_on,
        expected_start=expected_start,
    )


def live_jobs(run_folder: Path) -> list[tuple[JobRecord, JobState]]:
    """Return the run's jobs that are pending or running; each task of an array has a separate entry.

    Raises:
        NoSlurmError: This machine has no Slurm, and the run has jobs.
        SlurmError: Slurm does not answer.
    """
    records = read_jobs(run_folder)
    return [(record, state) for record, state in with_states(records) if state is not None and state.is_live]


def with_states(records: Sequence[JobRecord]) -> list[tuple[JobRecord, JobState | None]]:
    """Return each job with its state in Slurm, or None if Slurm has forgotten the job.

    Raises:
        NoSlurmError: This machine has no Slurm, and there are jobs.
        SlurmError: Slurm does not answer.
    """
    states = SlurmClient().job_states([record.job_id for record in records]) if records else {}
    pairs: list[tuple[JobRecord, JobState | None]] = []
    for record in records:
        number = record.job_id.partition("_")[0]
        own = [state for state in states.values() if state.job_id.partition("_")[0] == number]
        pairs += [(record, state) for state in own] or [(record, None)]
    return pairs
