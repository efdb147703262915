"""What is shown of jobs before and after they are submitted."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Console

from packhorse.cli.show.text import pairs, print_plain
from packhorse.launching.slurm.client import StartEstimate
from packhorse.launching.slurm.submit import PlannedJob, sbatch_arguments
from packhorse.run_folder.folder import relative
from packhorse.run_folder.jobs import JobRecord
from packhorse.workflows.submit_run import Submission
from packhorse.workflows.submit_sweep import Sweep


def show_jobs(console: Console, folder: Path, jobs: Sequence[PlannedJob], sweep: Sweep | None = None) -> None:
    """Print the job scripts and the commands, as they would be written and typed.

    Args:
        console: Where to print.
        folder: Folder of the run or the sweep.
        jobs: Jobs in the order in which they run.
        sweep: The sweep, if the jobs are those of a sweep.
    """
    for run in sweep.runs if sweep is not None else ():
        print_plain(f"# {folder.with_name(run.recipe.name)}: {' '.join(run.overrides)}", console)
    for job in jobs:
        print_plain(f"# {folder / job.script_name}\n{job.script}", console)
    print_plain("# commands", console)
    before: tuple[str, ...] = ()
    for job in jobs:
        options = sweep.options(job) if sweep is not None else []
        print_plain(shlex.join(["sbatch", "--parsable", *sbatch_arguments(folder, job, before, options)]), console)
        before = (f"JOB_{job.kind}",)


def show_submitted(
    console: Console,
    submission: Submission,
    jobs: Sequence[PlannedJob],
    records: Sequence[JobRecord],
    expected: Sequence[StartEstimate],
) -> None:
    """Print the plan of a submitted run and its jobs."""
    plan, folder = submission.plan, relative(submission.plan.run_folder)
    topology = plan.topology
    steps = f"{plan.num_steps:,} steps" if plan.num_steps is not None else "steps are counted when the data is prepared"
    where = f"{topology.num_nodes} x {topology.processes_per_node} {topology.device}, {topology.engine}; {steps}"
    lines = [("run", folder), ("plan", where), ("memory", submission.memory_words)]
    for job, record, start in zip(jobs, records, expected, strict=True):
        lines.append((f"job {record.job_id}", f"{job.kind}: {_size(job)}; {_start(record, start)}"))
    lines += [("time", submission.time_words)] if submission.time_words else []
    lines += [("saving", f"starts {submission.lead.seconds} s before the time limit: {submission.lead.reason}")]
    console.print(pairs([*lines, ("next", f"packhorse status {folder}")]))


def show_submitted_sweep(
    console: Console, sweep: Sweep, records: Sequence[JobRecord], expected: Sequence[StartEstimate]
) -> None:
    """Print the runs of a submitted sweep and its jobs."""
    folder = relative(sweep.folder)
    lines = [("sweep", f"{folder}, {len(sweep.runs)} runs")]
    lines += [(f"run {run.number}", f"{run.recipe.name}: {' '.join(run.overrides)}") for run in sweep.runs]
    for job, record, start in zip(sweep.jobs, records, expected, strict=True):
        kind = f"{job.kind}, each task" if job.kind == "train" else job.kind
        lines.append((f"job {record.job_id}", f"{kind}: {_size(job)}; {_start(record, start)}"))
    console.print(pairs([*lines, ("next", f"packhorse status {folder}")]))


def _size(job: PlannedJob) -> str:
    """Return the nodes and the time limit of a job."""
    request = job.request
    parts = [f"{request.num_nodes} node{'s' * (request.num_nodes > 1)}"]
    parts += [f"{request.gpus_per_node} GPUs each"] if request.gpus_per_node else []
    parts += [f"{request.cpus_per_node} CPUs each"] if request.cpus_per_node else []
    return f"{', '.join(parts)}, {request.time} at most"


def _start(record: JobRecord, start: StartEstimate) -> str:
    """Return when a job may start."""
    if record.depends_on:
        return f"begins when job {' and '.join(record.depends_on)} has ended well"
    if start.starts_at is None:
        return f"Slurm does not say when it may start{f': {start.note}' if start.note else ''}"
    at = datetime.fromtimestamp(start.starts_at).astimezone().isoformat(sep=" ", timespec="seconds")
    return f"may start at {at} on {start.nodes} (partition {start.partition})"
