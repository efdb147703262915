"""RUN/jobs.jsonl: the jobs that were submitted for a run, a line each, and what has become of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from packhorse.errors import UserError
from packhorse.launching.slurm.client import JobState, SlurmClient
from packhorse.plan.run_plan import PlanPart, RunPlan
from packhorse.run_folder.folder import relative
from packhorse.run_folder.json_lines import append_line, read_lines

JOBS_FILE: Final = "jobs.jsonl"

Kind = Literal["prepare", "train", "evaluate", "verify", "doctor"]


class JobRecord(PlanPart):
    """One job as it was submitted; times in Unix seconds."""

    job_id: str
    kind: Kind
    submitted_at: float
    argv: tuple[str, ...]
    """The whole command, `sbatch` first."""
    depends_on: tuple[str, ...] = ()
    """Jobs that must end well before it begins."""
    expected_start: float | None = None
    """When Slurm thought that it may begin, before it was submitted."""
    goes_on_from: str | None = None
    """The job whose work it goes on with, where the site lets no job be queued again."""


def submit_job(
    words: Sequence[str], kind: Kind, depends_on: tuple[str, ...], expected_start: float | None = None
) -> JobRecord:
    """Submits a job.

    Args:
        words: Options of sbatch, the script, and its arguments.
        kind: What it does.
        depends_on: Jobs that must end well before it begins.
        expected_start: When Slurm thought that it may begin; Unix seconds.

    Raises:
        NoSlurmError: There is no Slurm here.
        SlurmError: It is refused.
    """
    return JobRecord(
        job_id=SlurmClient().submit(words),
        kind=kind,
        submitted_at=time.time(),
        argv=("sbatch", "--parsable", *words),
        depends_on=depends_on,
        expected_start=expected_start,
    )


def append_job(run_folder: Path, record: JobRecord) -> None:
    """Adds a line, and waits until it is on disk."""
    append_line(run_folder / JOBS_FILE, record)


def read_jobs(run_folder: Path) -> list[JobRecord]:
    """All jobs in the order in which they were submitted; a line that was torn is left out."""
    return read_lines(run_folder / JOBS_FILE, JobRecord)


def live_jobs(run_folder: Path) -> list[tuple[JobRecord, JobState]]:
    """The run's jobs that wait or run now; tasks of an array each on their own.

    Raises:
        NoSlurmError: There is no Slurm here, and the run has jobs.
        SlurmError: Slurm does not answer.
    """
    records = read_jobs(run_folder)
    return [(record, state) for record, state in with_states(records) if state is not None and state.is_live]


def with_states(records: Sequence[JobRecord]) -> list[tuple[JobRecord, JobState | None]]:
    """Each job with what Slurm knows of it; None where Slurm has forgotten it.

    Raises:
        NoSlurmError: There is no Slurm here, and there are jobs.
        SlurmError: Slurm does not answer.
    """
    states = SlurmClient().job_states([record.job_id for record in records]) if records else {}
    found: list[tuple[JobRecord, JobState | None]] = []
    for record in records:
        own = [state for state in states.values() if state.job_id.partition("_")[0] == record.job_id.partition("_")[0]]
        found += [(record, state) for state in own] or [(record, None)]
    return found


def require_planned(plan: RunPlan) -> None:
    """Refuses to launch a run whose data is not prepared yet.

    Raises:
        UserError: It is not; the job that prepares it is named.
    """
    if plan.data is not None:
        return
    folder = Path(plan.run_folder)
    job = next((record for record in reversed(read_jobs(folder)) if record.kind == "prepare"), None)
    who = f"job {job.job_id} prepares it" if job else "no job prepares it"
    raise UserError(
        f"the data of {relative(folder)} is not prepared yet; {who}.",
        "a run is planned to its end, and started, once its packs are counted.",
        f"wait for that job (`packhorse status {relative(folder)}`), or prepare it here: "
        f"packhorse prepare {relative(folder)}.",
    )
