"""`packhorse resume RUN`: goes on the way the run was started: its jobs are submitted again, or it trains here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from packhorse.commands.train import train
from packhorse.errors import EXIT_OK, UserError
from packhorse.launching.slurm.chain import resubmit, unfinished_jobs
from packhorse.launching.slurm.job_reports import read_ends, report_jobs
from packhorse.launching.slurm.jobs import with_states
from packhorse.launching.slurm.submit import only_submission
from packhorse.plan.run_plan import read_plan
from packhorse.run_folder.attempts import newest_chain
from packhorse.run_folder.folder import open_run, relative
from packhorse.run_folder.jobs import JobRecord, read_jobs
from packhorse.run_folder.layout import CANCEL_FILE
from packhorse.run_folder.status import read_status
from packhorse.run_folder.sweep import find_sweep


def resume(run: str, overrides: Sequence[str], gpus: int | None, restarts: int | None, force: bool) -> int:
    """Goes on with a run, or with those of a sweep that did not end well.

    Args:
        run: Name or folder of the run.
        overrides: As `packhorse train RUN --resume` takes them, of a run that was started here.
        gpus: The same.
        restarts: The same.
        force: The same.

    Raises:
        UserError: There is no such run, it is live or finished, or Slurm refuses.
    """
    sweep = find_sweep(run)
    folder = sweep or Path(open_run(run).run_folder)
    submitted = [record for record in read_jobs(folder) if record.goes_on_from is None]
    if sweep is None and not submitted and newest_chain(folder):
        raise UserError(
            f"{relative(folder)} was run by job {newest_chain(folder)} of Slurm, which was submitted by hand.",
            "nobody wrote down what that job asked for.",
            f"submit it again as before (sbatch … slurm/job.sbatch {relative(folder)}), or with `packhorse submit "
            f"{relative(folder)}`; here goes on `packhorse train {relative(folder)} --resume`.",
        )
    if sweep is None and not submitted:
        return train(run, overrides, gpus, resume=True, restarts=restarts, force=force)
    given = [*overrides, *([f"--gpus {gpus}"] if gpus else []), *([f"--restarts {restarts}"] if restarts else [])]
    if given:
        raise UserError(
            f"{relative(folder)} runs as jobs of Slurm, and resume came with {' '.join(given)}.",
            "its jobs are submitted again as their scripts stand in the run folder.",
            f"leave it out; `packhorse train {relative(folder)} --resume` goes on on this machine, and takes it.",
        )
    if sweep is not None:
        return _resume_sweep(sweep)
    again = _again(folder)
    if not again:
        raise UserError(
            f"{relative(folder)} is finished: each of its jobs ended well.",
            "there is nothing left to run.",
            f"see `packhorse status {relative(folder)}`.",
        )
    _say(folder, again)
    return EXIT_OK


def _resume_sweep(sweep: Path) -> int:
    """Each run that is not done goes on in a job of its own; those that wait or run are left alone."""
    live = done = 0
    for run, jobs in jobs_of_runs(sweep).items():
        if any(state is not None and state.is_live for _, state in jobs):
            live += 1
        elif submitted := _again(run):
            _say(run, submitted)
        else:
            done += 1
    console = Console()
    for count, what in ((done, "are finished already"), (live, "wait or run")):
        if count:
            console.print(f"runs that {what}: {count}", highlight=False)
    return EXIT_OK


def _again(folder: Path) -> list[JobRecord]:
    has_data = read_plan(folder).data is not None
    with only_submission(folder):
        jobs = with_states(read_jobs(folder))
        left = unfinished_jobs(report_jobs(jobs, read_ends(folder), read_status(folder), has_data))
        if left:
            (folder / CANCEL_FILE).unlink(missing_ok=True)
        return resubmit(folder, left)


def _say(folder: Path, submitted: Sequence[JobRecord]) -> None:
    console = Console()
    for record in submitted:
        after = f", once job {record.depends_on[-1]} has ended well" if record.depends_on else ""
        console.print(f"{relative(folder)}: job {record.job_id} {record.kind}{after}", highlight=False, soft_wrap=True)
