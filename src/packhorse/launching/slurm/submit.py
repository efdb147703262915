"""Submit the jobs of a run: Slurm checks all of them before any is sent, and each is recorded at once."""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from packhorse.errors import UserError
from packhorse.launching.slurm.client import SlurmClient, SlurmError, StartEstimate
from packhorse.launching.slurm.jobs import dependency_options, live_jobs, release_ended, submit_job
from packhorse.launching.slurm.refusals import explain_refusal, find_excess, unavailable_nodes
from packhorse.launching.slurm.script import TRAIN_SCRIPT, JobRequest, job_script
from packhorse.launching.slurm.site import SiteProfile
from packhorse.run_folder.folder import relative
from packhorse.run_folder.jobs import JobKind, JobRecord, append_job
from packhorse.run_folder.layout import CANCEL_FILE, JOBS_FILE, LOGS_FOLDER
from packhorse.run_folder.lock import launcher_lock

TWO_JOBS: Final = "two jobs on one run would overwrite each other's checkpoints and metrics."


@dataclass(frozen=True)
class PlannedJob:
    """A job to be submitted.

    Attributes:
        kind: Task of the job.
        request: Resources that it requests.
        script: Text of its script.
        words: Arguments of the script.
    """

    kind: JobKind
    request: JobRequest
    script: str
    words: tuple[str, ...]

    @property
    def script_name(self) -> str:
        """File name of the script in the run folder."""
        return TRAIN_SCRIPT if self.kind == "train" else f"{self.kind}.sbatch"


def planned_job(site: SiteProfile, kind: JobKind, request: JobRequest, *words: str) -> PlannedJob:
    """Return a job with its script, which uses the programs of the site or of this Python.

    Raises:
        UserError: A value of the request would break the script.
    """
    script = job_script(site, request, site.programs or str(Path(sys.executable).parent))
    return PlannedJob(kind, request, script, words)


def sbatch_arguments(
    run_folder: Path, job: PlannedJob, depends_on: Sequence[str], options: Sequence[str] = ()
) -> list[str]:
    """Return the arguments of `sbatch` that submit a job: options, the script in the run folder, and its arguments.

    Args:
        run_folder: Folder of the run.
        job: The job.
        depends_on: Jobs that must succeed before it starts.
        options: Further options.
    """
    return [*dependency_options(depends_on), *options, str(run_folder / job.script_name), *job.words]


def check_jobs(site: SiteProfile, jobs: Sequence[PlannedJob]) -> list[StartEstimate]:
    """Return when Slurm expects to start each job, regardless of dependencies; nothing is queued.

    Raises:
        NoSlurmError: There is no Slurm here.
        UserError: Slurm would refuse a job, or accept it and never start it; the message lists what the site allows.
    """
    estimates = []
    for job in jobs:
        excess = find_excess(site, job.request)
        if excess is not None:
            raise excess
        try:
            estimates.append(SlurmClient().estimate_start(job.script))
        except SlurmError as error:
            note = unavailable_nodes(error, job.request)
            if not note:
                raise explain_refusal(error, site, job.request) from error
            estimates.append(StartEstimate(None, "", "", note))
    return estimates


def refuse_live(run_folder: Path) -> None:
    """Refuse a run with jobs that wait or run.

    Raises:
        UserError: The run has such jobs.
        SlurmError: Slurm does not answer, so the state of its jobs is unknown.
    """
    live = live_jobs(run_folder)
    if not live:
        return
    jobs = ", ".join(f"job {state.job_id} ({record.kind}) is {state.state.lower()}" for record, state in live)
    raise UserError(
        f"{relative(run_folder)} is submitted already: {jobs}.",
        TWO_JOBS,
        f"watch it with `packhorse status {relative(run_folder)}`, or end it with `packhorse cancel "
        f"{relative(run_folder)}` first.",
    )


@contextmanager
def only_submission(run_folder: Path) -> Iterator[None]:
    """Keep other processes from submitting the run meanwhile.

    The launcher's lock is only tested, and free inside the block: a submitted job may start at once and take it.

    Raises:
        UserError: Another process submits the run now, it has live jobs, or a launcher or job runs it.
        SlurmError: Slurm does not answer.
    """
    with (run_folder / JOBS_FILE).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{relative(run_folder)} is being submitted by another process.",
                TWO_JOBS,
                f"wait a moment, then see: packhorse status {relative(run_folder)}",
            ) from None
        refuse_live(run_folder)
        release_ended(run_folder)
        with launcher_lock(run_folder):
            pass
        yield


def send(run_folder: Path, jobs: Sequence[PlannedJob], estimates: Sequence[StartEstimate]) -> list[JobRecord]:
    """Write the scripts into the run folder and submit the jobs, each to start after the previous one succeeds.

    Args:
        run_folder: Existing folder of the run.
        jobs: Jobs in the order in which they run.
        estimates: Results of `check_jobs`.

    Returns:
        The submitted jobs, as recorded in RUN/jobs.jsonl.

    Raises:
        UserError: The run is live; or Slurm refuses a job, and the jobs sent before it are cancelled.
    """
    (run_folder / LOGS_FOLDER).mkdir(exist_ok=True)
    sent: list[JobRecord] = []
    with only_submission(run_folder):
        (run_folder / CANCEL_FILE).unlink(missing_ok=True)
        for job in jobs:
            (run_folder / job.script_name).write_text(job.script, encoding="utf-8")
        try:
            for job, estimate in zip(jobs, estimates, strict=True):
                depends_on = tuple(record.job_id for record in sent[-1:])
                arguments = sbatch_arguments(run_folder, job, depends_on)
                record = submit_job(arguments, job.kind, depends_on, None if sent else estimate.starts_at)
                append_job(run_folder, record)
                sent.append(record)
        except SlurmError:
            with suppress(UserError):
                SlurmClient().cancel([record.job_id for record in sent])
            raise
    return sent
