"""Submit a recipe with a sweep: one run folder per run, and one job array that trains them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from packhorse.errors import UserError
from packhorse.launching.slurm.client import SlurmClient, SlurmError, StartEstimate
from packhorse.launching.slurm.jobs import submit_job
from packhorse.launching.slurm.refusals import explain_refusal
from packhorse.launching.slurm.submit import PlannedJob, sbatch_arguments
from packhorse.plan.make_plan import run_folder_of
from packhorse.recipe.load import load_recipe
from packhorse.recipe.sweep import SweepRun, expand, run_prefix
from packhorse.run_folder.folder import check_free
from packhorse.run_folder.jobs import JobRecord, append_job
from packhorse.run_folder.layout import ARRAY_JOB_LOG, LOGS_FOLDER, job_log_name
from packhorse.run_folder.sweep import create_sweep
from packhorse.workflows.submit_run import (
    Submission,
    SubmitRequest,
    make_run,
    planned_jobs,
    prepare_job,
    submission,
    train_job,
)


@dataclass(frozen=True)
class Sweep:
    """A sweep that may be submitted.

    Attributes:
        recipe: Name or path of the recipe, as typed.
        folder: Folder of the sweep, next to those of its runs.
        prefix: Path of the run folders without their number, from which the job script makes the path of a task's run.
        runs: Runs of the sweep.
        submissions: Each run as it would be submitted alone.
        jobs: Jobs of the whole sweep: preparation if data is not prepared yet, and the array.
        at_once: Largest number of array tasks at the same time; None leaves it to Slurm.
    """

    recipe: str
    folder: Path
    prefix: Path
    runs: Sequence[SweepRun]
    submissions: Sequence[Submission]
    jobs: Sequence[PlannedJob]
    at_once: int | None

    def options(self, job: PlannedJob) -> list[str]:
        """Return the array options of a job: one task per run, whose log is in that run (see sbatch(1))."""
        if job.kind != "train":
            return []
        limit = f"%{self.at_once}" if self.at_once is not None else ""
        return [f"--array=1-{len(self.runs)}{limit}", f"--output={self.prefix}-%a/{LOGS_FOLDER}/{ARRAY_JOB_LOG}"]


def plan_sweep(recipe: str, overrides: Sequence[str], request: SubmitRequest) -> Sweep:
    """Plan every run of a sweep. Writes nothing.

    Raises:
        UserError: A run cannot be submitted, or the runs need different nodes.
    """
    loaded = load_recipe(recipe, overrides)
    folder = run_folder_of(loaded)
    check_free(folder)
    runs = expand(loaded)
    submissions = [
        submission(recipe, [*overrides, "sweep={}", f"name={run.recipe.name}", *run.overrides], request) for run in runs
    ]
    prefix = folder.with_name(run_prefix(loaded))
    return Sweep(recipe, folder, prefix, runs, submissions, _jobs(folder, prefix, submissions), request.at_once)


def send_sweep(sweep: Sweep, expected: Sequence[StartEstimate]) -> list[JobRecord]:
    """Create the folders of a sweep and submit its jobs; if Slurm refuses one, remove the folders again.

    Raises:
        UserError: A folder cannot be written, or Slurm refuses a job.
    """
    create_sweep(sweep.folder, sweep.recipe, sweep.runs)
    for run in sweep.submissions:
        make_run(run)
        (Path(run.plan.run_folder) / LOGS_FOLDER).mkdir(exist_ok=True)
    try:
        return _send(sweep, expected)
    except UserError:
        # No job has run: the names are free again.
        for folder in (sweep.folder, *(sweep.folder.with_name(run.recipe.name) for run in sweep.runs)):
            shutil.rmtree(folder)
        raise


def _jobs(folder: Path, prefix: Path, submissions: Sequence[Submission]) -> list[PlannedJob]:
    """Return the jobs of the run that needs the most time to save, for all runs of the sweep."""
    sizes = {(run.plan.topology.num_nodes, run.plan.topology.processes_per_node): run for run in submissions}
    if len(sizes) > 1:
        (one, other), names = sizes, [run.plan.recipe.name for run in sizes.values()]
        raise UserError(
            f"{names[0]} runs on {one[0]} x {one[1]} processes and {names[1]} on {other[0]} x {other[1]}.",
            "all tasks of a job array request the same nodes.",
            "sweep over other fields, or submit these runs one by one.",
        )
    for run in submissions:
        planned_jobs(run)  # refuses what no job of this run could do
    latest = max(submissions, key=lambda run: run.lead.seconds)
    waits = any(run.plan.data is None for run in submissions)
    prepare = [prepare_job(latest.site, folder.name, folder)] if waits else []
    return [*prepare, replace(train_job(latest, folder.name, folder), words=(str(prefix),))]


def _send(sweep: Sweep, expected: Sequence[StartEstimate]) -> list[JobRecord]:
    """Submit the jobs; record them for the sweep, and for each run as if it had been submitted alone."""
    folder = sweep.folder
    records: list[JobRecord] = []
    for job in sweep.jobs:
        (folder / job.script_name).write_text(job.script, encoding="utf-8")
    for job, start in zip(sweep.jobs, expected, strict=True):
        depends_on = tuple(record.job_id for record in records)
        words = sbatch_arguments(folder, job, depends_on, sweep.options(job))
        try:
            record = submit_job(words, job.kind, depends_on, None if depends_on else start.starts_at)
        except SlurmError as error:
            if records:
                SlurmClient().cancel([record.job_id for record in records])
            raise explain_refusal(error, sweep.submissions[0].site, job.request) from error
        append_job(folder, record)
        for run in sweep.runs:
            append_job(folder.with_name(run.recipe.name), _of_one_run(record, sweep, job, run))
        records.append(record)
    return records


def _of_one_run(record: JobRecord, sweep: Sweep, job: PlannedJob, of: SweepRun) -> JobRecord:
    """Return the record of a sweep's job for one run, with the command that submits it for that run alone."""
    run = sweep.folder.with_name(of.recipe.name)
    job_id = f"{record.job_id}_{of.number}" if record.kind == "train" else record.job_id
    name = "job" if record.kind == "train" else record.kind
    words = [
        f"--output={run / LOGS_FOLDER / job_log_name(name)}",
        str(sweep.folder / job.script_name),
        *job.words[:-1],
        str(run),
    ]
    return record.model_copy(update={"job_id": job_id, "argv": ("sbatch", "--parsable", *words)})
