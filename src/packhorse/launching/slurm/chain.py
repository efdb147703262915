"""Jobs that wait for each other: what is left of a chain is submitted again, or waits for another job than before."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from packhorse.launching.slurm.client import depend_on, submit_script
from packhorse.launching.slurm.jobs import JobRecord, append_job, live_jobs, read_jobs
from packhorse.launching.slurm.stages import ORDER, Stage

CANCEL_FILE: Final = "CANCEL"
"""RUN/CANCEL: the run is not to go on by itself, whatever ends its job; `packhorse resume` takes it away."""
CHAINED: Final = ("--dependency", "--kill-on-invalid-dep", "--parsable")


def chained(depends_on: Sequence[str]) -> list[str]:
    """Options of sbatch: begin once these jobs have ended well; where one does not, do not wait for ever."""
    return [f"--dependency=afterok:{':'.join(depends_on)}", "--kill-on-invalid-dep=yes"] if depends_on else []


def left_of(stages: Sequence[Stage]) -> list[JobRecord]:
    """The newest job of each kind, from the first one on that is not done."""
    newest = {stage.record.kind: stage for stage in stages}
    chain = [newest[kind] for kind in ORDER if kind in newest]
    first = next((number for number, stage in enumerate(chain) if stage.became != "done"), len(chain))
    return [stage.record for stage in chain[first:]]


def submit_again(run_folder: Path, left: Sequence[JobRecord]) -> list[JobRecord]:
    """Submits jobs as they were submitted before, each once the one before it has ended well.

    Raises:
        NoSlurmError: There is no Slurm here.
        SlurmError: A job is refused; those before it stay.
    """
    (run_folder / CANCEL_FILE).unlink(missing_ok=True)
    submitted: list[JobRecord] = []
    for record in left:
        depends_on = tuple(each.job_id for each in submitted[-1:])
        kept = [word for word in record.argv[1:] if word.partition("=")[0] not in CHAINED]
        words = [*chained(depends_on), *kept]
        again = JobRecord(
            job_id=submit_script(words),
            kind=record.kind,
            submitted_at=time.time(),
            argv=("sbatch", "--parsable", *words),
            depends_on=depends_on,
        )
        append_job(run_folder, again)
        submitted.append(again)
    return submitted


def follow(run_folder: Path, before: str, after: str) -> list[str]:
    """Lets the run's jobs that wait for one job wait for another one, which goes on with its work.

    Called by the first job before it ends: afterwards Slurm would end those that wait for it.

    Args:
        run_folder: The run's.
        before: The job that ends now.
        after: The one that goes on.

    Returns:
        The jobs that wait.

    Raises:
        SlurmError: Slurm refuses, or does not answer.
    """
    records = read_jobs(run_folder)
    goes_on_from = {record.job_id: record.goes_on_from for record in records}
    earlier = {before}
    each: str | None = before
    while each := goes_on_from.get(each or ""):
        earlier.add(each)
    waiting = [record for record, state in live_jobs(run_folder) if state.is_waiting and earlier & {*record.depends_on}]
    for record in waiting:
        depend_on(record.job_id, [*(number for number in record.depends_on if number not in earlier), after])
    return [record.job_id for record in waiting]
