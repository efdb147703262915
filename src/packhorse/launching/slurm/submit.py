"""Submits the jobs of a run: each looked at by Slurm before any is sent, and written down as soon as it is."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from packhorse.errors import UserError
from packhorse.launching.slurm.chain import chained, release_ended
from packhorse.launching.slurm.client import Expected, SlurmError, cancel, expect_start
from packhorse.launching.slurm.jobs import live_jobs, submit_job
from packhorse.launching.slurm.refusals import explained, nodes_are_down, too_much
from packhorse.launching.slurm.script import JobRequest
from packhorse.launching.slurm.site import SiteProfile
from packhorse.run_folder.folder import relative
from packhorse.run_folder.jobs import JobKind, JobRecord, append_job
from packhorse.run_folder.layout import CANCEL_FILE, JOBS_FILE, LOGS_FOLDER, job_script_name
from packhorse.run_folder.lock import launcher_lock


@dataclass(frozen=True)
class PlannedJob:
    """A job that is to be submitted.

    Attributes:
        kind: What it does.
        request: What it asks for.
        script: Text of its script.
        words: Arguments of the script.
    """

    kind: JobKind
    request: JobRequest
    script: str
    words: tuple[str, ...]

    @property
    def script_name(self) -> str:
        """Of its script in the run folder."""
        return job_script_name(self.kind)


def sbatch_words(
    run_folder: Path, job: PlannedJob, depends_on: Sequence[str], options: Sequence[str] = ()
) -> list[str]:
    """The words behind `sbatch` that submit a job: options, its script in the run folder, and the script's arguments.

    Args:
        run_folder: The run's.
        job: What is submitted.
        depends_on: Jobs that must end well before it begins.
        options: Further options.
    """
    return [*chained(depends_on), *options, str(run_folder / job.script_name), *job.words]


def check_jobs(site: SiteProfile, jobs: Sequence[PlannedJob]) -> list[Expected]:
    """Asks Slurm whether it would take each job, and when each might begin if none waited for another.

    Raises:
        NoSlurmError: There is no Slurm here.
        UserError: It would not, or it would take the job and never start it; with what the site allows.
    """
    found = []
    for job in jobs:
        refused = too_much(site, job.request)
        if refused is not None:
            raise refused
        try:
            found.append(expect_start(job.script))
        except SlurmError as error:
            note = nodes_are_down(error, job.request)
            if not note:
                raise explained(error, site, job.request) from error
            found.append(Expected(None, "", "", note))
    return found


def refuse_live(run_folder: Path) -> None:
    """Refuses a run that has jobs which wait or run.

    Raises:
        UserError: It has.
        SlurmError: Slurm does not answer, so that nobody knows.
    """
    live = live_jobs(run_folder)
    if not live:
        return
    words = ", ".join(f"job {state.job_id} ({record.kind}) is {state.state.lower()}" for record, state in live)
    raise UserError(
        f"{relative(run_folder)} is submitted already: {words}.",
        "two jobs on one run would write over each other's checkpoints and figures.",
        f"watch it with `packhorse status {relative(run_folder)}`, or end it with `packhorse cancel "
        f"{relative(run_folder)}` first.",
    )


@contextmanager
def only_submission(run_folder: Path) -> Iterator[None]:
    """Lets nobody else submit the run for so long. The launcher's lock is free by then: a job may begin at once.

    Raises:
        UserError: Somebody else submits it now, it has live jobs, or a launcher or job runs it.
        SlurmError: Slurm does not answer.
    """
    with (run_folder / JOBS_FILE).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{relative(run_folder)} is being submitted by another process.",
                "two jobs on one run would write over each other's checkpoints and figures.",
                f"look at it in a moment: packhorse status {relative(run_folder)}",
            ) from None
        refuse_live(run_folder)
        release_ended(run_folder)
        with launcher_lock(run_folder):
            pass
        yield


def send(run_folder: Path, jobs: Sequence[PlannedJob], expected: Sequence[Expected]) -> list[JobRecord]:
    """Writes the scripts into the run folder and submits the jobs, each once the one before it has ended well.

    Args:
        run_folder: The run's, which is there.
        jobs: In the order in which they run.
        expected: Of `check_jobs`.

    Returns:
        The jobs as they were submitted; RUN/jobs.jsonl has them.

    Raises:
        UserError: The run is live, or run by a launcher; or Slurm refuses a job: those sent before it are cancelled.
    """
    (run_folder / LOGS_FOLDER).mkdir(exist_ok=True)
    sent: list[JobRecord] = []
    with only_submission(run_folder):
        (run_folder / CANCEL_FILE).unlink(missing_ok=True)
        for job in jobs:
            (run_folder / job.script_name).write_text(job.script, encoding="utf-8")
        try:
            for job, start in zip(jobs, expected, strict=True):
                sent.append(_sent(run_folder, job, start, sent[-1:]))
        except SlurmError:
            with suppress(UserError):
                cancel([record.job_id for record in sent])
            raise
    return sent


def _sent(run_folder: Path, job: PlannedJob, start: Expected, before: Sequence[JobRecord]) -> JobRecord:
    depends_on = tuple(record.job_id for record in before)
    words = sbatch_words(run_folder, job, depends_on)
    record = submit_job(words, job.kind, depends_on, None if before else start.starts_at)
    append_job(run_folder, record)
    return record
