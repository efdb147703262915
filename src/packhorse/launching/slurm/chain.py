"""Jobs that wait for each other: what is left of a chain is submitted again, or waits for another job than before."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from packhorse.errors import EXIT_OK, UserError
from packhorse.launching.slurm.client import depend_on_any, job_states
from packhorse.launching.slurm.jobs import live_jobs, submit_job
from packhorse.launching.slurm.stages import ORDER, Stage
from packhorse.run_folder.jobs import JobRecord, append_job, read_jobs
from packhorse.run_folder.lock import lock_holder, release_job_lock

CHAINED: Final = ("--dependency", "--kill-on-invalid-dep", "--parsable")


def chained(depends_on: Sequence[str]) -> list[str]:
    """Options of sbatch: begin once these jobs have ended well; where one does not, do not wait for ever."""
    return [f"--dependency=afterok:{':'.join(depends_on)}", "--kill-on-invalid-dep=yes"] if depends_on else []


def left_of(stages: Sequence[Stage]) -> list[JobRecord]:
    """The newest job of each kind, from the first one on that is not done; as it was submitted, not as it went on."""
    newest = {stage.record.kind: stage for stage in stages if stage.became != "replaced"}
    chain = [newest[kind] for kind in ORDER if kind in newest]
    first = next((number for number, stage in enumerate(chain) if stage.became != "done"), len(chain))
    records = {stage.record.job_id: stage.record for stage in stages}
    return [_submitted(stage.record, records) for stage in chain[first:]]


def _submitted(record: JobRecord, records: Mapping[str, JobRecord]) -> JobRecord:
    """The job whose work a job went on with: that one was submitted with a script that stands in the run folder."""
    while record.goes_on_from is not None and record.goes_on_from in records:
        record = records[record.goes_on_from]
    return record


def submit_again(run_folder: Path, left: Sequence[JobRecord]) -> list[JobRecord]:
    """Submits jobs as they were submitted before, each once the one before it has ended well.

    Raises:
        NoSlurmError: There is no Slurm here.
        SlurmError: A job is refused; those before it stay.
    """
    submitted: list[JobRecord] = []
    for record in left:
        depends_on = tuple(each.job_id for each in submitted[-1:])
        kept = [word for word in record.argv[1:] if word.partition("=")[0] not in CHAINED]
        words = [*chained(depends_on), *kept]
        again = submit_job(words, record.kind, depends_on)
        append_job(run_folder, again)
        submitted.append(again)
    return submitted


def release_ended(run_folder: Path) -> None:
    """Gives a run free that is held by a job which Slurm knows to have ended: one that was ended hard could not.

    Raises:
        NoSlurmError: There is no Slurm here, and a job holds the run.
        SlurmError: Slurm does not answer.
    """
    found = lock_holder(run_folder)
    if found is None or "job" not in found:
        return
    job_id = str(found["job"])
    states = job_states([job_id]).values()  # of a task of an array, under the name that it has there
    if states and not any(state.is_live for state in states):
        release_job_lock(run_folder, job_id)


def follow(run_folder: Path, job_id: str, follower: str) -> list[str]:
    """Lets the jobs that wait for a training job wait for that one or for the one that goes on if it is cut short.

    Where the site lets no job be queued again, each training job submits its follower when it begins.

    Args:
        run_folder: The run's.
        job_id: The job that trains now.
        follower: The one that begins where it does not end well.

    Returns:
        The jobs that wait.

    Raises:
        NoSlurmError: There is no Slurm here.
        SlurmError: Slurm refuses, or does not answer.
    """
    goes_on_from = {record.job_id: record.goes_on_from for record in read_jobs(run_folder)}
    line = {job_id}
    before = goes_on_from.get(job_id)
    while before is not None:
        line.add(before)
        before = goes_on_from.get(before)
    waiting = [record for record, state in live_jobs(run_folder) if state.is_waiting and line & {*record.depends_on}]
    for record in waiting:
        depend_on_any(record.job_id, [job_id, follower])
    return [record.job_id for record in waiting]


def main(words: Sequence[str]) -> int:
    """`python -m packhorse.launching.slurm.chain RUN JOB FOLLOWER`: what a job script types; returns the exit code."""
    run_folder, job_id, follower = words
    try:
        waiting = follow(Path(run_folder), job_id, follower)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(f"jobs that wait for {job_id} or {follower} now: {' '.join(waiting) or 'none'}\n")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
