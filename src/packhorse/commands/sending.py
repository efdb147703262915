"""What `packhorse submit` and `packhorse pipeline` show of jobs before and after they are sent."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Console

from packhorse.commands.lines import pairs
from packhorse.commands.planned_jobs import TIME_WORDS, Submission
from packhorse.errors import EXIT_OK
from packhorse.launching.slurm.client import NoSlurmError, SlurmError, StartEstimate
from packhorse.launching.slurm.refusals import explain_refusal
from packhorse.launching.slurm.script import show
from packhorse.launching.slurm.submit import PlannedJob, check_jobs, refuse_live, sbatch_arguments, send
from packhorse.plan.replan import replace_plan
from packhorse.run_folder.folder import create_run, relative
from packhorse.run_folder.jobs import JobRecord
from packhorse.run_folder.layout import SITE_RECORD


def show_or_send(found: Submission, jobs: Sequence[PlannedJob], dry_run: bool) -> int:
    """Sends the jobs of a run, or shows what would be sent.

    Args:
        found: The run.
        jobs: In the order in which they run.
        dry_run: Only show.

    Raises:
        UserError: Slurm would refuse a job; or it is not here, and the scripts are shown all the same.
    """
    console, folder = Console(), Path(found.plan.run_folder)
    if dry_run:
        show_jobs(console, folder, jobs)
        return EXIT_OK
    try:
        if not found.is_new:
            refuse_live(folder)
        expected = check_jobs(found.site, jobs)
    except NoSlurmError:
        show_jobs(console, folder, jobs)
        raise
    make_run(found)
    try:
        records = send(folder, jobs, expected)
    except SlurmError as error:
        raise explain_refusal(error, found.site, jobs[-1].request) from error
    _tell(console, found, jobs, records, expected)
    return EXIT_OK


def make_run(found: Submission) -> None:
    """Makes the run folder, or puts its new plan there; and the profile of the site beside it.

    Raises:
        UserError: The folder holds another run, or cannot be written.
    """
    if found.is_new:
        create_run(found.plan, found.files)
    elif found.is_replanned:
        replace_plan(found.plan)
    record = Path(found.plan.run_folder) / SITE_RECORD
    record.write_text(found.site.model_dump_json(indent=2) + "\n", encoding="utf-8")


def show_jobs(console: Console, folder: Path, jobs: Sequence[PlannedJob]) -> None:
    """The scripts and commands, as they would be written and typed."""
    before: tuple[str, ...] = ()
    for job in jobs:
        show_plain(console, f"# {folder / job.script_name}\n{job.script}")
    show_plain(console, "# commands")
    for job in jobs:
        show_plain(console, show(["sbatch", "--parsable", *sbatch_arguments(folder, job, before)]))
        before = (f"JOB_{job.kind}",)


def show_plain(console: Console, text: str) -> None:
    """Prints text as it is, to be copied."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _tell(
    console: Console,
    found: Submission,
    jobs: Sequence[PlannedJob],
    records: Sequence[JobRecord],
    expected: Sequence[StartEstimate],
) -> None:
    plan, folder = found.plan, relative(found.plan.run_folder)
    topology = plan.topology
    steps = f"{plan.num_steps:,} steps" if plan.num_steps is not None else "steps are counted when the data is prepared"
    where = f"{topology.num_nodes} x {topology.processes_per_node} {topology.device}, {topology.engine}; {steps}"
    lines = [("run", folder), ("plan", where), ("memory", found.memory_words)]
    for job, record, start in zip(jobs, records, expected, strict=True):
        lines.append((f"job {record.job_id}", f"{job.kind}: {size_words(job)}; {when_words(record, start)}"))
    lines += [("time", found.time_words)] if found.time_words else []
    lines += [("saving", f"asked for {found.lead.seconds} s before the time limit: {found.lead.reason}")]
    lines += [("next", f"packhorse status {folder}")]
    console.print(pairs(lines))


def size_words(job: PlannedJob) -> str:
    """What a job asks for."""
    asked = job.request
    parts = [f"{asked.num_nodes} node{'s' * (asked.num_nodes > 1)}"]
    parts += [f"{asked.gpus_per_node} GPUs each"] if asked.gpus_per_node else []
    parts += [f"{asked.cpus_per_node} CPUs each"] if asked.cpus_per_node else []
    return f"{', '.join(parts)}, {asked.time} {TIME_WORDS}"


def when_words(record: JobRecord, start: StartEstimate) -> str:
    """When a job may begin."""
    if record.depends_on:
        return f"begins when job {' and '.join(record.depends_on)} has ended well"
    if start.starts_at is None:
        return f"Slurm does not say when it may start{f': {start.note}' if start.note else ''}"
    at = datetime.fromtimestamp(start.starts_at).astimezone().isoformat(sep=" ", timespec="seconds")
    return f"may start at {at} on {start.nodes} (partition {start.partition})"
