"""Submit the jobs of a run, look up their states, and link jobs that depend on each other."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from packhorse.launching.slurm.client import JobState, SlurmClient
from packhorse.launching.slurm.job_reports import KINDS_IN_ORDER, JobReport
from packhorse.run_folder.jobs import JobKind, JobRecord, append_job, read_jobs
from packhorse.run_folder.lock import lock_holder, release_job_lock

DEPENDENCY_OPTIONS: Final = ("--dependency", "--kill-on-invalid-dep", "--parsable")


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


def dependency_options(depends_on: Sequence[str]) -> list[str]:
    """Return options of sbatch: start after these jobs succeed, and leave the queue if one of them fails."""
    return [f"--dependency=afterok:{':'.join(depends_on)}", "--kill-on-invalid-dep=yes"] if depends_on else []


def unfinished_jobs(reports: Sequence[JobReport]) -> list[JobRecord]:
    """Return the newest job of each kind from the first that is not done, as originally submitted."""
    newest = {report.record.kind: report for report in reports if report.condition != "replaced"}
    chain = [newest[kind] for kind in KINDS_IN_ORDER if kind in newest]
    first = next((number for number, report in enumerate(chain) if report.condition != "done"), len(chain))
    records = {report.record.job_id: report.record for report in reports}
    return [_original(report.record, records) for report in chain[first:]]


def _original(record: JobRecord, records: Mapping[str, JobRecord]) -> JobRecord:
    """Return the job at the start of a line of successors: only its script is in the run folder."""
    while record.goes_on_from is not None and record.goes_on_from in records:
        record = records[record.goes_on_from]
    return record


def resubmit(run_folder: Path, records: Sequence[JobRecord]) -> list[JobRecord]:
    """Submit jobs with their original arguments, each to start after the previous one succeeds.

    Raises:
        NoSlurmError: There is no Slurm here.
        SlurmError: Slurm refuses a job; the jobs before it stay submitted.
    """
    submitted: list[JobRecord] = []
    for record in records:
        depends_on = tuple(job.job_id for job in submitted[-1:])
        arguments = [word for word in record.argv[1:] if word.partition("=")[0] not in DEPENDENCY_OPTIONS]
        job = submit_job([*dependency_options(depends_on), *arguments], record.kind, depends_on)
        append_job(run_folder, job)
        submitted.append(job)
    return submitted


def release_ended(run_folder: Path) -> None:
    """Release the run's lock if its holder is a job that has ended in Slurm: a killed job could not release it.

    Raises:
        NoSlurmError: There is no Slurm here, and a job holds the lock.
        SlurmError: Slurm does not answer.
    """
    lock = lock_holder(run_folder)
    if lock is None or "job" not in lock:
        return
    job_id = str(lock["job"])
    states = SlurmClient().job_states([job_id]).values()  # an array task has another name there than `job_id`
    if states and not any(state.is_live for state in states):
        release_job_lock(run_folder, job_id)


def link_successor(run_folder: Path, job_id: str, successor: str) -> list[str]:
    """Make jobs that wait for a training job start after either that job or its successor succeeds.

    At a site that forbids requeue, each training job submits its successor when it starts.

    Args:
        run_folder: Folder of the run.
        job_id: The job that trains now.
        successor: The job that starts if that one fails.

    Returns:
        The jobs whose dependency was changed.

    Raises:
        NoSlurmError: There is no Slurm here.
        SlurmError: Slurm refuses, or does not answer.
    """
    predecessors = {record.job_id: record.goes_on_from for record in read_jobs(run_folder)}
    line = {job_id}
    predecessor = predecessors.get(job_id)
    while predecessor is not None:
        line.add(predecessor)
        predecessor = predecessors.get(predecessor)
    waiting = [record for record, state in live_jobs(run_folder) if state.is_waiting and line & {*record.depends_on}]
    for record in waiting:
        SlurmClient().depend_on_any(record.job_id, [job_id, successor])
    return [record.job_id for record in waiting]
