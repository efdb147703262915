"""RUN/jobs.jsonl: the Slurm jobs that were submitted for a run, one line per job."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from packhorse.durable import append_line, read_lines
from packhorse.errors import UserError
from packhorse.plan.run_plan import PlanPart, RunPlan
from packhorse.run_folder.folder import relative
from packhorse.run_folder.layout import JOBS_FILE

JobKind = Literal["prepare", "train", "evaluate", "verify", "doctor"]


class JobRecord(PlanPart):
    """One job as it was submitted; times in Unix seconds."""

    job_id: str
    kind: JobKind
    submitted_at: float
    argv: tuple[str, ...]
    """The whole command, `sbatch` first."""
    depends_on: tuple[str, ...] = ()
    """Jobs that must succeed before this one begins."""
    expected_start: float | None = None
    """Start that Slurm predicted before the job was submitted."""
    goes_on_from: str | None = None
    """Job that this one continues, on a site that does not requeue jobs."""


def append_job(run_folder: Path, record: JobRecord) -> None:
    """Append one line and wait until it is on disk."""
    append_line(run_folder / JOBS_FILE, record)


def read_jobs(run_folder: Path) -> list[JobRecord]:
    """Return all jobs in the order in which they were submitted; a torn line is skipped."""
    return read_lines(run_folder / JOBS_FILE, JobRecord)


def require_prepared_data(plan: RunPlan) -> None:
    """Refuse to launch a run whose data is not prepared yet.

    Raises:
        UserError: The data is not prepared; the message names the job that prepares it.
    """
    if plan.data is not None:
        return
    folder = Path(plan.run_folder)
    job = next((record for record in reversed(read_jobs(folder)) if record.kind == "prepare"), None)
    who = f"job {job.job_id} prepares it" if job else "no job prepares it"
    raise UserError(
        f"the data of {relative(folder)} is not prepared yet; {who}.",
        "the number of steps is known, and training can start, once the packs are counted.",
        f"wait for that job (`packhorse status {relative(folder)}`), or prepare it here: "
        f"packhorse prepare {relative(folder)}.",
    )
